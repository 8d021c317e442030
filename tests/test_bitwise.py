"""The bitwise promises (design, section 4): results are compared byte for byte."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn as fa

AXES = ["keys", "queries"]
DTYPES = [np.float32, np.float64]
# (seqlen_q, seqlen_k, head_dim, head_dim_v); both more and fewer rows than a block, decode too.
SHAPES = [(1, 300, 64, 64), (130, 333, 64, 64), (300, 77, 40, 24), (9, 700, 128, 130)]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
each_axis = pytest.mark.parametrize("axis", AXES)

Call = tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


def same(x: Any, y: Any) -> None:
    """Assert that two arrays, or two results (out, lse), are the same bytes."""
    if isinstance(x, tuple):
        for a, b in zip(x, y, strict=True):
            same(a, b)
        return
    assert x.shape == y.shape and x.dtype == y.dtype
    if x.tobytes() != y.tobytes():
        differing = np.argwhere(~((x == y) | (np.isnan(x) & np.isnan(y))))
        raise AssertionError(f"{len(differing)} of {x.size} elements differ: {differing[:5]} ...")


def make(
    shape: tuple[int, int, int, int],
    dtype: Any = np.float32,
    batch: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    seqlen_q, seqlen_k, head_dim, head_dim_v = shape
    rng = np.random.default_rng(sum(shape))
    q = rng.standard_normal((batch, num_heads, seqlen_q, head_dim))
    k = rng.standard_normal((batch, num_kv_heads, seqlen_k, head_dim))
    v = rng.standard_normal((batch, num_kv_heads, seqlen_k, head_dim_v))
    return (2 * q).astype(dtype), k.astype(dtype), v.astype(dtype)


def option_sets(q: np.ndarray, k: np.ndarray, axis: str = "keys") -> Iterator[dict[str, Any]]:
    """Options with full-size arrays, so that a part of the call takes a part of each."""
    rng = np.random.default_rng(1)
    batch, num_heads, seqlen_q = q.shape[:3]
    seqlen_k = k.shape[-2]
    scores = (batch, num_heads, seqlen_q, seqlen_k)
    yield {}
    yield {"causal": True, "softcap": 4.0}
    yield {"mask": rng.random(scores) < 0.5, "bias": rng.standard_normal(scores)}
    options = {
        "window": (100, 60),
        "kv_lengths": rng.integers(seqlen_k // 2, seqlen_k + 1, batch),
        "alibi_slopes": rng.random((batch, num_heads)),
        "segment_ids": (
            np.sort(rng.integers(0, 3, (batch, seqlen_q))),
            np.sort(rng.integers(0, 3, (batch, seqlen_k))),
        ),
    }
    if axis == "keys":
        options["sinks"] = rng.standard_normal(num_heads)
    yield options


@each_shape
@each_dtype
@each_axis
def test_threads_and_repeats(shape: Any, dtype: Any, axis: str) -> None:
    q, k, v = make(shape, dtype)
    for options in option_sets(q, k, axis):
        once = fa.attention(q, k, v, softmax_axis=axis, return_lse=True, num_threads=1, **options)
        for num_threads in (1, 2, 3, 5, None):
            again = fa.attention(
                q, k, v, softmax_axis=axis, return_lse=True, num_threads=num_threads, **options
            )
            same(again, once)


def test_repeats_while_threads_race_for_tasks() -> None:
    q, k, v = make((200, 200, 32, 32), batch=4)
    once = fa.attention(q, k, v, causal=True, num_threads=1)
    for _ in range(30):
        same(fa.attention(q, k, v, causal=True, num_threads=4), once)


@each_shape
@each_dtype
@each_axis
def test_any_batch_composition(shape: Any, dtype: Any, axis: str) -> None:
    """Each batch entry and each head computed alone."""
    q, k, v = make(shape, dtype, batch=3)
    group_size = q.shape[1] // k.shape[1]
    for options in option_sets(q, k, axis):
        whole = fa.attention(q, k, v, softmax_axis=axis, return_lse=True, **options)
        b, h = 1, 2
        entry = {
            name: tuple(ids[b] for ids in x)
            if name == "segment_ids"
            else x[b]
            if name in ("mask", "bias", "kv_lengths", "alibi_slopes")
            else x
            for name, x in options.items()
        }
        alone = fa.attention(q[b], k[b], v[b], softmax_axis=axis, return_lse=True, **entry)
        same(alone, tuple(x[b] for x in whole))

        head = {
            name: x[h]
            if name in ("mask", "bias")
            else x[h : h + 1]
            if name in ("alibi_slopes", "sinks")
            else x
            for name, x in entry.items()
        }
        g = h // group_size
        alone = fa.attention(q[b, h], k[b, g], v[b, g], softmax_axis=axis, return_lse=True, **head)
        same(alone, tuple(x[b, h] for x in whole))


@each_axis
@each_dtype
def test_many_equal_batch_entries(dtype: Any, axis: str) -> None:
    """The same entry beside 1, 2 or 40 others, and beside none."""
    q, k, v = make((33, 65, 24, 24), dtype, batch=1)
    alone = fa.attention(q, k, v, softmax_axis=axis, return_lse=True)
    for batch in (2, 3, 41):
        many = fa.attention(
            *(np.broadcast_to(x, (batch, *x.shape[1:])) for x in (q, k, v)),
            softmax_axis=axis,
            return_lse=True,
        )
        for x, y in zip(many, alone, strict=True):
            same(np.ascontiguousarray(x[-1:]), y)
            assert np.all(x == x[:1])


@each_shape
@each_dtype
@each_axis
def test_grouped_heads_equal_repeated_heads(shape: Any, dtype: Any, axis: str) -> None:
    for num_heads, num_kv_heads in ((4, 2), (6, 1), (8, 2)):
        q, k, v = make(shape, dtype, 1, num_heads, num_kv_heads)
        for options in option_sets(q, k, axis):
            grouped = fa.attention(q, k, v, softmax_axis=axis, return_lse=True, **options)
            k_all, v_all = (np.repeat(x, num_heads // num_kv_heads, axis=1) for x in (k, v))
            repeated = fa.attention(q, k_all, v_all, softmax_axis=axis, return_lse=True, **options)
            same(grouped, repeated)


@pytest.mark.slow_on_other_sets
@each_shape
@each_dtype
@each_axis
def test_views_equal_copies(shape: Any, dtype: Any, axis: str) -> None:
    plain = make(shape, dtype)
    for options in option_sets(*plain[:2], axis):
        whole = fa.attention(*plain, softmax_axis=axis, return_lse=True, **options)
        views = {
            "heads inside": [x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in plain],
            "features first": [x.swapaxes(-1, -2).copy().swapaxes(-1, -2) for x in plain],
            "Fortran": [np.asfortranarray(x) for x in plain],
            "backwards": [x[..., ::-1, ::-1].copy()[..., ::-1, ::-1] for x in plain],
            "every third": [np.repeat(x, 3, axis=-1)[..., ::3] for x in plain],
            "unaligned": [_unaligned(x) for x in plain],
        }
        for view in views.values():
            result = fa.attention(*view, softmax_axis=axis, return_lse=True, **options)
            for x, y in zip(result, whole, strict=True):
                same(np.ascontiguousarray(x), y)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_unaligned_16_bit(dtype: Any) -> None:
    plain = make((9, 40, 24, 24), dtype)
    whole = fa.attention(*plain)
    for i in range(3):
        views = [_unaligned(x) if i == j else x for j, x in enumerate(plain)]
        same(fa.attention(*views), whole)


def _unaligned(x: np.ndarray) -> np.ndarray:
    buffer = np.empty(x.nbytes + 1, np.uint8)
    view = buffer[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


SPLITS = [[1] * 9, [100, 30], [7, 64, 1, 2, 3, 50], [129, 1], [64, 65], [24, 24, 24, 58]]


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@each_dtype
@pytest.mark.parametrize("window", [None, (40, 0), (70, 9)])
def test_chunked_prefill(splits: list[int], dtype: Any, window: Any) -> None:
    """Queries in chunks, each with its q_offset and the keys known by then, against all at once."""
    past = 21
    total = sum(splits)
    q, k, v = make((total, past + total, 64, 72), dtype)
    bias = np.random.default_rng(0).standard_normal((total, past + total))
    whole = fa.attention(
        q, k, v, causal=True, window=window, q_offset=past, bias=bias, return_lse=True
    )
    for known in ("all keys", "keys so far"):
        start, parts = 0, []
        for rows in splits:
            stop = start + rows
            keys = slice(0, past + stop if known == "keys so far" else None)
            parts.append(
                fa.attention(
                    q[..., start:stop, :],
                    k[..., keys, :],
                    v[..., keys, :],
                    causal=True,
                    window=window,
                    q_offset=past + start,
                    bias=bias[start:stop, keys],
                    return_lse=True,
                )
            )
            start = stop
        same(np.concatenate([out for out, _ in parts], axis=-2), whole[0])
        same(np.concatenate([lse for _, lse in parts], axis=-1), whole[1])


@each_dtype
def test_rows_in_chunks_without_causal(dtype: Any) -> None:
    q, k, v = make((130, 333, 64, 64), dtype)
    whole = fa.attention(q, k, v)
    for size in (1, 2, 3, 23, 64, 100):
        parts = [fa.attention(q[..., i : i + size, :], k, v) for i in range(0, 130, size)]
        same(np.concatenate(parts, axis=-2), whole)


@pytest.mark.slow_on_other_sets
@each_dtype
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("special", ["nan", "inf", "-inf", "largest", "smallest", "tiny"])
@pytest.mark.parametrize("head_dim", [40, 64, 300])
def test_special_numbers_in_chunks(head_dim: int, special: str, where: str, dtype: Any) -> None:
    """Every form of the products treats numbers alike that some instructions cannot multiply."""
    limits = np.finfo(dtype)
    named = {"largest": limits.max, "smallest": limits.smallest_subnormal, "tiny": 1e-33}
    value = dtype(named[special] if special in named else special)
    arrays = dict(zip("qkv", make((37, 200, head_dim, head_dim), dtype), strict=True))
    arrays[where][..., 3::17, 2::9] = value
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    with np.errstate(all="ignore"):
        whole = fa.attention(q, k, v)
        for size in (1, 2, 5, 20):
            parts = [fa.attention(q[..., i : i + size, :], k, v) for i in range(0, 37, size)]
            same(np.concatenate(parts, axis=-2), whole)
        exact = fa.reference.attention(q, k, v)
    if special == "largest":
        return  # of float64 the reference itself overflows
    finite = np.isfinite(exact)
    np.testing.assert_allclose(whole[finite], exact[finite], rtol=1e-5, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("t", [1, 5, 24, 64, 100, 129])
def test_causal_prefix(t: int, poison: float, dtype: Any) -> None:
    """out[:t] keeps its bits whatever the keys >= t hold, and whether they exist at all."""
    q, k, v = make((130, 130, 64, 40), dtype)
    whole = fa.attention(q, k, v, causal=True, return_lse=True)
    prefix = tuple(np.ascontiguousarray(x) for x in (whole[0][..., :t, :], whole[1][..., :t]))
    alone = fa.attention(q[..., :t, :], k[..., :t, :], v[..., :t, :], causal=True, return_lse=True)
    same(alone, prefix)
    for bad in ([k], [v], [k, v]):
        dirty = [x.copy() if any(x is y for y in bad) else x for x in (k, v)]
        for x, clean in zip(dirty, (k, v), strict=True):
            if x is not clean:
                x[..., t:, :] = poison
        out, lse = fa.attention(q, *dirty, causal=True, return_lse=True)
        same((np.ascontiguousarray(out[..., :t, :]), np.ascontiguousarray(lse[..., :t])), prefix)


def masks(seqlen_q: int, seqlen_k: int) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Ways to leave keys out -> (options, keys that no row of batch entry 1 sees)."""
    rng = np.random.default_rng(0)
    j = np.arange(seqlen_k)
    mask = rng.random((seqlen_q, seqlen_k)) < 0.6
    mask[:, j % 5 == 2] = False
    bias = np.where(j % 7 == 3, -np.inf, rng.standard_normal(seqlen_k))
    segments = j // 50
    return {
        "mask": ({"mask": mask}, j % 5 == 2),
        "mask per key": ({"mask": j % 4 != 1}, j % 4 == 1),
        "bias": ({"bias": bias}, j % 7 == 3),
        "window": ({"window": (30, 20), "q_offset": 60}, (j < 30) | (j > seqlen_q + 79)),
        "causal": ({"causal": True, "q_offset": 40}, j > seqlen_q + 39),
        "kv_lengths": ({"kv_lengths": np.array([seqlen_k, 77])}, j >= 77),
        "segments": (
            {"segment_ids": (np.full(seqlen_q, 1), np.where(segments == 2, 9, 1))},
            segments == 2,
        ),
    }


@pytest.mark.parametrize("name", masks(1, 1))
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@each_axis
@each_dtype
def test_what_is_masked_out_changes_nothing(
    name: str, poison: float, axis: str, dtype: Any
) -> None:
    seqlen_q, seqlen_k = 70, 260
    q, k, v = make((seqlen_q, seqlen_k, 64, 72), dtype)
    options, unseen = masks(seqlen_q, seqlen_k)[name]
    assert 0 < unseen.sum() < seqlen_k
    clean = fa.attention(q, k, v, softmax_axis=axis, return_lse=True, **options)
    # A NaN score plus a bias of -inf is NaN; only a mask overrules K.
    for poisoned in ((False, True),) if name == "bias" else ((True, False), (False, True)):
        k_dirty, v_dirty = k.copy(), v.copy()
        if poisoned[0]:
            k_dirty[1, :, unseen] = poison
        if poisoned[1]:
            v_dirty[1, :, unseen] = poison
        dirty = fa.attention(q, k_dirty, v_dirty, softmax_axis=axis, return_lse=True, **options)
        same(dirty, clean)


@each_dtype
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("what", ["k", "v"])
def test_masked_for_some_rows_of_a_tile_only(what: str, poison: float, dtype: Any) -> None:
    """A key that is poison for the rows that see it leaves the other rows of the tile alone."""
    seqlen_q, seqlen_k = 100, 150
    q, k, v = make((seqlen_q, seqlen_k, 64, 40), dtype)
    rng = np.random.default_rng(3)
    mask = rng.random((seqlen_q, seqlen_k)) < 0.5
    seen = mask[:, 70].copy()
    assert 20 < seen.sum() < 80
    clean = fa.attention(q, k, v, mask=mask, return_lse=True)
    k_dirty, v_dirty = k.copy(), v.copy()
    (k_dirty if what == "k" else v_dirty)[:, :, 70] = poison
    out, lse = fa.attention(q, k_dirty, v_dirty, mask=mask, return_lse=True)
    same(out[..., ~seen, :], clean[0][..., ~seen, :])
    same(lse[..., ~seen], clean[1][..., ~seen])
    assert not np.any(np.isfinite(out[..., seen, :]))


@each_dtype
@each_axis
def test_masked_out_bias_changes_nothing(axis: str, dtype: Any) -> None:
    """Masked scores are left out whatever the bias says, NaN and +inf included."""
    q, k, v = make((70, 150, 32, 32), dtype)
    rng = np.random.default_rng(3)
    mask = rng.random((70, 150)) < 0.5
    bias = rng.standard_normal((70, 150))
    clean = fa.attention(q, k, v, mask=mask, bias=bias, softmax_axis=axis, return_lse=True)
    for poison in (np.nan, np.inf):
        dirty = np.where(mask, bias, poison)
        same(
            fa.attention(q, k, v, mask=mask, bias=dirty, softmax_axis=axis, return_lse=True), clean
        )


@each_dtype
def test_nan_of_any_payload_gives_nan(dtype: Any) -> None:
    """The bits below a NaN's quiet bit, and its sign, may be anything."""
    q, k, v = make((30, 70, 16, 24), dtype)
    bits = {np.float32: np.uint32, np.float64: np.uint64}[dtype]
    quiet = np.array(np.nan, dtype).view(bits)
    sign = np.array(-0.0, dtype).view(bits)
    for payload in (0, 1, 0x5A5, 0x3FFFFF):
        for pattern in (quiet | bits(payload), quiet | sign | bits(payload)):
            for operand in range(3):
                dirty = [x.copy() for x in (q, k, v)]
                dirty[operand][:, :, 7] = pattern.view(dtype)
                for axis in AXES:
                    out = fa.attention(*dirty, softmax_axis=axis)
                    rows = out[:, :, 7:8] if operand == 0 and axis == "keys" else out
                    assert np.all(np.isnan(rows)), (payload, operand, axis)


@each_dtype
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_bad_query_stays_in_its_row(causal: bool, poison: float, dtype: Any) -> None:
    q, k, v = make((70, 150, 32, 48), dtype)
    rows = np.arange(70) % 9 == 4
    clean = fa.attention(q, k, v, causal=causal, return_lse=True)
    for column in (0, 31, slice(None)):
        dirty = q.copy()
        dirty[:, :, rows, column] = poison
        out, lse = fa.attention(dirty, k, v, causal=causal, return_lse=True)
        same(out[..., ~rows, :], clean[0][..., ~rows, :])
        same(lse[..., ~rows], clean[1][..., ~rows])
        if np.isnan(poison):
            assert np.all(np.isnan(out[..., rows, :])) and np.all(np.isnan(lse[..., rows]))


@each_dtype
def test_bad_key_stays_in_its_column_of_a_softmax_over_queries(dtype: Any) -> None:
    """A NaN key spoils its own column's lse; every row that sees it becomes NaN, no other does."""
    q, k, v = make((70, 150, 32, 48), dtype)
    mask = np.random.default_rng(3).random((70, 150)) < 0.5
    options: dict[str, Any] = {"mask": mask, "softmax_axis": "queries", "return_lse": True}
    clean = fa.attention(q, k, v, **options)
    dirty = k.copy()
    dirty[:, :, 70] = np.nan
    out, lse = fa.attention(q, dirty, v, **options)
    seen, columns = mask[:, 70], np.arange(150) != 70
    same(out[..., ~seen, :], clean[0][..., ~seen, :])
    same(lse[..., columns], clean[1][..., columns])
    assert np.all(np.isnan(out[..., seen, :])) and np.all(np.isnan(lse[..., ~columns]))


@each_dtype
def test_bad_value_stays_in_its_feature(dtype: Any) -> None:
    """A NaN in one feature of a value makes that feature NaN and no other."""
    q, k, v = make((70, 150, 32, 48), dtype)
    clean = fa.attention(q, k, v, return_lse=True)
    dirty = v.copy()
    dirty[..., 70, 13] = np.nan
    out, lse = fa.attention(q, k, dirty, return_lse=True)
    others = np.arange(48) != 13
    same(out[..., others], clean[0][..., others])
    same(lse, clean[1])
    assert np.all(np.isnan(out[..., 13]))


@each_dtype
@pytest.mark.parametrize("sinks", [None, np.full(4, 0.7)], ids=["no sinks", "sinks"])
def test_rows_without_keys(sinks: Any, dtype: Any) -> None:
    """0 and -inf or the sink, among rows that do have keys; with a residual, the residual."""
    q, k, v = make((70, 150, 32, 48), dtype)
    mask = np.ones((70, 150), bool)
    empty = np.arange(70) % 3 == 1
    mask[empty] = False
    clean = fa.attention(q, k, v, sinks=sinks, return_lse=True)
    residual = np.random.default_rng(0).standard_normal(clean[0].shape).astype(dtype)
    out, lse = fa.attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)
    same(out[..., empty, :], np.zeros_like(out[..., empty, :]))
    expected = np.full_like(lse[..., empty], -np.inf if sinks is None else sinks[0])
    np.testing.assert_allclose(lse[..., empty], expected, rtol=np.finfo(dtype).eps)
    same(out[..., ~empty, :], clean[0][..., ~empty, :])
    same(lse[..., ~empty], clean[1][..., ~empty])
    added = fa.attention(q, k, v, mask=mask, sinks=sinks, residual=residual)
    same(added[..., empty, :], residual[..., empty, :])


@each_dtype
def test_columns_without_queries(dtype: Any) -> None:
    q, k, v = make((70, 150, 32, 48), dtype)
    empty = np.arange(150) % 3 == 1
    clean = fa.attention(
        q, k[..., ~empty, :], v[..., ~empty, :], softmax_axis="queries", return_lse=True
    )
    _, lse = fa.attention(q, k, v, mask=~empty, softmax_axis="queries", return_lse=True)
    same(lse[..., empty], np.full_like(lse[..., empty], -np.inf))
    same(lse[..., ~empty], clean[1])


@each_dtype
def test_options_that_say_nothing_change_nothing(dtype: Any) -> None:
    """A mask that lets all through, open windows, one segment and a full length keep the bits."""
    q, k, v = make((70, 150, 32, 48), dtype)
    plain = fa.attention(q, k, v, return_lse=True)
    nothing: list[dict[str, Any]] = [
        {"mask": np.True_},
        {"mask": np.ones((70, 150), bool)},
        {"window": (None, None)},
        {"window": (10**6, 10**6)},
        {"causal": True, "q_offset": 10**6},
        {"kv_lengths": 150},
        {"segment_ids": (np.zeros(70, int), np.zeros(150, int))},
        {"bias": np.float32(0)},
        {"alibi_slopes": np.zeros(4)},
        {"sinks": np.full(4, -np.inf)},
    ]
    for options in nothing:
        same(fa.attention(q, k, v, return_lse=True, **options), plain)
