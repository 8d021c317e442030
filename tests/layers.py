"""Inputs of layers, and how close their results are."""

import numpy as np

EMBED_DIM, KEY_DIM, VALUE_DIM, OUT_DIM = 12, 10, 14, 12
TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}


def make_inputs(dtype=np.float32, batch_shape=(2,), seqlen_q=5, seqlen_k=7):
    rng = np.random.default_rng(1)
    return tuple(
        rng.standard_normal((*batch_shape, *shape)).astype(dtype)
        for shape in ((seqlen_q, EMBED_DIM), (seqlen_k, KEY_DIM), (seqlen_k, VALUE_DIM))
    )


def assert_close(actual, desired, dtype=np.float32):
    assert actual.dtype == dtype
    assert actual.shape == desired.shape
    scale = 1 + np.abs(desired[np.isfinite(desired)]).max(initial=0)
    np.testing.assert_allclose(actual, desired, rtol=0, atol=TOLERANCE[dtype] * scale)
