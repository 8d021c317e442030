"""explain of calls other than those of arrays, which tests/test_api.py has."""

import itertools

import numpy as np
import pytest

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
