"""`attention_backward`: every option and shape against the reference, properties, errors."""

from typing import Any

import numpy as np
import pytest
from gradients import (
    NAMES,
    check,
    each_axis,
    gradients_of,
    make,
    random_call,
)

import fastattn as fa

NUM_CALLS = 120
CALLS_PER_TEST = 20


@pytest.mark.parametrize("first", range(0, NUM_CALLS, CALLS_PER_TEST))
def test_random_options(first: int) -> None:
    for seed in range(first, first + CALLS_PER_TEST):
        arrays, options = random_call(np.random.default_rng(seed))
        check(arrays, **options)


# Row tiles are 24 and row blocks 96 rows, key blocks 64 float64, groups of key blocks 1024 keys.
LENGTHS = [(1, 1), (23, 64), (24, 65), (96, 127), (97, 129), (193, 31), (5, 1024), (7, 2100)]


@each_axis
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(lengths: tuple[int, int], axis: str) -> None:
    arrays = make(*lengths, 8, 5, batch=(), heads=(2, 1))
    check(arrays, softmax_axis=axis)
    check(arrays, softmax_axis=axis, causal=True)


@each_axis
def test_many_key_groups_and_rows(axis: str) -> None:
    arrays = make(300, 3300, 4, 4, batch=(), heads=(1, 1))
    check(arrays, softmax_axis=axis)
    check(arrays, softmax_axis=axis, window=(200, 100), q_offset=900)


@each_axis
@pytest.mark.parametrize("dims", [(0, 3), (3, 0), (0, 0), (1, 1), (130, 67), (257, 300)], ids=str)
def test_head_dims(dims: tuple[int, int], axis: str) -> None:
    rng = np.random.default_rng(1)
    arrays = make(9, 70, *dims)
    check(arrays, softmax_axis=axis, bias=rng.standard_normal((4, 9, 70)))


@each_axis
def test_largest_head_dims(axis: str) -> None:
    check(make(5, 40, 1024, 1024, batch=(), heads=(1, 1)), softmax_axis=axis)


@pytest.mark.any_kernel_set
@pytest.mark.parametrize("wide", ["q", "v"])
def test_larger_head_dims_are_refused(wide: str) -> None:
    dims = (1025, 8) if wide == "q" else (8, 1025)
    arrays = make(2, 3, *dims, batch=(), heads=(1, 1))
    name = "head_dim" if wide == "q" else "head_dim_v"
    with pytest.raises(ValueError, match=rf"`{wide}` must have {name} at most 1024.*got 1025"):
        gradients_of(*arrays)


@each_axis
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_no_queries_or_no_keys(lengths: tuple[int, int], axis: str) -> None:
    arrays = make(*lengths, 4, 3)
    bias = np.ones(lengths)
    grads = check(arrays, softmax_axis=axis, bias=bias)
    assert all(not np.any(getattr(grads, name)) for name in ("q", "k", "v", "bias"))


@each_axis
@pytest.mark.parametrize("heads", [(0, 0), (0, 2)], ids=str)
def test_no_heads(heads: tuple[int, int], axis: str) -> None:
    grads = gradients_of(*make(3, 5, 4, 3, heads=heads), softmax_axis=axis, bias=np.ones((3, 5)))
    assert not grads.k.any() and not grads.v.any() and not grads.bias.any()


def test_no_batch_entries() -> None:
    grads = check(make(3, 5, 4, 3, batch=(0,)), bias=np.ones((3, 5)), sinks=np.zeros(4))
    assert not grads.bias.any() and not grads.sinks.any()


@each_axis
def test_two_dimensions_are_one_head(axis: str) -> None:
    grad_out, q, k, v = make(7, 9, 4, 3, batch=(), heads=(1, 1))
    grads = check([x[0] for x in (grad_out, q, k, v)], softmax_axis=axis)
    assert grads.q.shape == (7, 4)


@each_axis
@pytest.mark.parametrize("heads", [(6, 1), (6, 2), (6, 3), (6, 6)], ids=str)
def test_shared_heads(heads: tuple[int, int], axis: str) -> None:
    arrays = make(50, 70, 8, 6, heads=heads)
    check(arrays, softmax_axis=axis, causal=True)


@each_axis
def test_broadcast_leading_dimensions(axis: str) -> None:
    rng = np.random.default_rng(0)
    shapes = [
        ((2, 3), (2, 3), (2, 3)),
        ((2, 3), (3,), (2, 1)),
        ((2, 1), (1, 3), (2, 3)),
        ((3,), (2, 1), ()),
        ((), (2, 3), (3,)),
    ]
    for of_q, of_k, of_v in shapes:
        q = rng.standard_normal((*of_q, 2, 10, 4))
        k = rng.standard_normal((*of_k, 1, 30, 4))
        v = rng.standard_normal((*of_v, 1, 30, 5))
        batch = np.broadcast_shapes(of_q, of_k, of_v)
        grad_out = rng.standard_normal((*batch, 2, 10, 5))
        bias = rng.standard_normal((*batch[-1:], 1, 10, 1))
        check([grad_out, q, k, v], softmax_axis=axis, bias=bias)


BIAS_SHAPES: list[tuple[int, ...]] = [
    (),
    (1,),
    (70,),
    (30, 70),
    (30, 1),
    (1, 70),
    (4, 1, 1),
    (1, 30, 70),
    (4, 30, 70),
    (3, 1, 1, 1),
    (3, 1, 1, 70),
    (3, 1, 30, 70),
    (3, 4, 1, 70),
    (3, 4, 30, 70),
    (2, 1, 1, 1, 1),
    (2, 3, 4, 30, 70),
    (2, 1, 4, 30, 70),
]


@each_axis
@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_bias_shapes(shape: tuple[int, ...], axis: str) -> None:
    arrays = make(30, 70, 8, 6, batch=(2, 3))
    bias = np.random.default_rng(1).standard_normal(shape)
    check(arrays, softmax_axis=axis, bias=bias, softcap=3.0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda d: d.__name__)
def test_bias_of_another_dtype(dtype: Any) -> None:
    """Its gradient has its dtype."""
    arrays = [x.astype(np.float32) for x in make(30, 70, 8, 6)]
    bias = np.random.default_rng(1).standard_normal((4, 1, 70)).astype(dtype)
    grads = gradients_of(*arrays, bias=bias)
    assert grads.bias.dtype == dtype
    expected = fa.reference.attention_backward(*arrays, bias=bias).bias
    unit = np.finfo(np.float16 if dtype == np.float16 else np.float32).eps
    np.testing.assert_allclose(grads.bias, expected, rtol=unit, atol=100 * unit)


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.float64], ids=lambda d: d.__name__)
def test_sinks_of_another_dtype(dtype: Any) -> None:
    arrays = make(30, 70, 8, 6)
    sinks = np.array([0, 1, -1, 2], dtype)
    grads = gradients_of(*arrays, sinks=sinks)
    assert grads.sinks.dtype == (np.float64 if dtype == np.int64 else dtype)
    expected = fa.reference.attention_backward(*arrays, sinks=sinks).sinks
    np.testing.assert_allclose(grads.sinks, expected, rtol=1e-5 if dtype == np.float32 else 1e-10)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda d: d.__name__)
def test_dtypes_and_shapes_are_the_arguments(dtype: Any) -> None:
    arrays = [x.astype(dtype) for x in make(3, 5, 4, 6)]
    grads = gradients_of(*arrays)
    for name, x in zip("qkv", arrays[1:], strict=True):
        gradient = getattr(grads, name)
        assert gradient.dtype == dtype and gradient.shape == x.shape
    k = arrays[2][:1]
    assert gradients_of(arrays[0], arrays[1], k, arrays[3]).k.shape == k.shape


# ---- needs ---------------------------------------------------------------------------------------


@each_axis
def test_needs(axis: str) -> None:
    """What is not needed is None and changes nothing else."""
    arrays = make(30, 70, 8, 6)
    options: dict[str, Any] = {"bias": np.ones((30, 70)), "softmax_axis": axis}
    if axis == "keys":
        options["sinks"] = np.zeros(4)
    out, lse = fa.attention(*arrays[1:], return_lse=True, **options)
    whole = fa.attention_backward(*arrays, out, lse, **options)
    given = NAMES if axis == "keys" else NAMES[:4]
    for needs in [(), *((name,) for name in given), ("k", "v"), ("q", "bias"), given[::-1]]:
        part = fa.attention_backward(*arrays, out, lse, needs=needs, **options)
        for name in NAMES:
            x = getattr(part, name)
            if name in needs:
                assert np.array_equal(x, getattr(whole, name)), (needs, name)
            else:
                assert x is None, (needs, name)


# ---- properties ----------------------------------------------------------------------------------


@each_axis
def test_gradients_of_scores_sum_to_0(axis: str) -> None:
    """A shift of all scores of a softmax changes nothing."""
    arrays = make(40, 70, 8, 6)
    bias = np.random.default_rng(1).standard_normal((2, 4, 40, 70))
    grads = gradients_of(*arrays, bias=bias, causal=True, softmax_axis=axis)
    sums = grads.bias.sum(axis=-1 if axis == "keys" else -2)
    assert np.abs(sums).max() < 1e-13
    assert np.abs(grads.bias).max() > 0.1


@each_axis
def test_order_of_keys(axis: str) -> None:
    grad_out, q, k, v = make(40, 150, 8, 6)
    order = np.random.default_rng(1).permutation(150)
    plain = gradients_of(grad_out, q, k, v, softmax_axis=axis)
    moved = gradients_of(grad_out, q, k[..., order, :], v[..., order, :], softmax_axis=axis)
    np.testing.assert_allclose(moved.q, plain.q, atol=1e-13)
    np.testing.assert_allclose(moved.k, plain.k[..., order, :], atol=1e-13)
    np.testing.assert_allclose(moved.v, plain.v[..., order, :], atol=1e-13)


def test_gradient_of_values_sums_to_that_of_out() -> None:
    """The weights of a row sum to one: moving all values moves out alike."""
    arrays = make(40, 150, 8, 6, heads=(2, 2))
    grads = gradients_of(*arrays)
    np.testing.assert_allclose(grads.v.sum(axis=-2), arrays[0].sum(axis=-2), atol=1e-12)


def test_parts_of_the_keys_merge() -> None:
    """Through merge_attention: gradients of two halves, each given the whole's out and lse."""
    grad_out, q, k, v = make(40, 150, 8, 6)
    out, lse = fa.attention(q, k, v, return_lse=True)
    whole = fa.attention_backward(grad_out, q, k, v, out, lse)
    halves = [
        fa.attention_backward(grad_out, q, k[..., part, :], v[..., part, :], out, lse)
        for part in (slice(0, 64), slice(64, 150))
    ]
    np.testing.assert_allclose(halves[0].q + halves[1].q, whole.q, atol=1e-13)
    for name in "kv":
        joined = np.concatenate([getattr(half, name) for half in halves], axis=-2)
        np.testing.assert_allclose(joined, getattr(whole, name), atol=1e-13)


# ---- packed sequences ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "softcap": 2.0},
        {"window": (9, 3), "alibi_slopes": np.array([0.1, 0.2, 0.0, 1.0])},
        {"sinks": np.array([0.0, 1.0, -1.0, 2.0]), "scale": 0.2},
        {"needs": ("k",)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
def test_packed_sequences_equal_calls_alone(options: dict[str, Any], dtype: Any) -> None:
    """Bit for bit; sinks, summed in another order, all but."""
    rng = np.random.default_rng(0)
    starts_q, starts_k = [0, 5, 5, 105, 130], [0, 33, 60, 60, 260]
    q = rng.standard_normal((130, 4, 8)).astype(dtype)
    k = rng.standard_normal((260, 2, 8)).astype(dtype)
    v = rng.standard_normal((260, 2, 6)).astype(dtype)
    grad_out = rng.standard_normal((130, 4, 6)).astype(dtype)
    grad_lse = rng.standard_normal((4, 130)).astype(dtype)
    forward = {name: x for name, x in options.items() if name != "needs"}
    out, lse = fa.attention_varlen(q, k, v, starts_q, starts_k, return_lse=True, **forward)
    packed = fa.attention_varlen_backward(
        grad_out, q, k, v, out, lse, starts_q, starts_k, grad_lse=grad_lse, **options
    )
    sinks = np.zeros(4)
    for i in range(4):
        rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        one = [x.swapaxes(0, 1) for x in (grad_out[rows], q[rows], k[keys], v[keys])]
        alone = fa.attention_backward(
            *one,
            out[rows].swapaxes(0, 1),
            lse[:, rows],
            grad_lse=grad_lse[:, rows],
            **options,
        )
        for name, part in (("q", rows), ("k", keys), ("v", keys)):
            x, y = getattr(packed, name), getattr(alone, name)
            if "needs" in options and name not in options["needs"]:
                assert x is None
                continue
            assert np.array_equal(x[part].swapaxes(0, 1), y), (i, name)
        if alone.sinks is not None:
            sinks += alone.sinks
    if packed.sinks is not None:
        np.testing.assert_allclose(packed.sinks, sinks, rtol=1e-6)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.any_kernel_set
def test_errors_name_the_argument() -> None:
    grad_out, q, k, v = (x.astype(np.float32) for x in make(3, 5, 4, 6))
    out, lse = fa.attention(q, k, v, return_lse=True)

    def call(**changed: Any) -> Any:
        arguments = {"grad_out": grad_out, "q": q, "k": k, "v": v, "out": out, "lse": lse}
        return fa.attention_backward(**{**arguments, **changed})

    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "grad_out", {"grad_out": grad_out[:1]}),
        (TypeError, "grad_out", {"grad_out": grad_out.astype(np.float64)}),
        (ValueError, "out", {"out": out[..., :2]}),
        (TypeError, "out", {"out": out.astype(np.float64)}),
        (ValueError, "lse", {"lse": lse[..., :2]}),
        (TypeError, "lse", {"lse": lse.astype(np.float64)}),
        (ValueError, "grad_lse", {"grad_lse": lse[..., :2]}),
        (TypeError, "grad_lse", {"grad_lse": lse.astype(np.float64)}),
        (ValueError, "needs", {"needs": ("q", "mask")}),
        (TypeError, "needs", {"needs": "qk"}),
        (ValueError, "k", {"k": k[..., :3]}),
        (TypeError, "v", {"v": v.astype(np.float64)}),
        (ValueError, "dropout_p", {"dropout_p": 1.5}),
        (ValueError, "dropout_seed", {"dropout_p": 0.5, "dropout_seed": -1}),
        (ValueError, "residual", {"residual": out[:1]}),
        (ValueError, "sinks", {"sinks": np.zeros(3)}),
        (ValueError, "bias", {"bias": np.zeros((3, 3))}),
        (ValueError, "num_threads", {"num_threads": 0}),
    ]
    for error, name, changed in refused:
        with pytest.raises(error, match=f"`{name}`"):
            call(**changed)


@pytest.mark.any_kernel_set
def test_errors_of_packed_sequences_name_the_argument() -> None:
    rng = np.random.default_rng(0)
    q, k, v, grad_out = rng.standard_normal((4, 10, 2, 8))
    out, lse = fa.attention_varlen(q, k, v, [0, 10], [0, 10], return_lse=True)

    def call(**changed: Any) -> Any:
        arguments: dict[str, Any] = {
            "grad_out": grad_out,
            "q": q,
            "k": k,
            "v": v,
            "out": out,
            "lse": lse,
            "cu_seqlens_q": [0, 10],
            "cu_seqlens_k": [0, 10],
        }
        return fa.attention_varlen_backward(**{**arguments, **changed})

    for name, changed in {
        "grad_out": {"grad_out": grad_out[:9]},
        "out": {"out": out[:, :1]},
        "lse": {"lse": lse.swapaxes(0, 1)},
        "cu_seqlens_q": {"cu_seqlens_q": [0, 11]},
        "needs": {"needs": ["bias?"]},
    }.items():
        with pytest.raises(ValueError, match=f"`{name}`"):
            call(**changed)


def test_inputs_are_read_only() -> None:
    arrays = make(40, 70, 8, 6)
    bias = np.random.default_rng(1).standard_normal((40, 1))
    out, lse = fa.attention(*arrays[1:], bias=bias, return_lse=True)
    given = [*arrays, out, lse, bias]
    copies = [x.copy() for x in given]
    for x in given:
        x.flags.writeable = False
    fa.attention_backward(*arrays, out, lse, bias=bias)
    assert all(np.array_equal(x, y) for x, y in zip(given, copies, strict=True))
