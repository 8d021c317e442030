"""attention_varlen: bit for bit one call per sequence."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn as fa

DTYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
once = pytest.mark.any_kernel_set

# Lengths of the queries and keys of each sequence: equal, ragged, empty, decoding beside prefill.
LENGTHS = {
    "one": ([5], [9]),
    "none": ([], []),
    "self-attention": ([3, 130, 1, 64], [3, 130, 1, 64]),
    "nothing at the ends": ([0, 7, 0, 3, 0], [0, 7, 5, 0, 0]),
    "all empty": ([0, 0, 0], [0, 0, 0]),
    "no keys": ([4, 5], [0, 0]),
    "no queries": ([0, 0], [4, 5]),
    "decoding": ([1, 1, 1, 1], [300, 1, 2100, 77]),
    "mixed": ([1, 200, 3, 25], [1500, 200, 40, 500]),
}
each_lengths = pytest.mark.parametrize("name", LENGTHS)


def starts_of(lengths: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def make(
    rng: np.random.Generator,
    lengths_q: Any,
    lengths_k: Any,
    dtype: Any = np.float32,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 24,
    head_dim_v: int = 40,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    total_q, total_k = int(np.sum(lengths_q)), int(np.sum(lengths_k))
    shapes = (
        (total_q, num_heads, head_dim),
        (total_k, num_kv_heads, head_dim),
        (total_k, num_kv_heads, head_dim_v),
    )
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return q, k, v


def one_by_one(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, q_starts: Any, k_starts: Any, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(total_q, num_heads, head_dim_v) and (num_heads, total_q) from a call for each sequence."""
    out = np.zeros((len(q), q.shape[1], v.shape[2]), q.dtype)
    lse = np.zeros((q.shape[1], len(q)), np.float64 if q.dtype == np.float64 else np.float32)
    for b in range(len(q_starts) - 1):
        rows, keys = (slice(*starts[b : b + 2]) for starts in (q_starts, k_starts))
        own = dict(options)
        if "q_offset" in own:
            own["q_offset"] = int(np.broadcast_to(own["q_offset"], len(q_starts) - 1)[b])
        if "residual" in own:
            own["residual"] = own["residual"][rows].swapaxes(0, 1)
        part, part_lse = fa.attention(
            *(x.swapaxes(0, 1) for x in (q[rows], k[keys], v[keys])), return_lse=True, **own
        )
        out[rows], lse[:, rows] = part.swapaxes(0, 1), part_lse
    return out, lse


def assert_same(got: Any, expected: Any) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(y).tobytes()


@each_dtype
@each_lengths
def test_one_call_per_sequence(rng: np.random.Generator, name: str, dtype: Any) -> None:
    lengths_q, lengths_k = LENGTHS[name]
    q_starts, k_starts = starts_of(lengths_q), starts_of(lengths_k)
    q, k, v = make(rng, lengths_q, lengths_k, dtype)
    residual = rng.standard_normal((len(q), 4, 40)).astype(dtype)
    option_sets: list[dict[str, Any]] = [
        {},
        {"causal": True},
        {"window": (30, 5), "softcap": 4.0, "scale": 0.4},
        {"causal": True, "alibi_slopes": rng.random(4), "sinks": rng.standard_normal(4)},
        {"causal": True, "q_offset": 3, "residual": residual},
        {"window": (9, None), "q_offset": rng.integers(-5, 50, len(lengths_q))},
    ]
    for options in option_sets:
        got = fa.attention_varlen(q, k, v, q_starts, k_starts, return_lse=True, **options)
        assert_same(got, one_by_one(q, k, v, q_starts, k_starts, **options))


def test_against_the_reference(rng: np.random.Generator) -> None:
    lengths_q, lengths_k = LENGTHS["mixed"]
    q_starts, k_starts = starts_of(lengths_q), starts_of(lengths_k)
    q, k, v = make(rng, lengths_q, lengths_k)
    out = fa.attention_varlen(q, k, v, q_starts, k_starts, causal=True)
    for b in range(len(lengths_q)):
        rows, keys = (slice(*starts[b : b + 2]) for starts in (q_starts, k_starts))
        parts = (x.swapaxes(0, 1) for x in (q[rows], k[keys], v[keys]))
        expected = fa.reference.attention(*parts, causal=True)
        np.testing.assert_allclose(out[rows].swapaxes(0, 1), expected, atol=2e-6)


def test_many_sequences(rng: np.random.Generator) -> None:
    lengths = rng.integers(0, 12, 1500)
    lengths[[7, 900]] = 400
    starts = starts_of(lengths)
    q, k, v = make(rng, lengths, lengths, head_dim=8, head_dim_v=8)
    got = fa.attention_varlen(q, k, v, starts, starts, causal=True, return_lse=True)
    assert_same(got, one_by_one(q, k, v, starts, starts, causal=True))


@each_lengths
@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (8, 8), (12, 3)], ids=str)
def test_threads_and_heads(rng: np.random.Generator, name: str, heads: tuple[int, int]) -> None:
    lengths_q, lengths_k = LENGTHS[name]
    starts = starts_of(lengths_q), starts_of(lengths_k)
    q, k, v = make(rng, lengths_q, lengths_k, np.float32, *heads, 64, 64)
    expected = one_by_one(q, k, v, *starts, causal=True, num_threads=1)
    for num_threads in (1, 2, 3, 7):
        got = fa.attention_varlen(
            q, k, v, *starts, causal=True, return_lse=True, num_threads=num_threads
        )
        assert_same(got, expected)


def test_strides(rng: np.random.Generator) -> None:
    lengths = [3, 70, 0, 20]
    starts = starts_of(lengths)
    plain = make(rng, lengths, lengths)
    whole = fa.attention_varlen(*plain, starts, starts, causal=True, return_lse=True)
    views = {
        "heads first": [x.swapaxes(0, 1).copy().swapaxes(0, 1) for x in plain],
        "features first": [x.T.copy().T for x in plain],
        "backwards": [x[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1] for x in plain],
        "every other": [np.repeat(x, 2, axis=0)[::2] for x in plain],
        "read-only": [np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape) for x in plain],
    }
    for view in views.values():
        got = fa.attention_varlen(*view, starts, starts, causal=True, return_lse=True)
        assert_same(got, whole)
    qkv = np.concatenate([plain[0][:, :2], plain[1], plain[2][..., :24]], axis=1)
    parts = (qkv[:, :2], qkv[:, 2:4], qkv[:, 4:])
    got = fa.attention_varlen(*parts, starts, starts, return_lse=True)
    assert_same(
        got, fa.attention_varlen(*(x.copy() for x in parts), starts, starts, return_lse=True)
    )


def test_out_and_residual(rng: np.random.Generator) -> None:
    lengths = [5, 0, 40]
    starts = starts_of(lengths)
    q, k, v = make(rng, lengths, lengths)
    residual = rng.standard_normal((45, 4, 40)).astype(np.float32)
    expected = fa.attention_varlen(q, k, v, starts, starts, residual=residual)
    assert expected.shape == (45, 4, 40) and expected.flags.c_contiguous
    for out in (
        np.full_like(expected, np.nan),
        np.full((4, 45, 40), np.nan, np.float32).swapaxes(0, 1),
    ):
        assert fa.attention_varlen(q, k, v, starts, starts, residual=residual, out=out) is out
        np.testing.assert_array_equal(out, expected)
    in_place = residual.copy()
    fa.attention_varlen(q, k, v, starts, starts, residual=in_place, out=in_place)
    np.testing.assert_array_equal(in_place, expected)


def test_sequences_do_not_see_each_other(rng: np.random.Generator) -> None:
    """NaN in one sequence leaves the others' bits alone."""
    lengths_q, lengths_k = LENGTHS["mixed"]
    starts = starts_of(lengths_q), starts_of(lengths_k)
    q, k, v = make(rng, lengths_q, lengths_k)
    clean = fa.attention_varlen(q, k, v, *starts)
    for x, its_starts in ((k, starts[1]), (v, starts[1]), (q, starts[0])):
        x[its_starts[1] : its_starts[2]] = np.nan
    dirty = fa.attention_varlen(q, k, v, *starts)
    others = np.r_[: starts[0][1], starts[0][2] : len(q)]
    assert dirty[others].tobytes() == clean[others].tobytes()
    assert np.isnan(dirty[starts[0][1] : starts[0][2]]).all()


@once
@pytest.mark.parametrize(
    ("starts", "error", "rule"),
    [
        ([0, 3, 9], ValueError, r"must end with the 10 rows of `{of}`, got 9"),
        ([0, 3, 11], ValueError, r"must end with the 10 rows of `{of}`, got 11"),
        ([0], ValueError, r"must end with the 10 rows of `{of}`, got 0"),
        ([1, 3, 10], ValueError, r"must begin with 0, got 1"),
        ([-1, 3, 10], ValueError, r"must begin with 0, got -1"),
        ([0, 7, 3, 10], ValueError, r"must not decrease, got 7 before 3"),
        ([0, 11, 10], ValueError, r"must not decrease, got 11 before 10"),
        ([0, -5, 10], ValueError, r"must not decrease, got 0 before -5"),
        (np.array([0, 2**64 - 1, 10], np.uint64), ValueError, r"must not decrease"),
        ([], TypeError, r"must be integers"),
        (np.zeros(0, np.int32), ValueError, r"must have shape \(num_sequences \+ 1,\)"),
        ([[0, 10]], ValueError, r"must have shape \(num_sequences \+ 1,\)"),
        (10, ValueError, r"must have shape \(num_sequences \+ 1,\)"),
        ([0.0, 10.0], TypeError, r"must be integers of at most 64 bits, got float64"),
        ([False, True], TypeError, r"must be integers of at most 64 bits, got bool"),
        (None, TypeError, r"must be integers of at most 64 bits, got NoneType"),
        (["0", "10"], TypeError, r"must be integers of at most 64 bits"),
    ],
    ids=str,
)
def test_bad_starts(starts: Any, error: type[Exception], rule: str) -> None:
    q = k = v = np.zeros((10, 2, 4), np.float32)
    good = [0, 4, 10]
    for name, of, call in (
        ("cu_seqlens_q", "q", lambda: fa.attention_varlen(q, k, v, starts, good)),
        ("cu_seqlens_k", "k", lambda: fa.attention_varlen(q, k, v, good, starts)),
    ):
        with pytest.raises(error, match=f"`{name}` {rule.format(of=of)}"):
            call()


@once
def test_other_errors() -> None:
    q = k = v = np.zeros((10, 2, 4), np.float32)
    starts = [0, 4, 10]
    with pytest.raises(ValueError, match="`cu_seqlens_k` must have 3 entries like `cu_seqlens_q`"):
        fa.attention_varlen(q, k, v, starts, [0, 10])
    with pytest.raises(ValueError, match=r"`k` must have 3 dimensions, .*, got shape"):
        fa.attention_varlen(q, k[0], v, starts, starts)
    with pytest.raises(ValueError, match="`v` must have seqlen_k 10 like `k`, got 9"):
        fa.attention_varlen(q, k, v[:9], starts, starts)
    with pytest.raises(ValueError, match="`out` must have the result's shape"):
        fa.attention_varlen(q, k, v, starts, starts, out=np.zeros((2, 10, 4), np.float32))
    with pytest.raises(ValueError, match="`alibi_slopes` must have one dimension"):
        fa.attention_varlen(q, k, v, starts, starts, alibi_slopes=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="`q_offset` must broadcast to"):
        fa.attention_varlen(q, k, v, starts, starts, q_offset=[1, 2, 3])
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        fa.attention_varlen(q, k, v, starts, starts, mask=None)


@once
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint64, np.int64], ids=str)
def test_any_integers_are_starts(rng: np.random.Generator, dtype: Any) -> None:
    q, k, v = make(rng, [4, 6], [4, 6])
    expected = fa.attention_varlen(q, k, v, [0, 4, 10], [0, 4, 10])
    starts = np.repeat(np.array([0, 4, 10], dtype), 2)[::2]  # not contiguous
    np.testing.assert_array_equal(fa.attention_varlen(q, k, v, starts, starts), expected)
