"""Random shapes, strides and option combinations against fastattn.reference.

The same examples run every time; FASTATTN_EXAMPLES=10000 draws that many new ones instead.
"""

import os
from typing import Any

import numpy as np
import pytest
from gauge import assert_close, naive_attention
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn._options import NAMES

# The threshold of the BLAS tests, not the 4 of test_accuracy.py: repeated rows make sums of like
# terms, whose roundings add up.
MAX_GAUGE = 16.0

EXAMPLES = int(os.environ.get("FASTATTN_EXAMPLES", "0"))

checked = settings(
    max_examples=EXAMPLES or 150,
    derandomize=EXAMPLES == 0,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

LENGTHS = st.one_of(st.integers(0, 12), st.sampled_from([23, 24, 25, 63, 64, 65, 129, 193]))
WIDTHS = st.one_of(st.integers(0, 10), st.sampled_from([16, 17, 31, 64, 65, 96]))
DTYPES = st.sampled_from([np.dtype(np.float32), np.dtype(np.float64)])

# NumPy lets a dimension of one element have any stride at all.
HUGE_STRIDE = 2**62


@st.composite
def layouts(draw: st.DrawFn, values: np.ndarray, writable: bool = False) -> np.ndarray:
    """An array equal to `values` in a drawn memory layout.

    Axes in any order, steps of either sign, room between the elements, an address and strides
    that are no multiple of the element size, huge strides on axes of one element.  Inputs are
    read-only.
    """
    order = draw(st.permutations(range(values.ndim)))
    steps = draw(
        st.lists(st.sampled_from([1, 1, -1, 2, -3]), min_size=values.ndim, max_size=values.ndim)
    )
    padding = draw(st.lists(st.integers(0, 2), min_size=values.ndim, max_size=values.ndim))
    offset = draw(st.sampled_from([0, 0, 4, 1]))

    shape = [
        (values.shape[axis] + pad) * abs(steps[axis])
        for axis, pad in zip(order, padding, strict=True)
    ]
    size = int(np.prod(shape)) * values.itemsize
    buffer = np.full(size + offset, 0xFF, np.uint8)  # NaN wherever no element of ours lies
    array = buffer[offset:].view(values.dtype).reshape(shape)
    array = array.transpose(np.argsort(order))
    forward = [slice(None, n * abs(s), abs(s)) for n, s in zip(values.shape, steps, strict=True)]
    turned = [slice(None, None, 1 if s > 0 else -1) for s in steps]
    array = array[(..., *forward)][(..., *turned)]
    array[...] = values
    if draw(st.booleans()) and array.size:
        strides = [
            HUGE_STRIDE if n == 1 and draw(st.booleans()) else stride
            for n, stride in zip(array.shape, array.strides, strict=True)
        ]
        array = np.lib.stride_tricks.as_strided(array, array.shape, strides)
    if not writable:
        array.flags.writeable = False
    return array


@st.composite
def repeated(draw: st.DrawFn, values: np.ndarray) -> np.ndarray:
    """`values` with some axes turned into zero strides over their first element."""
    index = tuple(slice(0, 1) if draw(st.booleans()) else slice(None) for _ in values.shape)
    if values.size == 0:
        return values
    return np.broadcast_to(values[index], values.shape)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[np.ndarray], dict[str, Any], tuple[int, ...]]:
    """Inputs and options of one call, and the shape of its result."""
    dtype = draw(DTYPES)
    batch = draw(st.sampled_from([(), (1,), (2,), (3, 2), (0,), (2, 1, 2)]))
    num_kv_heads = draw(st.integers(1, 3))
    num_heads = num_kv_heads * draw(st.integers(1, 3))
    seqlen_q, seqlen_k = draw(LENGTHS), draw(LENGTHS)
    head_dim, head_dim_v = draw(WIDTHS), draw(WIDTHS)
    axis = draw(st.sampled_from(["keys", "keys", "queries"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape: int) -> np.ndarray:
        values = rng.standard_normal(shape).astype(dtype)
        return draw(layouts(draw(repeated(values)) if draw(st.booleans()) else values))

    def dropped(shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to `shape`."""
        kept = [1 if draw(st.booleans()) else n for n in shape]
        return tuple(kept[draw(st.integers(0, len(kept))) :])

    def some_batch() -> tuple[int, ...]:
        return batch if draw(st.booleans()) else dropped(batch)

    q = normal(*batch, num_heads, seqlen_q, head_dim)
    k = normal(*some_batch(), num_kv_heads, seqlen_k, head_dim)
    v = normal(*some_batch(), num_kv_heads, seqlen_k, head_dim_v)

    scores_shape = (*batch, num_heads, seqlen_q, seqlen_k)
    out_shape = (*batch, num_heads, seqlen_q, head_dim_v)
    others = [name for name in NAMES if name not in ("softmax_axis", "dropout_p", "dropout_seed")]
    kinds = st.sets(st.sampled_from(others), max_size=6)
    options: dict[str, Any] = {"softmax_axis": axis}
    for kind in sorted(draw(kinds)):
        if kind == "scale":
            options[kind] = draw(st.sampled_from([0.0, -1.5, 0.3, 7.0]))
        elif kind == "softcap":
            options[kind] = draw(st.sampled_from([0.5, 30.0]))
        elif kind == "bias":
            bias = rng.standard_normal(dropped(scores_shape)).astype(draw(DTYPES))
            bias[rng.random(bias.shape) < draw(st.sampled_from([0, 0.2, 1]))] = -np.inf
            options[kind] = draw(layouts(bias))
        elif kind == "alibi_slopes":
            options[kind] = draw(layouts(rng.random((*some_batch(), num_heads))))
        elif kind == "mask":
            density = draw(st.sampled_from([0.0, 0.1, 0.8]))
            options[kind] = draw(layouts(rng.random(dropped(scores_shape)) < density))
        elif kind == "causal":
            options[kind] = True
        elif kind == "window":
            side = st.sampled_from([None, 0, 1, 5, 40, 2**70])
            options[kind] = (draw(side), draw(side))
        elif kind == "q_offset":
            options[kind] = draw(
                st.one_of(
                    st.integers(-10, 70),
                    st.sampled_from([2**80, -(2**80)]),
                    st.just(rng.integers(-10, 70, dropped(batch))),
                )
            )
        elif kind == "kv_lengths":
            options[kind] = rng.integers(0, seqlen_k + 1, dropped(batch))
        elif kind == "segment_ids":
            options[kind] = (
                draw(layouts(rng.integers(-1, 2, (*some_batch(), seqlen_q)))),
                draw(layouts(rng.integers(-1, 2, (*some_batch(), seqlen_k)))),
            )
        elif kind == "sinks" and axis == "keys":
            options[kind] = draw(layouts(rng.standard_normal(num_heads)))
        elif kind == "residual":
            options[kind] = normal(*out_shape)
        elif kind == "num_threads":
            options[kind] = draw(st.integers(1, 4))
        elif kind != "sinks":
            raise NotImplementedError(f"no values of `{kind}`")
    return [q, k, v], options, out_shape


@pytest.mark.slow_on_other_sets
@given(calls(), st.data())
@checked
def test_random_calls(
    call: tuple[list[np.ndarray], dict[str, Any], tuple[int, ...]], data: st.DataObject
) -> None:
    """The result is the reference's within the gauge, and layout and threads leave its bits alone:
    plain copies of everything, on one thread, give the same bytes."""
    qkv, options, out_shape = call
    note(f"{[(x.dtype.name, x.shape, x.strides) for x in qkv]} {options}")
    dtype = qkv[0].dtype
    out = None
    if data.draw(st.booleans(), "out"):
        out = data.draw(layouts(np.full(out_shape, np.nan, dtype), writable=True))
    result, lse = fa.attention(*qkv, return_lse=True, out=out, **options)
    assert out is None or result is out
    assert result.shape == out_shape and result.dtype == lse.dtype == dtype

    options.pop("num_threads", None)
    expected = fa.reference.attention(*qkv, return_lse=True, **options)
    exact = naive_attention(*qkv, **options)
    assert_close(result, lse, expected, exact, MAX_GAUGE)

    copies = {
        name: np.array(x, order="C") if isinstance(x, np.ndarray) else x
        for name, x in options.items()
    }
    copy, copy_lse = fa.attention(
        *(np.array(x, order="C") for x in qkv), return_lse=True, num_threads=1, **copies
    )
    assert result.tobytes() == copy.tobytes()
    assert lse.tobytes() == copy_lse.tobytes()
