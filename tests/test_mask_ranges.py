"""Masks that leave each query one range of keys, which are read once and then not again: the bits
are those of a mask that is read tile by tile."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gradients import NAMES, gradients_of, kept_gradients_of
from test_bitwise import same
from test_guard_pages import LAYOUTS, GuardedMemory, each_layout, memory  # noqa: F401  a fixture
from test_races import race

import fastattn as fa

# Queries and keys are cut inside a tile and a block, and splits of keys are several.
B, HEADS, KV_HEADS, SEQLEN_Q, SEQLEN_K = 3, 4, 2, 67, 1200

each_axis = pytest.mark.parametrize("axis", ["keys", "queries"])


def ranges(lo: Any, hi: Any, seqlen_k: int = SEQLEN_K) -> np.ndarray:
    """A mask of keys [lo, hi): one more axis than lo and hi together."""
    keys = np.arange(seqlen_k)
    return (keys >= np.asarray(lo)[..., None]) & (keys < np.asarray(hi)[..., None])


QUERIES = np.arange(SEQLEN_Q)
LENGTHS = np.array([700, 1200, 129])
OFFSETS = SEQLEN_K - SEQLEN_Q
DOCUMENTS = np.array([0, 20, 41, SEQLEN_Q])
NUMBER = np.searchsorted(DOCUMENTS, QUERIES, side="right") - 1
START = np.array([0, 300, 333, SEQLEN_K])

MASKS = {
    "padding on the right": ranges(0, LENGTHS[:, None, None]),
    "padding on the left": ranges(SEQLEN_K - LENGTHS[:, None, None], SEQLEN_K),
    "padding of one batch entry": ranges(5, 777),
    "causal": ranges(0, QUERIES + OFFSETS + 1),
    "causal and padding": ranges(
        SEQLEN_K - LENGTHS[:, None, None], QUERIES + OFFSETS + 1
    ),  # no key for the first queries of the last entry
    "the other way round": ranges(QUERIES * 17, SEQLEN_K),
    "window": ranges(QUERIES * 16, QUERIES * 16 + 150)[None, None],
    "packed documents": ranges(START[NUMBER], START[NUMBER + 1]),
    "in no order": ranges((QUERIES * 389) % 900, (QUERIES * 389) % 900 + QUERIES * 5),
    "queries of padding": ranges(0, np.where(QUERIES < 40, 500, 0))[None],
    "nothing": np.zeros((1, 1), bool),
    "all": np.ones((B, 1, SEQLEN_Q, SEQLEN_K), bool),
    "the same for each head": np.repeat(ranges(0, LENGTHS[:, None, None]), HEADS, axis=1),
}
NO_RANGES = {
    "random": np.arange(SEQLEN_Q * SEQLEN_K).reshape(SEQLEN_Q, SEQLEN_K) % 7 > 2,
    "a hole in the last row": ~ranges(600, np.where(QUERIES < SEQLEN_Q - 1, 0, 601)),
    "heads differ": ranges(0, np.array([700, 700, 700, 600])[:, None]),
}

each_mask = pytest.mark.parametrize("name", MASKS)


def read(mask: np.ndarray) -> np.ndarray:
    """The mask by bytes that are neither 0 nor 1, which are read as they come."""
    return (2 * mask.astype(np.uint8)).view(bool)


def as_bias(mask: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    return np.where(mask, 0.0, -np.inf).astype(dtype)


def make(dtype: Any = np.float32, head_dim: int = 24, head_dim_v: int = 20) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [
        (B, HEADS, SEQLEN_Q, head_dim),
        (B, KV_HEADS, SEQLEN_K, head_dim),
        (B, KV_HEADS, SEQLEN_K, head_dim_v),
    ]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def attention(*arrays: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return fa.attention(*arrays, return_lse=True, **options)


# ---- which masks are ranges ----------------------------------------------------------------------


@each_mask
def test_explain_says_which_masks_are_ranges(name: str) -> None:
    arrays = make()
    plan = fa.explain(*arrays, mask=MASKS[name])
    assert plan.key_ranges == ("mask",) and "key ranges  mask:" in str(plan)
    assert ("mask" in fa.explain(*arrays, mask=read(MASKS[name])).key_ranges) == (name == "nothing")
    assert fa.explain(*arrays, bias=as_bias(MASKS[name])).key_ranges == ("bias",)


@pytest.mark.parametrize("name", NO_RANGES)
def test_other_masks(name: str) -> None:
    arrays, mask = make(), NO_RANGES[name]
    assert fa.explain(*arrays, mask=mask).key_ranges == ()
    assert fa.explain(*arrays, bias=as_bias(mask)).key_ranges == ()
    assert fa.explain(*arrays, mask=MASKS["causal"], bias=as_bias(mask)).key_ranges == ("mask",)
    same(attention(*arrays, mask=mask), attention(*arrays, mask=read(mask)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_biases(dtype: Any) -> None:
    arrays, bias = make(), as_bias(MASKS["causal and padding"], dtype)
    assert fa.explain(*arrays, bias=-np.abs(bias)).key_ranges == ("bias",)  # zeros of either sign
    for number in (np.nan, np.inf, 1e-7, -1, np.finfo(np.float16).min):
        for place in (0, -1):
            other = bias.copy()
            other[-1, 0, -1, place] = number
            assert fa.explain(*arrays, bias=other).key_ranges == ()


def test_tiles_of_a_bias_are_skipped() -> None:
    q = np.zeros((2, 1, 256, 8), np.float32)
    mask = ranges(0, np.array([128, 512])[:, None, None], 512)
    k = np.zeros((2, 1, 512, 8), np.float32)
    by_mask, by_bias = fa.explain(q, k, k, mask=mask), fa.explain(q, k, k, bias=as_bias(mask))
    assert by_bias.tiles_skipped == by_mask.tiles_skipped > 0
    assert by_bias.skipped_by == {"bias": by_bias.tiles_skipped}


# ---- the bits of a mask that is read -------------------------------------------------------------

OTHER_OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True, "softcap": 3.0, "bias": np.linspace(0, 1, SEQLEN_K, dtype=np.float32)},
    {
        "window": (900, 0),
        "kv_lengths": np.array([1200, 1100, 64]),
        "alibi_slopes": np.linspace(0.01, 0.1, HEADS),
        "segment_ids": (QUERIES // 30, np.arange(SEQLEN_K) // 500),
    },
]


@each_mask
@each_axis
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_forward(name: str, axis: str, dtype: Any) -> None:
    arrays, mask = make(dtype), MASKS[name]
    for options in OTHER_OPTIONS:
        options = {**options, "softmax_axis": axis}
        expected = attention(*arrays, mask=read(mask), **options)
        same(attention(*arrays, mask=mask, **options), expected)
        if "bias" not in options:
            other = attention(*arrays, bias=as_bias(mask), **options)
            expected = attention(
                *arrays, mask=read(mask), bias=np.zeros((1, 1), np.float32), **options
            )
            same(other, expected)


@each_mask
def test_few_queries_and_sinks(name: str) -> None:
    q, k, v = make()
    mask = np.broadcast_to(MASKS[name], (B, HEADS, SEQLEN_Q, SEQLEN_K))
    options = {"sinks": np.linspace(-1, 1, HEADS), "dropout_p": 0.2, "dropout_seed": 3}
    for rows in (slice(-1, None), slice(20, 23)):
        few = q[:, :, rows], k, v
        expected = attention(*few, mask=read(mask[:, :, rows]), **options)
        same(attention(*few, mask=mask[:, :, rows], **options), expected)


def same_gradients(x: Any, y: Any) -> None:
    for name in NAMES:
        if getattr(x, name) is not None:
            same(getattr(x, name), getattr(y, name))


@each_mask
@each_axis
def test_backward(rng: np.random.Generator, name: str, axis: str) -> None:
    arrays, mask = make(), MASKS[name]
    grad_out = rng.standard_normal((B, HEADS, SEQLEN_Q, 20), dtype=np.float32)
    for options in OTHER_OPTIONS:
        options = {**options, "softmax_axis": axis}
        for gradients in (gradients_of, kept_gradients_of):
            expected = gradients(grad_out, *arrays, mask=read(mask), **options)
            same_gradients(gradients(grad_out, *arrays, mask=mask, **options), expected)
    expected = gradients_of(
        grad_out, *arrays, mask=read(mask), bias=np.zeros(mask.shape, np.float32)
    )
    bias = as_bias(mask)
    same_gradients(gradients_of(grad_out, *arrays, bias=bias), expected)


@each_mask
@each_axis
def test_weights(name: str, axis: str) -> None:
    (q, k, _), mask = make(), MASKS[name]
    forms: list[dict[str, Any]] = [
        {"rows": [3, 66, 12]},
        {"heads": [2]},
        {"pool": (5, 7)},
        {"reduce": "keys"},
    ]
    for form in forms:
        form["softmax_axis"] = axis
        expected = fa.attention_weights(q, k, mask=read(mask), **form)
        same(fa.attention_weights(q, k, mask=mask, **form), expected)
        same(fa.attention_weights(q, k, bias=as_bias(mask), **form), expected)


def test_a_second_run_in_float64() -> None:
    q, k, v = make()
    k[:, :, ::100] = 1e30
    q[:, :, 5:9] = 1e10
    for mask in MASKS.values():
        same(attention(q, k, v, mask=mask), attention(q, k, v, mask=read(mask)))
        expected = gradients_of(q[..., :20], q, k, v, mask=read(mask))
        same_gradients(gradients_of(q[..., :20], q, k, v, mask=mask), expected)


# ---- the bits of the options that say the same ---------------------------------------------------


@each_axis
def test_options_that_say_the_same(axis: str) -> None:
    q, k, v = make()
    pairs: list[tuple[str, dict[str, Any]]] = [
        ("padding on the right", {"kv_lengths": LENGTHS}),
        ("causal", {"causal": True}),
        (
            "packed documents",
            {"segment_ids": (NUMBER, np.searchsorted(START, np.arange(SEQLEN_K), "right") - 1)},
        ),
    ]
    for name, options in pairs:
        expected = attention(q, k, v, softmax_axis=axis, **options)
        same(attention(q, k, v, softmax_axis=axis, mask=MASKS[name]), expected)
    q = np.repeat(q, 18, axis=2)[:, :, :SEQLEN_K]
    rows = np.arange(SEQLEN_K)
    window = ranges(np.maximum(rows - 100, 0), rows + 4)
    expected = attention(q, k, v, softmax_axis=axis, window=(100, 3))
    same(attention(q, k, v, softmax_axis=axis, mask=window), expected)


# ---- what else the promises say ------------------------------------------------------------------


def test_nan_behind_the_mask_changes_nothing() -> None:
    q, k, v = make()
    for mask in (MASKS["padding on the left"], MASKS["window"], MASKS["packed documents"]):
        seen = np.broadcast_to(mask, (B, 1, SEQLEN_Q, SEQLEN_K)).any(axis=(1, 2))
        expected = attention(q, k, v, mask=mask)
        bad_k, bad_v = k.copy(), v.copy()
        bad_k.swapaxes(1, 2)[~seen] = np.nan
        bad_v.swapaxes(1, 2)[~seen] = np.inf
        same(attention(q, bad_k, bad_v, mask=mask), expected)
        same(attention(q, bad_k, bad_v, bias=as_bias(mask)), attention(q, k, v, bias=as_bias(mask)))


def test_queries_without_keys() -> None:
    q, k, v = make()
    late = as_bias(ranges(np.where(QUERIES < 9, SEQLEN_K, 0), SEQLEN_K))
    out, lse = attention(q, k, v, bias=late)
    assert not out[:, :, :9].any() and np.isneginf(lse[:, :, :9]).all()
    assert np.isfinite(lse[:, :, 9:]).all()
    grads = gradients_of(np.ones_like(out), q, k, v, bias=late)
    assert not grads.q[:, :, :9].any() and np.isfinite(grads.k).all()


@each_axis
def test_threads_and_batch_entries(axis: str) -> None:
    """One entry that has no ranges leaves those of the others, and the bits of all."""
    q, k, v = make()
    mask = np.broadcast_to(MASKS["causal and padding"], (B, 1, SEQLEN_Q, SEQLEN_K)).copy()
    whole = attention(q, k, v, mask=mask, softmax_axis=axis, num_threads=1)
    for num_threads in (2, 3):
        same(attention(q, k, v, mask=mask, softmax_axis=axis, num_threads=num_threads), whole)
    mask[1, :, 7, 600] ^= True
    assert fa.explain(q, k, v, mask=mask).key_ranges == ()
    mixed = attention(q, k, v, mask=mask, softmax_axis=axis)
    for entry in (0, 2):
        same(tuple(x[entry] for x in mixed), tuple(x[entry] for x in whole))
        alone = attention(q[entry], k[entry], v[entry], mask=mask[entry], softmax_axis=axis)
        same(alone, tuple(x[entry] for x in whole))


def test_several_batch_axes() -> None:
    q, k, v = (np.stack([x, x[::-1]]) for x in make())
    for shape in [(2, 1, 1, 1), (1, B, 1, 1), (2, B, 1, 1), (1, 1, 1, 1), (2, B, 1, SEQLEN_Q)]:
        lengths = 1 + np.arange(np.prod(shape)).reshape(shape) * 1100 // np.prod(shape)
        mask = ranges(0, lengths)
        assert fa.explain(q, k, v, mask=mask).key_ranges == ("mask",)
        same(attention(q, k, v, mask=mask), attention(q, k, v, mask=read(mask)))


def test_strides() -> None:
    q, k, v = make()
    mask = np.broadcast_to(MASKS["causal and padding"], (B, HEADS, SEQLEN_Q, SEQLEN_K)).copy()
    expected = attention(q, k, v, mask=read(mask))
    views: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: x[:, :1],
        lambda x: np.broadcast_to(x[:, :1], x.shape),
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
        lambda x: x[:, :, ::-1, ::-1].copy()[:, :, ::-1, ::-1],
    ]
    for view in views:
        assert fa.explain(q, k, v, mask=view(mask)).key_ranges == ("mask",)
        same(attention(q, k, v, mask=view(mask)), expected)
        assert fa.explain(q, k, v, bias=view(as_bias(mask))).key_ranges == ("bias",)


@each_layout
def test_guard_pages(memory: GuardedMemory, layout: Any) -> None:  # noqa: F811
    rng = np.random.default_rng(0)
    place = LAYOUTS[layout]
    for seqlen_q, seqlen_k in [(1, 1), (3, 63), (5, 64), (30, 65), (7, 200)]:
        q, k, v = (rng.standard_normal((2, n, 8)) for n in (seqlen_q, seqlen_k, seqlen_k))
        lo, hi = np.sort(rng.integers(0, seqlen_k + 1, (2, seqlen_q)), axis=0)
        for mask in (
            ranges(lo, hi, seqlen_k),
            np.ones((seqlen_q, seqlen_k), bool),
            np.zeros((1, seqlen_k), bool),
        ):
            expected = fa.attention(q, k, v, mask=read(mask))
            same(fa.attention(q, k, v, mask=place(memory, mask)), expected)
            for dtype in (np.float16, np.float32, np.float64):
                bias = place(memory, as_bias(mask, dtype))
                same(fa.attention(q, k, v, bias=bias), expected)


@pytest.mark.any_kernel_set
def test_a_mask_that_changes_during_the_call() -> None:
    q, k, v = make()
    mask = MASKS["window"].copy()

    def change() -> None:
        mask[..., 30:50, :] ^= True

    def call() -> None:
        out = fa.attention(q, k, v, mask=mask, num_threads=2)
        assert np.isfinite(out).all()

    assert not race(call, change)
