"""explain: what it says of calls of arrays, packed sequences, caches and pages."""

import itertools
from math import nan

import ml_dtypes
import numpy as np
import pytest
from operands import DV, HK, LK, LQ, OUT, B, D, H, operands, zeros

import fastattn as fa
from fastattn import _core

LENGTHS = [300, 0, 700]
STARTS = np.cumsum([0, *LENGTHS])


@pytest.fixture
def problems(monkeypatch):
    """The problems that real calls hand to the core."""
    seen = []
    run = _core.attention

    def attention(problem):
        seen.append(problem)
        run(problem)

    monkeypatch.setattr(_core, "attention", attention)
    return seen


def check(plan, problems, call, form):
    """That a plan is the core's own of the problem of the real call, which `call` makes."""
    call()
    [problem] = problems
    for name, value in _core.describe(problem).items():
        assert getattr(plan, name) == value, name
    assert plan.form == form
    assert (plan.isa, plan.dtype) == (problem.isa, str(problem.like.dtype))
    heads = plan.num_heads, plan.num_kv_heads, plan.head_dim, plan.head_dim_v
    assert heads == (4, 2, 8, 6)
    assert plan.tiles_computed <= plan.tiles_total
    assert form in str(plan)


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


OPTIONS = [{}, {"causal": True}, {"causal": True, "window": (40, 0)}, {"num_threads": 1}]


@pytest.mark.parametrize("options", OPTIONS)
def test_packed_sequences(rng, problems, options):
    q, k, v = normal(rng, 1000, 4, 8), normal(rng, 1000, 2, 8), normal(rng, 1000, 2, 6)
    plan = fa.explain(q, k, v, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS, **options)
    check(
        plan,
        problems,
        lambda: fa.attention_varlen(q, k, v, STARTS, STARTS, **options),
        "packed sequences",
    )
    assert (plan.batch_shape, plan.seqlen_q, plan.seqlen_k) == ((3,), 700, 700)
    assert set(plan.skipped_by) == set(options) - {"num_threads"}
    # The tiles are those of one call for each sequence.
    each = [
        fa.explain(*(x[i:j].swapaxes(0, 1) for x in (q, k, v)), **options)
        for i, j in itertools.pairwise(STARTS)
    ]
    assert plan.tiles_total == sum(x.tiles_total for x in each)
    assert plan.tiles_computed == sum(x.tiles_computed for x in each)
    for name, tiles in plan.skipped_by.items():
        assert tiles == sum(x.skipped_by[name] for x in each)


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
@pytest.mark.parametrize("options", OPTIONS)
def test_cache(rng, problems, dtype, options):
    cache = fa.KVCache(3, 2, 1000, 8, head_dim_v=6, dtype=dtype)
    cache.append(normal(rng, 3, 2, 700, 8), normal(rng, 3, 2, 700, 6), counts=LENGTHS)
    q = normal(rng, 3, 4, 200, 8)
    plan = cache.explain(q, **options)
    name = np.dtype(dtype).name
    check(plan, problems, lambda: cache.attention(q, **options), f"cache of {name}")
    assert (plan.batch_shape, plan.seqlen_q, plan.seqlen_k) == ((3,), 200, 700)
    assert set(plan.skipped_by) == {"causal"} | (set(options) - {"num_threads"})


@pytest.mark.parametrize("sink_tokens", [0, 4])
def test_cache_with_a_window(rng, problems, sink_tokens):
    cache = fa.KVCache(1, 2, 1000, 8, head_dim_v=6, window_tokens=50, sink_tokens=sink_tokens)
    for _ in range(2):
        cache.append(normal(rng, 1, 2, 800, 8), normal(rng, 1, 2, 800, 6))
    q = normal(rng, 1, 4, 600, 8)
    plan = cache.explain(q)
    check(plan, problems, lambda: cache.attention(q), "cache of float32")
    name = "mask" if sink_tokens else "window"
    assert set(plan.skipped_by) == {"causal", name}
    assert plan.skipped_by[name] > 0


@pytest.mark.parametrize("options", OPTIONS)
def test_pages(rng, problems, options):
    cache = fa.PagedKVCache(100, 16, 2, 8, head_dim_v=6)
    seq_ids = [cache.add(normal(rng, 2, n, 8), normal(rng, 2, n, 6)) for n in LENGTHS]
    q = normal(rng, 3, 4, 5, 8)
    plan = cache.explain(q, seq_ids, **options)
    check(plan, problems, lambda: cache.attention(q, seq_ids, **options), "pages of float32")
    assert (plan.batch_shape, plan.seqlen_q, plan.seqlen_k) == ((3,), 5, 700)


@pytest.mark.any_kernel_set
def test_arrays_are_named(rng, problems):
    q, k, v = normal(rng, 4, 30, 8), normal(rng, 2, 30, 8), normal(rng, 2, 30, 6)
    options = {"kv_lengths": 20, "causal": True}
    plan = fa.explain(q, k, v, **options)
    check(plan, problems, lambda: fa.attention(q, k, v, **options), "arrays")


@pytest.mark.any_kernel_set
def test_what_is_wrong_is_said_by_name(rng):
    x = normal(rng, 10, 4, 8)
    with pytest.raises(ValueError, match="must be given together, got only `cu_seqlens_q`"):
        fa.explain(x, x, x, cu_seqlens_q=[0, 10])
    with pytest.raises(ValueError, match="`cu_seqlens_k` must end with the 10 rows of `k`"):
        fa.explain(x, x, x, cu_seqlens_q=[0, 10], cu_seqlens_k=[0, 9])
    with pytest.raises(TypeError, match=r"explain\(\) got an unexpected keyword argument 'mask'"):
        fa.explain(x, x, x, cu_seqlens_q=[0, 10], cu_seqlens_k=[0, 10], mask=True)
    cache, paged = fa.KVCache(1, 4, 10, 8), fa.PagedKVCache(1, 4, 4, 8)
    q = normal(rng, 1, 4, 1, 8)
    with pytest.raises(ValueError, match="`kv_lengths` must be None: the cache knows"):
        cache.explain(q, kv_lengths=3)
    with pytest.raises(TypeError, match=r"KVCache\.explain\(\) got an unexpected .* 'casual'"):
        cache.explain(q, casual=True)
    with pytest.raises(ValueError, match=r"`seq_ids\[0\]` must be a sequence of this cache"):
        paged.explain(q, [3])
    out = np.full((1, 4, 1, 8), np.nan, np.float32)
    assert cache.explain(q, out=out, return_lse=True).seqlen_k == 0
    assert np.isnan(out).all()


def test_explain_describes_the_call(kernel_set):
    q, k, v = operands()
    plan = fa.explain(q, k, v, num_threads=1)
    assert plan.isa == kernel_set
    assert plan.dtype == "float32"
    assert plan.batch_shape == (B,)
    sizes = plan.num_heads, plan.num_kv_heads, plan.seqlen_q, plan.seqlen_k, plan.head_dim
    assert sizes == (H, HK, LQ, LK, D)
    assert plan.head_dim_v == DV
    assert plan.num_threads == plan.num_threads_allowed == 1
    assert plan.tile_q >= plan.mr > 0 and plan.block_k >= plan.nr >= plan.vl > 0 < plan.block_q
    assert plan.num_tasks > 0 and plan.workspace_bytes > 0
    assert plan.tiles_total == plan.tiles_computed > 0
    assert plan.skipped_by == {}
    assert "over the keys" in plan.softmax
    assert "over the queries" in fa.explain(q, k, v, softmax_axis="queries").softmax
    assert fa.explain(*operands(np.float64)).dtype == "float64"


@pytest.mark.parametrize(
    ("dtype", "options", "engine", "engine_of_amx"),
    [
        (np.float32, {}, "vector_f32", "amx_f32x3"),
        (np.float32, {"softmax_axis": "queries"}, "vector_f32", "vector_f32"),
        (np.float32, {"scale": 1e-200}, "vector_f64", "vector_f64"),
        (np.float16, {}, "vector_f32", "vector_f32"),
        (ml_dtypes.bfloat16, {}, "vector_f32", "amx_bf16"),
        (np.float64, {}, "vector_f64", "vector_f64"),
    ],
)
def test_explain_names_the_engine(kernel_set, dtype, options, engine, engine_of_amx):
    plan = fa.explain(*operands(dtype), **options)
    assert plan.engine == (engine_of_amx if kernel_set == "amx" else engine)
    assert f"{kernel_set}, engine {plan.engine}, " in str(plan)


def test_explain_counts_skipped_tiles():
    seqlen = 4096
    x = np.broadcast_to(np.float32(0), (1, 1, seqlen, 8))
    full = fa.explain(x, x, x)
    causal = fa.explain(x, x, x, causal=True)
    assert causal.tiles_total == full.tiles_total == full.tiles_computed
    assert causal.skipped_by == {"causal": causal.tiles_skipped}
    assert 0.4 < causal.tiles_skipped / causal.tiles_total < 0.5
    both = fa.explain(x, x, x, causal=True, window=(64, None), kv_lengths=seqlen)
    assert list(both.skipped_by) == ["causal", "window", "kv_lengths"]
    assert both.skipped_by["causal"] == causal.tiles_skipped
    assert both.tiles_skipped > max(both.skipped_by.values())
    assert both.skipped_by["kv_lengths"] == 0
    half = fa.explain(x, x, x, kv_lengths=seqlen // 2)
    assert half.skipped_by["kv_lengths"] == half.tiles_skipped == half.tiles_total // 2
    ids = np.arange(seqlen) // (seqlen // 4)
    segments = fa.explain(x, x, x, segment_ids=(ids, ids))
    assert segments.skipped_by["segment_ids"] == segments.tiles_skipped > 0
    nothing = fa.explain(x, x, x, mask=False)
    assert nothing.tiles_computed == 0
    assert nothing.skipped_by["mask"] == nothing.tiles_total
    open_window = fa.explain(x, x, x, window=(None, None))
    assert open_window.skipped_by == {} and open_window.tiles_skipped == 0


@pytest.mark.any_kernel_set
def test_explain_says_why_that_many_threads(monkeypatch):
    x = zeros(1, 8, 256, 16)
    assert "num_threads" in fa.explain(x, x, x, num_threads=1).num_threads_reason
    monkeypatch.setenv("FASTATTN_NUM_THREADS", "1")
    assert "FASTATTN_NUM_THREADS" in fa.explain(x, x, x).num_threads_reason
    row = zeros(1, 1, 1, 16)
    plan = fa.explain(row, row, row, num_threads=3)
    assert plan.num_threads == 1 and plan.num_threads_allowed == 3
    assert plan.num_threads_reason.startswith("3 allowed by num_threads, but ")


@pytest.mark.any_kernel_set
def test_explain_prints():
    q, k, v = operands()
    text = str(fa.explain(q, k, v, causal=True))
    for part in ("kernel set", "softmax", "threads", "workspace", "score tiles", "causal"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 150
    assert "no option rules keys out" in str(fa.explain(q, k, v))
    empty = str(fa.explain(zeros(0, 4), zeros(5, 4), zeros(5, 4)))
    assert "score tiles" in empty


@pytest.mark.any_kernel_set
def test_explain_writes_nothing_to_out():
    q, k, v = operands()
    out = np.full(OUT, nan, np.float32)
    fa.explain(q, k, v, out=out, return_lse=True)
    assert np.all(np.isnan(out))
