"""fastattn.attention_weights against the specification; its bits, ranges and errors."""

import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gauge import MAX_GAUGE, weights_gauge
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import fastattn as fa

EXAMPLES = int(os.environ.get("FASTATTN_EXAMPLES", "0"))

F32 = np.float32
DTYPES = [np.float32, np.float64]
# (seqlen_q, seqlen_k, head_dim): keys of several splits, one query, and less than a register tile.
SHAPES = [(70, 300, 16), (1, 2100, 64), (130, 33, 40), (3, 2, 5)]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_axis = pytest.mark.parametrize("axis", ["keys", "queries"])

TOLERANCE = {"float32": 1e-6, "float64": 1e-14}
# That of float64 is measured against the reference, which is float64 as well: the errors of both.
MAX_GAUGES = {"float32": MAX_GAUGE, "float64": 8.0}

# What is made of the weights; the sizes of SHAPES allow all of it.
CHOICES: dict[str, dict[str, Any]] = {
    "all": {},
    "rows and heads": {"rows": [-1, 0, 0], "heads": [3, 0]},
    "every other row": {"rows": slice(None, None, -2), "heads": slice(1, None)},
    "pool": {"pool": (1, 2)},
    "reduce": {"reduce": "keys"},
    "pooled rows": {"rows": slice(-1, None), "pool": (1, 1), "heads": [2]},
    "reduced rows": {"rows": [-1, 0], "reduce": "keys"},
}


def make(
    shape: tuple[int, int, int], dtype: Any = F32, num_heads: int = 4, num_kv_heads: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    seqlen_q, seqlen_k, head_dim = shape
    rng = np.random.default_rng(sum(shape))
    q = rng.standard_normal((2, num_heads, seqlen_q, head_dim))
    k = rng.standard_normal((2, num_kv_heads, seqlen_k, head_dim))
    return (2 * q).astype(dtype), k.astype(dtype)


def option_sets(shape: tuple[int, int, int], axis: str) -> dict[str, dict[str, Any]]:
    """Each option that shapes weights, alone or with others, for the arrays of `make`."""
    seqlen_q, seqlen_k, _ = shape
    rng = np.random.default_rng(1)
    scores = (2, 4, seqlen_q, seqlen_k)
    sets = {
        "plain": {},
        "scale and softcap": {"scale": 0.7, "softcap": 2.0},
        "bias": {"bias": rng.standard_normal(scores).astype(F32)},
        "mask": {"mask": rng.random(scores) < 0.5},
        "causal": {"causal": True},
        "causal from the top": {"causal": True, "q_offset": 0},
        "window and alibi": {"window": (40, 3), "alibi_slopes": rng.random((2, 4))},
        "lengths": {"kv_lengths": [seqlen_k // 2, 0], "causal": True},
        "segments": {"segment_ids": (np.arange(seqlen_q) // 3, np.arange(seqlen_k) // 3)},
    }
    if axis == "keys":
        sets["sinks"] = {"sinks": np.array([0.0, 3.0, -np.inf, 200.0])}
    return sets


def check(q: np.ndarray, k: np.ndarray, tolerance: float, **arguments: Any) -> None:
    """Against the specification: as close to a weight, or to so many of them as were summed."""
    weights = fa.attention_weights(q, k, **arguments)
    expected = fa.reference.attention_weights(q, k, **arguments)
    assert weights.shape == expected.shape
    assert weights.dtype == (np.float64 if q.dtype == np.float64 else np.float32)
    assert_allclose(weights, expected, rtol=tolerance, atol=tolerance)


# --- against the specification ----------------------------------------------------------------


@each_shape
@each_dtype
@each_axis
def test_options(shape: Any, dtype: Any, axis: str) -> None:
    q, k = make(shape, dtype)
    for options in option_sets(shape, axis).values():
        for choice in CHOICES.values():
            tolerance = TOLERANCE[np.dtype(dtype).name]
            check(q, k, tolerance, softmax_axis=axis, **options, **choice)


@each_shape
@each_dtype
@each_axis
def test_relative_accuracy(shape: Any, dtype: Any, axis: str) -> None:
    """Each weight is as close to the specification, however small it is, as its score allows."""
    q, k = make(shape, dtype)
    for name, options in option_sets(shape, axis).items():
        options = {**options, "softmax_axis": axis}
        weights = fa.attention_weights(q, k, **options)
        expected = fa.reference.attention_weights(q, k, **options)
        gauge = weights_gauge(weights, expected, q, k, **_gauge_options(options))
        assert gauge <= MAX_GAUGES[np.dtype(dtype).name], (name, gauge)


def _gauge_options(options: dict[str, Any]) -> dict[str, Any]:
    lengths = options.get("kv_lengths")
    return options if lengths is None else {**options, "kv_lengths": np.array(lengths)}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_16_bit(dtype: Any) -> None:
    """Computed in float32 from the widened elements, and not rounded to 16 bits."""
    for shape in SHAPES:
        q, k = make(shape, dtype)
        wide = q.astype(F32), k.astype(F32)
        for choice in CHOICES.values():
            weights = fa.attention_weights(q, k, causal=True, **choice)
            expected = fa.reference.attention_weights(*wide, causal=True, **choice)
            assert weights.dtype == np.float32
            assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pool", [(1, 1), (7, 5), (100, 3), (3, 100), (211, 401), (2, 401)])
@pytest.mark.parametrize("rows", [None, slice(10, 210, 3)], ids=["all", "some"])
def test_blocks_that_do_not_divide(pool: tuple[int, int], rows: Any) -> None:
    q, k = make((211, 401, 8))
    r, c = pool
    if rows is not None:
        r = min(r, 67)
    check(q, k, 1e-6, rows=rows, pool=(r, c))
    weights = fa.attention_weights(q, k, rows=rows)
    n = weights.shape[-2]
    pooled = fa.attention_weights(q, k, rows=rows, pool=(r, c))
    i, j = r // 2, c - 1
    block = weights[..., i * n // r : (i + 1) * n // r, j * 401 // c : (j + 1) * 401 // c]
    assert_allclose(pooled[..., i, j], block.mean((-2, -1), np.float64), rtol=1e-6)


def test_a_block_for_each_weight_is_the_weights() -> None:
    q, k = make((50, 70, 16))
    assert_array_equal(
        fa.attention_weights(q, k, pool=(50, 70)), fa.attention_weights(q, k), strict=True
    )


@each_dtype
@each_axis
def test_rows_shared_by_tasks(dtype: Any, axis: str) -> None:
    """So many queries to a row of the result that several tasks sum them."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 2, 2000, 4)).astype(dtype)
    k = rng.standard_normal((1, 2, 150, 4)).astype(dtype)
    tolerance = 2 * TOLERANCE[np.dtype(dtype).name]
    for choice in ({"pool": (1, 1)}, {"pool": (3, 7)}, {"reduce": "keys"}):
        check(q, k, tolerance, softmax_axis=axis, **choice)
        check(q, k, tolerance, softmax_axis=axis, causal=True, **choice)


def test_many_sums() -> None:
    """32768 weights to a sum, each of them small."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((n, 4), dtype=F32) for n in (32768, 300))
    sums = fa.attention_weights(q, k, reduce="keys")
    assert_allclose(sums, fa.reference.attention_weights(q, k, reduce="keys"), rtol=2e-7)
    assert_allclose(sums.sum(dtype=np.float64), 32768, rtol=1e-7)


def test_weights_times_values_are_attention() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 4, 90, 32), dtype=F32)
    options = {"causal": True, "softcap": 3.0, "sinks": np.ones(4)}
    out = fa.attention_weights(q, k, **options) @ v
    assert_allclose(out, fa.attention(q, k, v, **options), rtol=1e-5, atol=1e-6)


LENGTHS = st.one_of(st.integers(1, 12), st.sampled_from([23, 24, 25, 64, 65, 129, 193, 520]))


@pytest.mark.slow_on_other_sets
@settings(
    max_examples=EXAMPLES or 60,
    derandomize=EXAMPLES == 0,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.data())
def test_random_calls(data: st.DataObject) -> None:
    """Shapes, options and choices of any kind together."""
    draw = data.draw
    seqlen_q, seqlen_k, head_dim = draw(LENGTHS), draw(LENGTHS), draw(st.integers(0, 20))
    axis, dtype = draw(st.sampled_from(["keys", "queries"])), draw(st.sampled_from(DTYPES))
    q, k = make((seqlen_q, seqlen_k, head_dim), dtype)
    arguments: dict[str, Any] = {"softmax_axis": axis}
    sets = option_sets((seqlen_q, seqlen_k, head_dim), axis)
    for name in draw(st.sets(st.sampled_from(sorted(sets)), max_size=3)):
        arguments |= sets[name]
    num_rows = seqlen_q
    if draw(st.booleans()):
        rows = sorted(draw(st.lists(st.integers(-seqlen_q, seqlen_q - 1), min_size=1, max_size=9)))
        arguments["rows"] = np.sort(np.array(rows) % seqlen_q)
        num_rows = len(rows)
    if draw(st.booleans()):
        arguments["heads"] = draw(st.lists(st.integers(-4, 3), max_size=5))
        if not arguments["heads"]:
            arguments["heads"] = slice(0, 0)
    form = draw(st.sampled_from(["each", "pool", "reduce"]))
    if form == "pool":
        arguments["pool"] = draw(st.integers(1, num_rows)), draw(st.integers(1, seqlen_k))
    elif form == "reduce":
        arguments["reduce"] = "keys"
    note(f"{q.shape} {k.shape} {dtype.__name__} {arguments}")
    check(q, k, 3 * TOLERANCE[np.dtype(dtype).name], **arguments)


# --- shapes and choices -----------------------------------------------------------------------


def test_shapes() -> None:
    x = np.zeros((5, 8), F32)
    many = np.zeros((3, 6, 5, 8), F32)
    assert fa.attention_weights(x, x[:4]).shape == (5, 4)
    assert fa.attention_weights(x, x[:4], pool=(2, 3)).shape == (2, 3)
    assert fa.attention_weights(x, x[:4], reduce="keys").shape == (4,)
    assert fa.attention_weights(many, x).shape == (3, 6, 5, 5)
    assert fa.attention_weights(x, many[:, :1]).shape == (3, 1, 5, 5)
    assert fa.attention_weights(many, many[:1, :2], heads=[4], rows=[0, 2]).shape == (3, 1, 2, 5)
    assert fa.attention_weights(many, many, heads=slice(2), pool=(1, 2)).shape == (3, 2, 1, 2)
    assert fa.attention_weights(many, many, reduce="keys").shape == (3, 6, 5)


def test_empty_results() -> None:
    x = np.zeros((2, 5, 8), F32)
    assert fa.attention_weights(x, x, rows=[]).shape == (2, 0, 5)
    assert fa.attention_weights(x, x, heads=[]).shape == (0, 5, 5)
    assert fa.attention_weights(x, x[:, :0]).shape == (2, 5, 0)
    assert fa.attention_weights(x[:0], x[:0], reduce="keys").shape == (0, 5)
    assert_array_equal(fa.attention_weights(x, x, rows=[], reduce="keys"), np.zeros((2, 5)))
    assert_array_equal(fa.attention_weights(x[:, :0], x, reduce="keys"), np.zeros((2, 5)))
    huge = np.lib.stride_tricks.as_strided(x, (2, 2**40, 8), (0, 0, 4))
    assert fa.attention_weights(huge, huge, rows=[]).shape == (2, 0, 2**40)


@each_axis
def test_nothing_left_weighs_nothing(axis: str) -> None:
    q, k = make((60, 50, 8))
    for choice in CHOICES.values():
        nothing = fa.attention_weights(q, k, mask=False, softmax_axis=axis, **choice)
        assert_array_equal(nothing, np.zeros_like(nothing))


def test_order_of_rows() -> None:
    q, k = make((60, 50, 8))
    weights = fa.attention_weights(q, k, causal=True)
    for rows in ([5, 3, 59, 3], [-1, -60, 7], np.arange(60)[::-1], np.array([9], np.uint8)):
        chosen = fa.attention_weights(q, k, causal=True, rows=rows)
        assert_array_equal(chosen, weights[..., rows, :], strict=True)


# --- bits -------------------------------------------------------------------------------------


@each_dtype
@each_axis
def test_bits(dtype: Any, axis: str) -> None:
    """Threads, strides, batches, heads that share keys, and a choice of rows and heads leave no
    trace."""
    for shape in [(300, 500, 32), (5, 700, 64)]:
        q, k = make(shape, dtype)
        for name, options in option_sets(shape, axis).items():
            options = {**options, "softmax_axis": axis}
            for choice in ({}, {"pool": (2, 9)}, {"reduce": "keys"}):
                call = {**options, **choice}
                once = fa.attention_weights(q, k, num_threads=1, **call)
                assert once.tobytes() == fa.attention_weights(q, k, num_threads=3, **call).tobytes()
                view_q = q.swapaxes(1, 2).copy().swapaxes(1, 2)
                view_k = np.repeat(k, 2, -1)[..., ::2]
                assert once.tobytes() == fa.attention_weights(view_q, view_k, **call).tobytes()
                repeated = fa.attention_weights(q, np.repeat(k, 2, axis=1), **call)
                assert once.tobytes() == repeated.tobytes()
                heads = fa.attention_weights(q, k, heads=[2, -1], **call)
                assert once[:, [2, -1]].tobytes() == heads.tobytes()
                if name in ("plain", "causal"):
                    alone = fa.attention_weights(q[1], k[1], **call)
                    assert once[1].tobytes() == alone.tobytes()
            rows = [0, 4, shape[0] - 1]
            some = fa.attention_weights(q, k, rows=rows, **options)
            every = fa.attention_weights(q, k, **options)
            assert every[..., rows, :].tobytes() == some.tobytes()


def test_bits_of_shared_rows() -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, n, 8), dtype=F32) for n in (2500, 400))
    for choice in ({"pool": (2, 3)}, {"pool": (1, 400)}, {"reduce": "keys"}):
        once = fa.attention_weights(q, k, num_threads=1, **choice)
        for num_threads in (2, 5):
            again = fa.attention_weights(q, k, num_threads=num_threads, **choice)
            assert once.tobytes() == again.tobytes()
        assert fa.attention_weights(q[1], k[1], **choice).tobytes() == once[1].tobytes()


# --- ranges -----------------------------------------------------------------------------------


@each_dtype
@each_axis
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_large_scores(dtype: Any, axis: str, size: float) -> None:
    """lse of the results' dtype would miss the weights by u |lse|; shared parts cost nothing."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, n, 16)).astype(dtype) for n in (100, 400))
    options: dict[str, Any] = {"softmax_axis": axis}
    for value in (size, -size):
        # The same for all keys: what is left of the scores is exact.
        bias = np.full((100, 400), value, F32)
        weights = fa.attention_weights(0 * q, 0 * k, bias=bias, **options)
        assert_allclose(weights, 1 / (400 if axis == "keys" else 100), rtol=1e-6)
    scale = size / 16
    weights = fa.attention_weights(q, k, scale=scale, **options)
    expected = fa.reference.attention_weights(q, k, scale=scale, **options)
    gauge = weights_gauge(weights, expected, q, k, scale=scale, **options)
    assert gauge <= MAX_GAUGES[np.dtype(dtype).name]


@each_dtype
@each_axis
def test_rows_of_the_lowest_number(dtype: Any, axis: str) -> None:
    """Models mask with finfo.min: a row of nothing else is an average."""
    q, k = make((40, 300, 16), dtype)
    bias = np.zeros((40, 300), dtype)
    bias[:, 100:] = np.finfo(dtype).min
    bias[7] = np.finfo(dtype).min
    for choice in ({}, {"pool": (4, 3)}, {"reduce": "keys"}):
        check(q, k, TOLERANCE[np.dtype(dtype).name], bias=bias, softmax_axis=axis, **choice)


RANGES: dict[str, dict[str, Any]] = {
    "scale": {"scale": 1e39},
    "small scale": {"scale": 1e-60},
    "bias": {"bias": np.linspace(-1e300, 1e300, 90)},
    "bias beside scores": {"bias": np.linspace(3e6, 3e6 + 8, 90)},
    "alibi": {"alibi_slopes": [1e39]},
    "softcap": {"softcap": 1e39},
}


@each_axis
@pytest.mark.parametrize("name", RANGES)
def test_options_of_any_size(name: str, axis: str) -> None:
    q, k = make((400, 90, 16), num_heads=1, num_kv_heads=1)
    for choice in ({}, {"rows": [3, 399]}, {"pool": (3, 4)}, {"reduce": "keys"}):
        weights = fa.attention_weights(q, k, softmax_axis=axis, **RANGES[name], **choice)
        expected = fa.reference.attention_weights(q, k, softmax_axis=axis, **RANGES[name], **choice)
        assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)


@each_axis
def test_rows_that_leave_the_range(axis: str) -> None:
    """Products beyond float32 are the reference's, and the others keep their bits."""
    q, k = make((700, 200, 16))
    large_q = q.copy()
    large_q[0, 1, 333] = 1e38
    for choice in ({}, {"rows": [5, 333]}, {"pool": (1, 9)}, {"pool": (50, 9)}, {"reduce": "keys"}):
        check(large_q, k, 1e-6, softmax_axis=axis, causal=True, q_offset=-300, **choice)
    weights = fa.attention_weights(q, k, softmax_axis=axis)
    large = fa.attention_weights(large_q, k, softmax_axis=axis)
    others = np.arange(700) != 333
    assert large[1].tobytes() == weights[1].tobytes()
    if axis == "keys":
        assert large[0][:, others].tobytes() == weights[0][:, others].tobytes()
    large_k = k.copy()
    large_k[0, 1, 55] = 1e38
    check(large_q, large_k, 1e-6, softmax_axis=axis)
    check(large_q, large_k, 1e-6, softmax_axis=axis, pool=(7, 3))
    large = fa.attention_weights(q, large_k, softmax_axis=axis)
    if axis == "queries":
        others = np.arange(200) != 55
        assert large[0][..., others].tobytes() == weights[0][..., others].tobytes()


@each_dtype
@each_axis
def test_nan_and_infinity(dtype: Any, axis: str) -> None:
    """They spoil the softmax that they are part of, and only what takes part in it."""
    q, k = make((60, 150, 8), dtype)
    q[0, 1, 20], q[0, 2, 21], k[1, 0, 30], k[1, 1, 140] = np.nan, np.inf, np.nan, -np.inf
    for options in ({}, {"causal": True}, {"mask": np.arange(150) % 3 > 0}):
        for choice in ({}, {"rows": [19, 20]}, {"pool": (6, 10)}, {"reduce": "keys"}):
            call = {"softmax_axis": axis, **options, **choice}
            weights = fa.attention_weights(q, k, **call)
            expected = fa.reference.attention_weights(q, k, **call)
            assert_array_equal(np.isnan(weights), np.isnan(expected))
            assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)


@each_axis
def test_what_takes_no_part_changes_nothing(axis: str) -> None:
    q, k = make((60, 150, 8))
    for value in (np.nan, np.inf, 1e38):
        spoilt = k.copy()
        spoilt[:, :, 100:] = value
        for choice in ({}, {"pool": (6, 10)}, {"reduce": "keys"}):
            call = {"kv_lengths": 100, "softmax_axis": axis, **choice}
            expected = fa.attention_weights(q, k, **call)
            assert fa.attention_weights(q, spoilt, **call).tobytes() == expected.tobytes()


# --- errors -----------------------------------------------------------------------------------

ERRORS = [
    (ValueError, "rows", {"rows": "all"}),
    (TypeError, "rows", {"rows": [0.0]}),
    (TypeError, "rows", {"rows": np.ones(6, bool)}),
    (TypeError, "rows", {"rows": slice("a", None)}),
    (ValueError, "rows", {"rows": slice(0, 3, 0)}),
    (ValueError, "rows", {"rows": 3}),
    (ValueError, "rows", {"rows": [[0, 1]]}),
    (ValueError, "rows", {"rows": [0, 6]}),
    (ValueError, "rows", {"rows": [-7]}),
    (ValueError, "rows", {"rows": [3, 2], "pool": (1, 1)}),
    (ValueError, "rows", {"rows": np.array([2**64 - 1], np.uint64)}),
    (ValueError, "heads", {"heads": [4]}),
    (TypeError, "pool", {"pool": 3}),
    (TypeError, "pool", {"pool": (1.5, 1)}),
    (ValueError, "pool", {"pool": (1, 1, 1)}),
    (ValueError, "pool", {"pool": (0, 1)}),
    (ValueError, "pool", {"pool": (7, 1)}),
    (ValueError, "pool", {"pool": (1, 9)}),
    (ValueError, "pool", {"pool": (3, 1), "rows": [0, 1]}),
    (TypeError, "reduce", {"reduce": True}),
    (ValueError, "reduce", {"reduce": "queries"}),
    (ValueError, "reduce", {"reduce": "keys", "pool": (1, 1)}),
    (ValueError, "k", {"k": np.zeros((2, 4, 8, 9), F32)}),
    (ValueError, "k", {"k": np.float32(1)}),
    (TypeError, "k", {"k": np.zeros((2, 4, 8, 8))}),
    (ValueError, "sinks", {"sinks": np.zeros(4), "softmax_axis": "queries"}),
    (ValueError, "bias", {"bias": np.zeros((5, 5))}),
    (ValueError, "num_threads", {"num_threads": 0}),
]


@pytest.mark.any_kernel_set
@pytest.mark.parametrize(
    ("error", "name", "changed"), ERRORS, ids=[f"{e[1]}-{i}" for i, e in enumerate(ERRORS)]
)
def test_errors_name_the_argument(error: type[Exception], name: str, changed: Any) -> None:
    arguments = {"q": np.zeros((2, 4, 6, 8), F32), "k": np.zeros((2, 4, 8, 8), F32)}
    with pytest.raises(error, match=f"^`{name}` must "):
        fa.attention_weights(**{**arguments, **changed})


@pytest.mark.any_kernel_set
def test_other_errors() -> None:
    x = np.zeros((5, 8), F32)
    with pytest.raises(ValueError, match=r"^`heads` must be None where `q` and `k` are 2-D"):
        fa.attention_weights(x, x, heads=[0])
    with pytest.raises(TypeError, match="dropout_p"):
        fa.attention_weights(x, x, dropout_p=0.5)  # type: ignore[call-arg]
    huge = np.lib.stride_tricks.as_strided(x, (2**50, 8), (0, 4))
    with pytest.raises(MemoryError):
        fa.attention_weights(huge, huge)
