"""No access outside the arrays: each lies flush against a page that may not be touched.

AddressSanitizer misses out-of-bounds maskload, gather and maskstore of GCC 12; the MMU does not.
A failure here is a segmentation fault, which faulthandler traces to the test.
"""

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastattn as fa

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mmap.restype = ctypes.c_void_p

PROT_NONE = 0
PAGE = mmap.PAGESIZE

# Tails of every register tile, block and vector; one and none beside them.
TAILS = [(1, 1), (1, 7), (5, 64), (6, 65), (23, 24), (25, 33), (64, 129), (67, 191), (130, 300)]
HEAD_DIMS = [(1, 1), (3, 5), (8, 8), (17, 9), (64, 64), (40, 72), (130, 67)]


class GuardedMemory:
    """Arrays between two pages without access; `end` says which of the two they touch."""

    def __init__(self, end: str) -> None:
        self.end = end
        self.mappings: list[tuple[int, int]] = []

    def buffer(self, nbytes: int) -> np.ndarray:
        inner = max(-(-nbytes // PAGE), 1) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = libc.mmap(None, inner + 2 * PAGE, protection, flags, -1, 0)
        assert address not in (None, ctypes.c_void_p(-1).value)
        self.mappings.append((address, inner + 2 * PAGE))
        for guard in (address, address + PAGE + inner):
            assert libc.mprotect(guard, PAGE, PROT_NONE) == 0
        start = address + PAGE + (inner - nbytes if self.end == "end" else 0)
        if nbytes == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(start), np.uint8)

    def copy(self, x: np.ndarray) -> np.ndarray:
        """A contiguous copy of x."""
        array = self.buffer(x.nbytes).view(x.dtype).reshape(x.shape)
        array[...] = x
        return array

    def strided(self, x: np.ndarray) -> np.ndarray:
        """A copy with the features of a row apart, ending on the last element or starting on the
        first: no room after it, none before it."""
        wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
        wide[..., ::2] = x
        flat = wide.reshape(-1)
        if self.end == "end":  # drop the filler behind the last element
            flat = flat[: max(flat.size - 1, 0)]
        memory = self.buffer(flat.nbytes).view(x.dtype)
        memory[...] = flat
        return np.lib.stride_tricks.as_strided(memory, x.shape, wide[..., ::2].strides)

    def transposed(self, x: np.ndarray) -> np.ndarray:
        return self.copy(x.swapaxes(-1, -2)).swapaxes(-1, -2)

    def reversed(self, x: np.ndarray) -> np.ndarray:
        return self.copy(x[..., ::-1, ::-1])[..., ::-1, ::-1]

    def close(self) -> None:
        for address, size in self.mappings:
            libc.munmap(address, size)


@pytest.fixture(params=["end", "start"])
def memory(request: pytest.FixtureRequest) -> Any:
    memory = GuardedMemory(request.param)
    yield memory
    memory.close()


LAYOUTS: dict[str, Callable[[GuardedMemory, np.ndarray], np.ndarray]] = {
    "contiguous": GuardedMemory.copy,
    "strided": GuardedMemory.strided,
    "transposed": GuardedMemory.transposed,
    "reversed": GuardedMemory.reversed,
}

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize(
    "dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__
)
each_axis = pytest.mark.parametrize("axis", ["keys", "queries"])


def make(
    dtype: Any, seqlen_q: int, seqlen_k: int, head_dim: int, head_dim_v: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, seqlen_q, head_dim)).astype(dtype)
    k = rng.standard_normal((1, seqlen_k, head_dim)).astype(dtype)
    v = rng.standard_normal((1, seqlen_k, head_dim_v)).astype(dtype)
    return q, k, v


def check(
    memory: GuardedMemory,
    place: Callable[[GuardedMemory, np.ndarray], np.ndarray],
    qkv: tuple[np.ndarray, ...],
    **options: Any,
) -> None:
    """The guarded call gives the bits of the plain one, out and lse in guarded memory too."""
    plain_out, plain_lse = fa.attention(*qkv, return_lse=True, **options)
    out = place(memory, np.full_like(plain_out, np.nan))
    guarded = {
        name: tuple(memory.copy(x) for x in value)
        if name == "segment_ids"
        else memory.copy(value)
        if name in ("alibi_slopes", "sinks", "kv_lengths")
        else place(memory, value)
        if isinstance(value, np.ndarray)
        else value
        for name, value in options.items()
    }
    q, k, v = (place(memory, x) for x in qkv)
    result, lse = fa.attention(q, k, v, out=out, return_lse=True, **guarded)
    assert result is out
    assert np.array_equal(out, plain_out) and np.array_equal(lse, plain_lse)


@each_layout
@each_dtype
@each_axis
def test_sequence_tails(memory: GuardedMemory, layout: str, dtype: Any, axis: str) -> None:
    for seqlen_q, seqlen_k in TAILS:
        qkv = make(dtype, seqlen_q, seqlen_k, 24, 40)
        check(memory, LAYOUTS[layout], qkv, softmax_axis=axis)
        check(memory, LAYOUTS[layout], qkv, softmax_axis=axis, causal=True)


@each_layout
@each_dtype
@each_axis
def test_head_dim_tails(memory: GuardedMemory, layout: str, dtype: Any, axis: str) -> None:
    for head_dim, head_dim_v in HEAD_DIMS:
        check(memory, LAYOUTS[layout], make(dtype, 13, 70, head_dim, head_dim_v), softmax_axis=axis)


@each_layout
@each_dtype
@each_axis
def test_options(memory: GuardedMemory, layout: str, dtype: Any, axis: str) -> None:
    rng = np.random.default_rng(1)
    for seqlen_q, seqlen_k in TAILS:
        qkv = make(dtype, seqlen_q, seqlen_k, 24, 40)
        scores = (2, seqlen_q, seqlen_k)
        residual = rng.standard_normal((2, seqlen_q, 40)).astype(dtype)
        mask = rng.random(scores) < 0.7
        segments = (rng.integers(0, 2, seqlen_q), rng.integers(0, 2, seqlen_k))
        option_sets: list[dict[str, Any]] = [
            {"mask": mask},
            {"bias": rng.standard_normal(scores).astype(np.float32), "residual": residual},
            {"bias": rng.standard_normal(scores), "window": (30, 2)},
            {"segment_ids": segments, "mask": mask, "alibi_slopes": np.ones(2)},
            {"kv_lengths": np.array(seqlen_k // 2), "causal": True, "q_offset": 3},
        ]
        if axis == "keys":
            option_sets.append({"sinks": np.ones(2), "softcap": 2.0})
        for options in option_sets:
            check(memory, LAYOUTS[layout], qkv, softmax_axis=axis, **options)


@each_dtype
@each_axis
def test_broadcast_mask_and_bias(memory: GuardedMemory, dtype: Any, axis: str) -> None:
    """One row or one column that is repeated: a vector load of it may not reach further."""
    rng = np.random.default_rng(1)
    for seqlen_q, seqlen_k in TAILS:
        qkv = make(dtype, seqlen_q, seqlen_k, 24, 40)
        for shape in ((1, seqlen_k), (seqlen_q, 1), (1, 1)):
            bias = rng.standard_normal(shape)
            check(memory, GuardedMemory.copy, qkv, softmax_axis=axis, bias=bias)
            check(memory, GuardedMemory.copy, qkv, softmax_axis=axis, mask=bias < 1)


@each_dtype
@each_axis
def test_last_element_alone(memory: GuardedMemory, dtype: Any, axis: str) -> None:
    """Zero strides over a single element that touches the guard page."""
    one = memory.copy(np.ones(1, dtype))
    q = np.broadcast_to(one, (2, 70, 30))
    k = np.broadcast_to(one, (2, 90, 30))
    v = np.broadcast_to(one, (2, 90, 41))
    out, lse = fa.attention(q, k, v, softmax_axis=axis, return_lse=True)
    expected = fa.reference.attention(q, k, v, softmax_axis=axis, return_lse=True)
    np.testing.assert_allclose(out, expected[0], rtol=1e-5)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5)


@each_layout
@each_dtype
@each_axis
def test_weights(memory: GuardedMemory, layout: str, dtype: Any, axis: str) -> None:
    """Of all queries, chosen ones, pooled and summed."""
    rng = np.random.default_rng(1)
    place = LAYOUTS[layout]
    for seqlen_q, seqlen_k in TAILS:
        q, k, _ = make(dtype, seqlen_q, seqlen_k, 24, 1)
        bias = rng.standard_normal((2, seqlen_q, seqlen_k)).astype(np.float32)
        mask = rng.random((seqlen_q, seqlen_k)) < 0.7
        pool = (min(seqlen_q, 3), min(seqlen_k, 5))
        choices: list[dict[str, Any]] = [
            {},
            {"rows": [-1, 0], "heads": [1]},
            {"pool": pool},
            {"reduce": "keys"},
        ]
        for choice in choices:
            options = {"softmax_axis": axis, "causal": True, **choice}
            plain = fa.attention_weights(q, k, bias=bias, mask=mask, **options)
            guarded = fa.attention_weights(
                place(memory, q),
                place(memory, k),
                bias=place(memory, bias),
                mask=place(memory, mask),
                **options,
            )
            assert np.array_equal(guarded, plain)
