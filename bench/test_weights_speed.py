"""Weights made visible, beside the attention that they belong to."""

from typing import Any

import numpy as np
import pytest

import fastattn as fa

SHAPE = (1, 8, 4096, 64)
CHOICES: dict[str, dict[str, Any]] = {
    "pool": {"pool": (64, 64)},
    "reduce": {"reduce": "keys"},
    "rows": {"rows": slice(-64, None)},
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("choice", ["attention", *CHOICES])
def test_weights(benchmark: Any, choice: str, causal: bool) -> None:
    rng = np.random.default_rng(0)
    shape = SHAPE if not benchmark.disabled else (1, 2, 150, 64)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    benchmark.group = f"weights: {shape}{' causal' if causal else ''}"
    if choice == "attention":
        benchmark(fa.attention, q, k, v, causal=causal)
        return
    options = {"causal": causal, **CHOICES[choice]}
    expected = fa.reference.attention_weights(q[:, :1], k[:, :1], **options)
    weights = benchmark(fa.attention_weights, q, k, **options)
    np.testing.assert_allclose(weights[:, :1], expected, rtol=1e-5, atol=1e-6)
