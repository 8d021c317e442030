"""What the numbers promise (design, section 4), measured with fastattn._gauge."""

from typing import Any

import numpy as np
import pytest
from gauge import (
    MAX_GAUGE,
    MAX_GAUGE_BEYOND,
    MAX_ONE_SIGN_GAUGE,
    MAX_QUERIES_GAUGE,
    naive_attention,
)

import fastattn as fa
from fastattn._gauge import Exact, lse_gauge, out_gauge

NUM_CONFIGS = 200
CONFIGS_PER_TEST = 20

# The promise of 5 is for float32; naive float64 attention itself measures up to 5.1 here.
MAX_GAUGE_FLOAT64 = 8.0


def random_call(rng: np.random.Generator, dtype: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Arrays and options of one call: sizes up to 150, any option, logits up to 1e3."""
    batch = [(), (2,)][rng.integers(2)]
    num_kv_heads = int(rng.integers(1, 3))
    num_heads = num_kv_heads * int(rng.integers(1, 3))
    seqlen_q, seqlen_k = (int(x) for x in rng.integers(1, 150, 2))
    head_dim, head_dim_v = (int(x) for x in rng.choice([1, 4, 8, 17, 40, 64, 96], 2))
    axis = "queries" if rng.random() < 0.25 else "keys"

    # Entries of either sign throughout.  Near-uniform weights over values of one sign measure up to
    # 10 (naive float32 does, too); test_entries_of_one_sign and test_long_rows_of_like_terms have
    # such values.
    def draw(*shape: int) -> np.ndarray:
        return (rng.choice([1, 4]) * rng.standard_normal(shape)).astype(dtype)

    q = draw(*batch, num_heads, seqlen_q, head_dim)
    k = draw(*batch, num_kv_heads, seqlen_k, head_dim)
    v = draw(*batch, num_kv_heads, seqlen_k, head_dim_v)
    options: dict[str, Any] = {"softmax_axis": axis}

    def chosen(probability: float = 0.25) -> bool:
        return bool(rng.random() < probability)

    largest_logit = 10.0 ** rng.uniform(-1, 3)
    heads = num_heads // num_kv_heads
    scores = np.matmul(
        q.astype(np.float64), np.swapaxes(np.repeat(k.astype(np.float64), heads, -3), -1, -2)
    )
    if chosen(0.7):
        sign = -1 if chosen(0.2) else 1
        options["scale"] = sign * largest_logit / max(float(np.abs(scores).max()), 1e-6)
    if chosen():
        options["softcap"] = 10.0 ** rng.uniform(-1, 3)
    if chosen():
        shape = [(num_heads, seqlen_q, seqlen_k), (1, seqlen_k), (seqlen_q, 1)][rng.integers(3)]
        bias = 10.0 ** rng.uniform(-1, 2.5) * rng.standard_normal(shape)
        options["bias"] = bias.astype([np.float32, np.float64][rng.integers(2)])
    if chosen():
        options["alibi_slopes"] = rng.random(num_heads)
    if chosen():
        shape = [(num_heads, seqlen_q, seqlen_k), (1, seqlen_k), (seqlen_q, 1)][rng.integers(3)]
        options["mask"] = rng.random(shape) < 0.8
    if chosen():
        options["causal"] = True
    if chosen():
        sides = [None, 0, 3, 17, 70]
        options["window"] = (sides[rng.integers(5)], sides[rng.integers(5)])
    if chosen():
        options["q_offset"] = int(rng.integers(-5, seqlen_k))
    if chosen():
        options["kv_lengths"] = rng.integers(0, seqlen_k + 1, batch)
    if chosen():
        options["segment_ids"] = (
            np.sort(rng.integers(0, 3, (*batch, seqlen_q))),
            np.sort(rng.integers(0, 3, (*batch, seqlen_k))),
        )
    if chosen() and axis == "keys":
        options["sinks"] = rng.standard_normal(num_heads) * 10.0 ** rng.uniform(-1, 2)
    if chosen():
        options["residual"] = draw(*batch, num_heads, seqlen_q, head_dim_v)
    return [q, k, v], options


def _named(options: dict[str, Any]) -> str:
    shown = {
        name: getattr(x, "shape", x) if name != "segment_ids" else "" for name, x in options.items()
    }
    return str(shown)


@pytest.mark.parametrize("first", range(0, NUM_CONFIGS, CONFIGS_PER_TEST))
def test_float32_gauge(first: int) -> None:
    for seed in range(first, first + CONFIGS_PER_TEST):
        qkv, options = random_call(np.random.default_rng(seed), np.float32)
        exact = naive_attention(*qkv, **options)
        out, lse = fa.attention(*qkv, return_lse=True, **options)
        where = f"seed {seed}, {[x.shape for x in qkv]}, {_named(options)}"
        assert out_gauge(out, exact) <= MAX_GAUGE, where
        assert lse_gauge(lse, exact) <= MAX_GAUGE, where


@pytest.mark.parametrize("first", range(0, NUM_CONFIGS, CONFIGS_PER_TEST))
def test_gauge_beside_naive(first: int) -> None:
    """Over any options, the largest gauge of a bundle is at most twice naive float32's.

    The largest of a few thousand errors is luck, for the naive computation as for ours: only
    bundles compare.
    """
    largest, largest_naive = 0.0, 0.0
    for seed in range(first, first + CONFIGS_PER_TEST):
        qkv, options = random_call(np.random.default_rng(seed), np.float32)
        exact = naive_attention(*qkv, **options)
        naive = naive_attention(*qkv, dtype=np.float32, **options)
        largest = max(largest, out_gauge(fa.attention(*qkv, **options), exact))
        largest_naive = max(largest_naive, out_gauge(naive.out, exact))
    assert largest <= 2 * largest_naive


WORKLOADS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "softcap": {"softcap": 20.0},
    "bias": {"bias": True},
    "window": {"window": (100, 100)},
    "queries": {"softmax_axis": "queries"},
}


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("size", [1.0, 4.0])
def test_error_beside_naive(size: float, head_dim: int, name: str) -> None:
    """Where there is much to compute, the largest error is at most twice naive float32's, give or
    take two roundings of 0.3 + |O| (the rule and the floor of FlashAttention's own tests)."""
    rng = np.random.default_rng(0)
    q = (size * rng.standard_normal((2, 300, head_dim))).astype(np.float32)
    k, v = (rng.standard_normal((2, 700, head_dim)).astype(np.float32) for _ in range(2))
    options = dict(WORKLOADS[name])
    if "bias" in options:
        options["bias"] = rng.standard_normal((300, 700)).astype(np.float32)
    exact = naive_attention(q, k, v, **options)
    naive = naive_attention(q, k, v, dtype=np.float32, **options)
    error = _max_error(fa.attention(q, k, v, **options), exact)
    assert error <= 2 * _max_error(naive.out, exact) + 2 * _floor(exact)


def _floor(exact: Exact) -> float:
    shift = np.float32(0.3)
    return float(np.abs(exact.out.astype(np.float32) + shift - shift - exact.out).max(initial=0))


def _max_error(out: np.ndarray, exact: Exact) -> float:
    return float(np.abs(out - exact.out).max(initial=0))


@pytest.mark.parametrize("first", range(0, NUM_CONFIGS // 4, CONFIGS_PER_TEST // 2))
def test_float64_gauge(first: int) -> None:
    for seed in range(first, first + CONFIGS_PER_TEST // 2):
        qkv, options = random_call(np.random.default_rng(seed), np.float64)
        exact = naive_attention(*qkv, dtype=np.longdouble, **options)
        out, lse = fa.attention(*qkv, return_lse=True, **options)
        where = f"seed {seed}, {[x.shape for x in qkv]}, {_named(options)}"
        assert out_gauge(out, exact) <= MAX_GAUGE_FLOAT64, where
        assert lse_gauge(lse, exact) <= MAX_GAUGE_FLOAT64, where


@pytest.mark.slow_on_other_sets
@pytest.mark.parametrize("size", [1.0, 4.0, 30.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_long_rows(dtype: Any, size: float) -> None:
    """The error does not grow with the number of keys, neither by the gauge nor beside naive."""
    rng = np.random.default_rng(0)
    q = (size * rng.standard_normal((1, 30, 64))).astype(dtype)
    k, v = (rng.standard_normal((1, 5000, 64)).astype(dtype) for _ in range(2))
    wider = np.float64 if dtype is np.float32 else np.longdouble
    exact = naive_attention(q, k, v, dtype=wider)
    naive = naive_attention(q, k, v, dtype=dtype)
    out, lse = fa.attention(q, k, v, return_lse=True)
    assert out_gauge(out, exact) <= MAX_GAUGE
    assert lse_gauge(lse, exact) <= MAX_GAUGE
    assert _max_error(out, exact) <= 2 * _max_error(naive.out, exact) + 2 * _floor(exact)


@pytest.mark.parametrize("seqlen_k", [100, 1000, 8000])
@pytest.mark.parametrize("size", [0.0, 0.05, 1.0])
def test_long_rows_of_like_terms(size: float, seqlen_k: int) -> None:
    """Near-uniform weights over values of one sign: every rounding of the sum counts."""
    rng = np.random.default_rng(0)
    q = (size * rng.standard_normal((1, 30, 64))).astype(np.float32)
    k = rng.standard_normal((1, seqlen_k, 64)).astype(np.float32)
    for v in (rng.random((1, seqlen_k, 64)), np.full((1, seqlen_k, 8), 0.1)):
        qkv = (q, k, v.astype(np.float32))
        exact = naive_attention(*qkv)
        naive = naive_attention(*qkv, dtype=np.float32)
        out, lse = fa.attention(*qkv, return_lse=True)
        assert _max_error(out, exact) <= 2 * _max_error(naive.out, exact) + 2 * _floor(exact)
        assert lse_gauge(lse, exact) <= MAX_GAUGE


def _entries(kind: str, rng: np.random.Generator, *shape: int) -> np.ndarray:
    if kind == "uniform":
        return 8 * rng.random(shape)
    if kind == "equal":  # but for one key in two, so that rounding q k^T cannot cancel
        x = np.full(shape, 1.3)
        x[..., ::2, :] *= 1.01
        return x
    return 5 + rng.standard_normal(shape)


# lse shows the error of the scores themselves.  Of equal entries, whose products are all rounded
# alike, chains of 64 multiply-adds make up to 6.6 units to head_dim 1024 and 9.2 beyond.
MAX_LSE_GAUGE = 7.0
MAX_LSE_GAUGE_BEYOND = 10.0


@pytest.mark.slow_on_other_sets
@pytest.mark.parametrize("kind", ["uniform", "equal", "shifted"])
@pytest.mark.parametrize("head_dim", [8, 64, 100, 128, 192, 256, 512, 768, 1024, 2048, 4096])
def test_entries_of_one_sign(head_dim: int, kind: str) -> None:
    """What is rounded in one direction: one chain of multiply-adds over head_dim would measure 24
    at 768.  One query and many, with softcap and without, values of one sign, too.

    Beside naive float32 where there are errors enough to compare.  BLAS sums a single query's
    products in more and shorter chains than 64.
    """
    rng = np.random.default_rng(head_dim)
    short = head_dim <= 1024
    for seqlen_q in (1, 3, 40):
        for softcap in (None, 30.0):
            q, k = (_entries(kind, rng, 8, n, head_dim).astype(np.float32) for n in (seqlen_q, 150))
            v = _entries(kind, rng, 8, 150, 24).astype(np.float32)
            exact = naive_attention(q, k, v, softcap=softcap)
            naive = naive_attention(q, k, v, softcap=softcap, dtype=np.float32)
            out, lse = fa.attention(q, k, v, softcap=softcap, return_lse=True)
            gauge, gauge_naive = out_gauge(out, exact), out_gauge(naive.out, exact)
            where = f"{seqlen_q} queries, softcap {softcap}"
            assert gauge <= (MAX_ONE_SIGN_GAUGE if short else MAX_GAUGE_BEYOND), where
            assert lse_gauge(lse, exact) <= (MAX_LSE_GAUGE if short else MAX_LSE_GAUGE_BEYOND)
            assert seqlen_q < 40 or gauge <= 2 * max(gauge_naive, 1), where


@pytest.mark.slow_on_other_sets
@pytest.mark.parametrize("kind", ["uniform", "equal", "shifted"])
@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_a_million_keys_of_one_sign(axis: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    q = np.full((1, 2, 4), 0.125, np.float32)
    k, v = (_entries(kind, rng, 1, 2**20, 4).astype(np.float32) for _ in range(2))
    exact = naive_attention(q, k, v, softmax_axis=axis)
    out, lse = fa.attention(q, k, v, return_lse=True, softmax_axis=axis)
    # Over the queries, weights of equal keys are exactly 1/2: chains of values are rounded alike.
    assert out_gauge(out, exact) <= (MAX_GAUGE if axis == "keys" else MAX_QUERIES_GAUGE)
    assert lse_gauge(lse, exact) <= MAX_GAUGE


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("head_dim_v", [1, 7, 8, 64, 200])
def test_one_key_gives_its_value_bitwise(head_dim_v: int, dtype: Any) -> None:
    rng = np.random.default_rng(head_dim_v)
    for seqlen_q in (1, 5, 24, 100):
        q = (30 * rng.standard_normal((2, seqlen_q, 16))).astype(dtype)
        k = rng.standard_normal((2, 1, 16)).astype(dtype)
        v = rng.standard_normal((2, 1, head_dim_v)).astype(dtype)
        out = fa.attention(q, k, v)
        assert out.tobytes() == np.broadcast_to(v, out.shape).tobytes()
        masked = fa.attention(q, np.repeat(k, 90, 1), np.repeat(v, 90, 1), mask=np.arange(90) == 77)
        assert masked.tobytes() == out.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("winner", [0, 63, 64, 130, 299])
def test_a_logit_far_ahead_gives_its_value_bitwise(winner: int, dtype: Any) -> None:
    """Beyond a lead of 104 (float64: 745) every other weight rounds to nothing beside 1.

    The leads of 105 and 750 are in the bias, so that scores may be anything below 1.
    """
    rng = np.random.default_rng(winner)
    q = (0.01 * rng.standard_normal((2, 50, 32))).astype(dtype)
    k = rng.random((2, 300, 32)).astype(dtype)
    v = rng.standard_normal((2, 300, 24)).astype(dtype)
    bias = np.zeros(300)
    bias[winner] = 106 if dtype is np.float32 else 750
    out = fa.attention(q, k, v, bias=bias)
    assert out.tobytes() == np.broadcast_to(v[:, winner : winner + 1], out.shape).tobytes()


def test_convex_hull() -> None:
    """Every result lies between the smallest and the largest value that took part."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, n, 40)).astype(np.float32) for n in (70, 300, 300))
    out = fa.attention(q, k, v)
    slack = 2 * np.spacing(np.abs(v).max(axis=1, keepdims=True))
    assert np.all(out <= v.max(axis=1, keepdims=True) + slack)
    assert np.all(out >= v.min(axis=1, keepdims=True) - slack)


@pytest.mark.any_kernel_set
class TestGauge:
    """The gauge itself, on errors of known size."""

    def test_naive_agrees_with_the_reference(self) -> None:
        for seed in range(60):
            qkv, options = random_call(np.random.default_rng(seed), np.float64)
            exact = naive_attention(*qkv, dtype=np.longdouble, **options)
            out, lse = fa.reference.attention(*qkv, return_lse=True, **options)
            assert out.dtype == lse.dtype == np.float64
            assert out_gauge(out, exact) <= 8 and lse_gauge(lse, exact) <= 8, seed

    def test_hand_values(self) -> None:
        q, k = np.array([[2.0]]), np.array([[1.0], [3.0]])
        v = np.array([[10.0], [20.0]])
        exact = naive_attention(q, k, v, scale=0.5)
        weight = 1 / (1 + np.exp(2.0))
        np.testing.assert_allclose(exact.out, [[10 * weight + 20 * (1 - weight)]], rtol=1e-15)
        np.testing.assert_allclose(exact.lse, [np.log(np.exp(1) + np.exp(3))], rtol=1e-15)
        np.testing.assert_allclose(exact.out_unit, 4 * exact.out)
        np.testing.assert_allclose(exact.lse_unit, 4 + exact.lse)

    def test_measures_errors(self) -> None:
        q = np.array([[0.0]], np.float32)
        k = np.zeros((3, 1), np.float32)
        v = np.ones((3, 1), np.float32)
        exact = naive_attention(q, k, v)
        out = exact.out.astype(np.float32)
        assert out_gauge(out, exact) == 0
        assert out_gauge(out + np.float32(2**-23), exact) == pytest.approx(2)
        assert out_gauge(out * np.nan, exact) == np.inf
        lse = exact.lse.astype(np.float32) + np.float32(2**-20)
        assert lse_gauge(lse, exact) == pytest.approx(16 / (1 + np.log(3)), rel=0.05)

    def test_no_error_is_allowed_where_nothing_takes_part(self) -> None:
        q, k, v = np.ones((2, 1)), np.ones((3, 1)), np.ones((3, 1))
        exact = naive_attention(q, k, v, mask=np.array([[False], [True]]))
        out = exact.out.copy()
        assert out_gauge(out, exact) == 0 and exact.lse[0] == -np.inf
        out[0] = 1e-30
        assert out_gauge(out, exact) == np.inf
        assert lse_gauge(np.zeros(2), exact) == np.inf
