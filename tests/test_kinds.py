"""What is an array and what is a number: all else is a TypeError that names the argument, and one
number means the same in every type that holds it."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import fastattn as fa

pytestmark = pytest.mark.any_kernel_set

X = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
OUT, LSE = fa.attention(X, X, X, return_lse=True)
PACKED = X.swapaxes(0, 1)
STARTS = np.array([0, 2, 5])
EYE = np.eye(8, dtype=np.float32)


class Unreadable:
    """What NumPy cannot make an array of, as a tensor with a gradient or on another device."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise self.error("call detach() first")


def attention(name: str, x: Any) -> Any:
    given = {"q": X, "k": X, "v": X} | {name: x}
    return fa.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def backward(name: str, x: Any) -> Any:
    given = {"grad_out": X, "q": X, "k": X, "v": X, "out": OUT, "lse": LSE} | {name: x}
    return fa.attention_backward(**given)


def varlen(name: str, x: Any) -> Any:
    given = {"q": PACKED, "k": PACKED, "v": PACKED}
    given |= {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, name: x}
    return fa.attention_varlen(**given)


def self_attention(name: str, x: Any) -> Any:
    return fa.self_attention(x)


def explain(name: str, x: Any) -> Any:
    given = {"q": X, "k": X, "v": X} | {name: x}
    return fa.explain(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def merge(name: str, x: Any) -> Any:
    return fa.merge_attention(*({"outs": [OUT], "lses": [LSE]} | {name[:-3]: [x]}).values())


def layer(name: str, x: Any) -> Any:
    weights = {"w_q": EYE, "w_k": EYE, "w_v": EYE}
    if name in weights:
        return fa.MultiHeadAttention(**weights | {name: x}, num_heads=2)
    return fa.MultiHeadAttention(**weights, num_heads=2)(x)


def cache(name: str, x: Any) -> Any:
    made = fa.KVCache(1, 2, 5, 8)
    given = {"k": X[None], "v": X[None]}
    if name == "q":
        made.append(**given)
        return made.attention(x)
    return made.append(**given | {name: x})


ARRAYS: list[tuple[Callable[[str, Any], Any], str]] = [
    *((attention, name) for name in ("q", "k", "v", "bias", "mask", "sinks", "alibi_slopes")),
    *((attention, name) for name in ("q_offset", "kv_lengths", "residual", "out")),
    *((backward, name) for name in ("grad_out", "q", "k", "v", "out", "lse", "grad_lse", "bias")),
    *((varlen, name) for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "q_offset")),
    *((explain, name) for name in ("q", "k", "v", "bias", "mask")),
    (self_attention, "x"),
    (merge, "outs[0]"),
    (merge, "lses[0]"),
    *((layer, name) for name in ("w_q", "w_k", "w_v", "q")),
    *((cache, name) for name in ("k", "v", "q", "counts")),
]
each_array = pytest.mark.parametrize(
    ("call", "name"), [pytest.param(f, n, id=f"{f.__name__}-{n}") for f, n in ARRAYS]
)


def refused(name: str, call: Callable[[str, Any], Any], x: Any) -> str:
    with pytest.raises(TypeError) as caught:
        call(name, x)
    message = str(caught.value)
    assert message.startswith(f"`{name}` must "), message
    return message


@each_array
@pytest.mark.parametrize("error", [RuntimeError, TypeError, AttributeError, BufferError])
def test_what_numpy_cannot_read(
    error: type[Exception], call: Callable[[str, Any], Any], name: str
) -> None:
    message = refused(name, call, Unreadable(error))
    if name != "out" or call is not attention:
        assert message.endswith("got a Unreadable: call detach() first")


@each_array
def test_memory_that_ends_while_an_array_is_made(
    call: Callable[[str, Any], Any], name: str
) -> None:
    if call is attention and name == "out":
        pytest.skip("must be an array already")
    with pytest.raises(MemoryError):
        call(name, Unreadable(MemoryError))


@each_array
@pytest.mark.parametrize(
    "dtype", ["complex64", "object", "M8[s]", "m8[s]", "V4", "U3", "S3", [("a", "f4")]], ids=str
)
def test_dtypes_that_are_no_numbers(dtype: Any, call: Callable[[str, Any], Any], name: str) -> None:
    refused(name, call, np.zeros((2, 5, 8), dtype))


@each_array
@pytest.mark.parametrize("kind", ["requires_grad", "bfloat16", "meta", "sparse"])
def test_tensors_that_numpy_cannot_read(
    kind: str, call: Callable[[str, Any], Any], name: str
) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(2, 5, 8)
    if kind == "requires_grad":
        tensor.requires_grad_()
    elif kind == "bfloat16":
        tensor = tensor.to(torch.bfloat16)
    else:
        tensor = tensor.to_sparse() if kind == "sparse" else tensor.to("meta")
    refused(name, call, tensor)


# --- numbers ----------------------------------------------------------------------------------


def ml(name: str) -> Any:
    return getattr(pytest.importorskip("ml_dtypes"), name)


def a_cache(**given: Any) -> Any:
    sizes = {"batch_size": 2, "num_kv_heads": 2, "max_seqlen": 2, "head_dim": 2, **given}
    made = fa.KVCache(**sizes)
    ones = np.ones((made.batch_size, made.num_kv_heads, 1, made.head_dim), np.float32)
    made.append(ones, ones)
    return made.attention(ones)


def pages(**given: Any) -> Any:
    sizes = {"num_pages": 2, "page_size": 2, "num_kv_heads": 2, "head_dim": 2, **given}
    made = fa.PagedKVCache(**sizes)
    return made.num_free_pages, made.page_size, made.nbytes


def shortened(**given: Any) -> Any:
    made = fa.PagedKVCache(4, 2, 1, 1)
    ones = np.ones((1, 4, 1), np.float32)
    ids = [made.add(ones, ones) for _ in range(2)]
    made.truncate(seq_ids=ids, **given)
    return made.lengths(ids)


def heads(**given: Any) -> Any:
    return fa.MultiHeadAttention(EYE, EYE, EYE, **given)(X)


INTEGERS: dict[str, Callable[[Any], Any]] = {
    "num_threads": lambda n: fa.attention(X, X, X, num_threads=n),
    "dropout_seed": lambda n: fa.attention(X, X, X, dropout_p=0.5, dropout_seed=n),
    "q_offset": lambda n: fa.attention(X, X, X, causal=True, q_offset=n),
    "kv_lengths": lambda n: fa.attention(X, X, X, kv_lengths=n),
    "window left": lambda n: fa.attention(X, X, X, window=(n, 0)),
    "window right": lambda n: fa.attention(X, X, X, window=(None, n)),
    "num_heads": lambda n: fa.self_attention(X, num_heads=n),
    "num_heads of a layer": lambda n: heads(num_heads=n),
    "num_kv_heads of a layer": lambda n: heads(num_heads=2, num_kv_heads=n),
    "batch_size": lambda n: a_cache(batch_size=n),
    "num_kv_heads": lambda n: a_cache(num_kv_heads=n),
    "max_seqlen": lambda n: a_cache(max_seqlen=n),
    "head_dim": lambda n: a_cache(head_dim=n),
    "window_tokens": lambda n: a_cache(window_tokens=n),
    "sink_tokens": lambda n: a_cache(window_tokens=1, sink_tokens=n, max_seqlen=4),
    "num_pages": lambda n: pages(num_pages=n),
    "page_size": lambda n: pages(page_size=n),
    "lengths": lambda n: shortened(lengths=n),
}
REALS: dict[str, Callable[[Any], Any]] = {
    "scale": lambda x: fa.attention(X, X, X, scale=x),
    "softcap": lambda x: fa.attention(X, X, X, softcap=x),
    "dropout_p": lambda x: fa.attention(X, X, X, dropout_p=x, dropout_seed=3),
    "scale of packed": lambda x: fa.attention_varlen(
        PACKED, PACKED, PACKED, STARTS, STARTS, scale=x
    ),
}
INTEGER_FORMS: dict[str, Callable[[int], Any]] = {
    "int8": np.int8,
    "uint64": np.uint64,
    "array of int64": np.array,
    "array of uint8": lambda n: np.array(n, np.uint8),
    "int4": lambda n: ml("int4")(n),
    "array of int4": lambda n: np.array(n).astype(ml("int4")),
    "tensor": lambda n: pytest.importorskip("torch").tensor(n),
}
REAL_FORMS: dict[str, Callable[[float], Any]] = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "longdouble": np.longdouble,
    "Fraction": Fraction,
    "array of float64": np.array,
    "array of float16": lambda x: np.array(x, np.float16),
    "bfloat16": lambda x: ml("bfloat16")(x),
    "array of bfloat16": lambda x: np.array(x).astype(ml("bfloat16")),
    "float8": lambda x: ml("float8_e4m3fn")(x),
    "tensor": lambda x: pytest.importorskip("torch").tensor(x),
}
NO_NUMBERS = {
    "bool": True,
    "bool_": np.True_,
    "array of bool": np.array(True),
    "complex": 2j,
    "complex64": np.complex64(2),
    "str": "2",
    "timedelta64": np.timedelta64(2, "s"),
    "datetime64": np.datetime64(2, "s"),
    "void": np.void(b"2"),
    "array of object": np.array(2, object),
    "array of one dimension": np.array([2]),
    "masked": np.ma.masked,
    "unreadable": Unreadable(RuntimeError),
}


@pytest.mark.parametrize("form", INTEGER_FORMS)
@pytest.mark.parametrize("option", INTEGERS)
def test_integers_in_every_form(option: str, form: str) -> None:
    call = INTEGERS[option]
    np.testing.assert_array_equal(call(INTEGER_FORMS[form](2)), call(2))


@pytest.mark.parametrize("form", [*INTEGER_FORMS, *REAL_FORMS])
@pytest.mark.parametrize("option", REALS)
def test_reals_in_every_form(option: str, form: str) -> None:
    call = REALS[option]
    if form in INTEGER_FORMS:
        np.testing.assert_array_equal(call(INTEGER_FORMS[form](1)), call(1.0))
    else:
        np.testing.assert_array_equal(call(REAL_FORMS[form](0.25)), call(0.25))


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize("option", [*INTEGERS, *REALS])
def test_what_is_no_number(option: str, kind: str) -> None:
    name = option.split()[0]
    # Of what has a number for each batch entry or sequence, an array has a wrong shape.
    arrays = kind == "array of one dimension" and name in ("q_offset", "kv_lengths", "lengths")
    with pytest.raises(ValueError if arrays else TypeError, match=f"^`{name}` must "):
        (INTEGERS | REALS)[option](NO_NUMBERS[kind])


@pytest.mark.parametrize("option", INTEGERS)
@pytest.mark.parametrize("x", [2.0, np.float32(2), np.array(2.0), Fraction(2)], ids=repr)
def test_what_is_no_integer(x: Any, option: str) -> None:
    with pytest.raises(TypeError, match=f"^`{option.split()[0]}` must .*int"):
        INTEGERS[option](x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int4"])
@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_numbers_of_heads_in_types_of_ml_dtypes(name: str, dtype: str) -> None:
    numbers = np.array([1.0, -2.0])
    narrow = numbers.astype(ml(dtype))
    found = fa.attention(X, X, X, **{name: narrow})
    np.testing.assert_array_equal(found, fa.attention(X, X, X, **{name: numbers}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int4"])
def test_gradients_by_sinks_in_types_of_ml_dtypes(dtype: str) -> None:
    numbers = np.array([1.0, -2.0])
    out, lse = fa.attention(X, X, X, sinks=numbers, return_lse=True)
    narrow = numbers.astype(ml(dtype))
    exact = fa.attention_backward(X, X, X, X, out, lse, sinks=numbers).sinks
    found = fa.attention_backward(X, X, X, X, out, lse, sinks=narrow).sinks
    # As of the other integers: a gradient is none.
    of = np.dtype(np.float64) if dtype == "int4" else narrow.dtype
    assert found is not None and exact is not None
    assert found.dtype == of
    np.testing.assert_array_equal(found, exact.astype(of))
