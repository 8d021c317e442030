"""`out` and `residual`: memory that may overlap, and memory that may not."""

from math import nan

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from operands import CLOSE, DV, LQ, OUT, B, D, H, once, operands, zeros

import fastattn as fa

# --- overlap of out ------------------------------------------------------------------------------


@once
@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_out_must_not_overlap_an_input(name):
    shape = (2, 4, 4)
    arrays = {x: np.ones(shape, np.float32) for x in ("q", "k", "v", "bias")}
    packed = np.ones((2, 5, 4), np.float32)
    arrays[name], out = packed[:, :4], packed[:, 1:]
    q, k, v, bias = arrays.values()
    with pytest.raises(ValueError, match=f"`out` must not overlap `{name}`"):
        fa.attention(q, k, v, bias=bias, out=out)
    with pytest.raises(ValueError, match=f"`out` must not overlap `{name}`"):
        fa.attention(q, k, v, bias=bias, out=arrays[name])
    assert np.all(packed == 1)


@once
def test_out_must_not_overlap_mask_or_segment_ids():
    q, k, v = (zeros(1, 8, 8) for _ in range(3))
    out = zeros(1, 8, 8)
    mask = out.view(bool)[..., :8]
    with pytest.raises(ValueError, match="`out` must not overlap `mask`"):
        fa.attention(q, k, v, mask=mask, out=out)
    ids = out.view(np.int64)[0, 0, :1]
    other = np.zeros(8, np.int64)
    for segment_ids in ((ids, other), (other, ids)):
        with pytest.raises(ValueError, match="`out` must not overlap `segment_ids`"):
            fa.attention(q, k, v, segment_ids=segment_ids, out=out)


@once
def test_out_must_not_overlap_the_x_of_self_attention():
    x = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match="`out` must not overlap `x`"):
        fa.self_attention(x, out=x)
    assert np.all(x == 1)


@once
def test_out_must_not_overlap_a_part_of_residual():
    q, k, v = (zeros(2, 4, 4) for _ in range(3))
    packed = zeros(2, 5, 4)
    for residual in (packed[:, :4], packed[:, 1:][:, ::-1]):
        with pytest.raises(ValueError, match="`out` must not overlap `residual` unless"):
            fa.attention(q, k, v, residual=residual, out=packed[:, 1:])


def test_out_between_inputs_in_memory_is_no_overlap():
    rng = np.random.default_rng(1)
    packed = rng.standard_normal((B, LQ, 4, H, D)).astype(np.float32)
    q, k, v, out = (packed[:, :, part].swapaxes(1, 2) for part in range(4))
    expected = fa.reference.attention(q, k, v)
    inputs = packed[:, :, :3].copy()
    assert fa.attention(q, k, v, out=out) is out
    assert_allclose(out, expected, **CLOSE)
    assert_array_equal(packed[:, :, :3], inputs)
    # Every second column, too.
    packed = rng.standard_normal((LQ, 2 * D)).astype(np.float32)
    x, out = packed[:, ::2], packed[:, 1::2]
    expected = fa.reference.attention(x, x, x)
    fa.attention(x, x, x, out=out)
    assert_allclose(out, expected, **CLOSE)


# --- out and residual ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_out_is_written_and_returned(dtype):
    q, k, v = operands(dtype)
    expected = fa.attention(q, k, v)
    buffer = np.full((LQ, 2 * DV, B, H), nan, dtype)
    for out in (
        np.full(OUT, nan, dtype),
        np.full(OUT, nan, dtype, order="F"),
        np.full(OUT, nan, dtype)[::-1, :, ::-1],
        buffer.transpose(2, 3, 0, 1)[..., ::2],
    ):
        assert fa.attention(q, k, v, out=out) is out
        assert_array_equal(out, expected)
    assert np.all(np.isnan(buffer[:, 1::2]))  # between the elements of out
    out, lse = fa.attention(q, k, v, out=np.full(OUT, nan, dtype), return_lse=True)
    assert_array_equal(out, expected)
    assert lse.shape == (B, H, LQ)


def test_out_of_interleaved_axes():
    # Distinct places, though no axis steps over the whole of another.
    out = np.lib.stride_tricks.as_strided(np.full(13, nan, np.float32), (1, 3, 2), (0, 8, 12))
    x = np.ones((1, 3, 2), np.float32)
    fa.attention(x, x, x, out=out)
    assert_array_equal(out, x)


def test_two_dimensional_out():
    q, k, v = (x[0, 0] for x in operands())
    out = np.full((LQ, DV), nan, np.float32)
    assert fa.attention(q, k, v, out=out) is out
    assert_array_equal(out, fa.attention(q, k, v))


def test_out_subclass_is_returned_itself(tmp_path):
    q, k, v = operands()
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=OUT)
    assert fa.attention(q, k, v, out=out) is out
    assert_array_equal(np.asarray(out), fa.attention(q, k, v))


@pytest.mark.parametrize("softmax_axis", ["keys", "queries"])
def test_residual_may_be_out(softmax_axis):
    q, k, v = operands()
    residual = np.random.default_rng(2).standard_normal(OUT).astype(np.float32)
    options = {"softmax_axis": softmax_axis}
    expected = fa.attention(q, k, v, residual=residual, **options)
    assert_allclose(
        expected, fa.reference.attention(q, k, v, residual=residual, **options), **CLOSE
    )
    stream = residual.copy()
    assert fa.attention(q, k, v, residual=stream, out=stream, **options) is stream
    assert_array_equal(stream, expected)
    transposed = residual.swapaxes(1, 2).copy().swapaxes(1, 2)
    fa.attention(q, k, v, residual=transposed, out=transposed[:], **options)
    assert_array_equal(transposed, expected)


def test_residual_may_be_an_input():
    x = operands()[0]
    assert_array_equal(fa.attention(x, x, x, residual=x), fa.attention(x, x, x, residual=x.copy()))
