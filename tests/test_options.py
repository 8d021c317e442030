"""The table of options holds what is written out elsewhere: signatures, types, the stub, the
operators of PyTorch and the documentation."""

import ast
import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fastattn as fa
from fastattn import _core, _options
from fastattn._backward import attention_and_kept, attention_backward_of_kept
from fastattn._options import (
    ARRAYS,
    BY_NAME,
    CACHE,
    DEFAULTS,
    NAMES,
    OPTIONS,
    PACKED,
    WEIGHTS,
    of_call,
)
from fastattn._selftest import CASES

pytestmark = pytest.mark.any_kernel_set

ROOT = Path(__file__).resolve().parent.parent
# What a function takes besides operands and options.
RESULTS = {"return_lse", "out", "grad_lse", "needs"}
CHOICES = {"rows", "heads", "pool", "reduce"}


def without(names: tuple[str, ...], *left_out: str) -> list[str]:
    return [name for name in names if name not in left_out]


FUNCTIONS: dict[Callable[..., Any], list[str]] = {
    fa.attention: list(of_call(ARRAYS)),
    fa.attention_backward: list(of_call(ARRAYS)),
    fa.attention_varlen: list(of_call(PACKED)),
    fa.attention_varlen_backward: list(of_call(PACKED)),
    fa.attention_weights: list(of_call(WEIGHTS)),
    fa.reference.attention: without(of_call(ARRAYS), "num_threads"),
}


def written_out(function: Callable[..., Any]) -> dict[str, Any]:
    """The options in a signature, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in RESULTS | CHOICES
    }


@pytest.mark.parametrize("function", FUNCTIONS)
def test_signatures_are_the_rows(function: Callable[..., Any]) -> None:
    options = written_out(function)
    assert list(options) == FUNCTIONS[function]
    assert options == {name: BY_NAME[name].default for name in options}


def test_types_are_the_rows() -> None:
    kinds = {
        _options.AttentionOptions: of_call(ARRAYS),
        _options.LayerOptions: without(of_call(ARRAYS), "residual"),
        _options.PackedOptions: of_call(PACKED),
        _options.CacheOptions: of_call(CACHE),
    }
    for options, names in kinds.items():
        assert sorted(options.__annotations__) == sorted([*names, "out"])


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (fa.attention, _options.AttentionOptions),
        (fa.self_attention, _options.LayerOptions),
        (fa.attention_varlen, _options.PackedOptions),
        (fa.KVCache.attention, _options.CacheOptions),
        (fa.PagedKVCache.attention, _options.CacheOptions),
        (fa.MultiHeadAttention.__call__, _options.LayerOptions),
    ],
)
def test_the_type_of_a_result_is_that_of_return_lse(
    function: Callable[..., Any], options: type
) -> None:
    found = [typing.get_type_hints(x, include_extras=True) for x in typing.get_overloads(function)]
    array, both = NDArray[Any], tuple[NDArray[Any], NDArray[Any]]
    assert [(hints["return_lse"], hints["return"]) for hints in found] == [
        (typing.Literal[False], array),
        (typing.Literal[True], both),
        (bool, array | both),
    ]
    assert all(hints["options"] == typing.Unpack[options] for hints in found)


def test_types_of_pytorch_are_the_rows() -> None:
    pytest.importorskip("torch")
    import fastattn.torch

    assert list(fastattn.torch.Options.__annotations__) == list(NAMES)
    assert len(typing.get_overloads(fastattn.torch.attention)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_every_call_refuses_a_wrong_kind_by_name(name: str) -> None:
    """So an option that a function forgets to hand on is found."""
    x = np.zeros((1, 2, 3, 4), np.float32)
    packed = np.zeros((3, 2, 4), np.float32)
    lse = np.zeros((1, 2, 3), np.float32)
    calls: dict[str, list[Callable[..., Any]]] = {
        ARRAYS: [
            lambda **given: fa.attention(x, x, x, **given),
            lambda **given: fa.attention_backward(x, x, x, x, x, lse, **given),
            lambda **given: fa.explain(x, x, x, **given),
        ],
        PACKED: [
            lambda **given: fa.attention_varlen(packed, packed, packed, [0, 3], [0, 3], **given),
            lambda **given: fa.attention_varlen_backward(
                *(packed,) * 5, lse[0], [0, 3], [0, 3], **given
            ),
        ],
        WEIGHTS: [lambda **given: fa.attention_weights(x, x, **given)],
    }
    for kind, functions in calls.items():
        for function in functions:
            if kind in BY_NAME[name].calls:
                with pytest.raises(TypeError, match=rf"`{name}(\[0\])?` must "):
                    function(**{name: object()})
            else:
                with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                    function(**{name: BY_NAME[name].default})


@pytest.mark.parametrize("name", NAMES)
def test_torch_refuses_a_wrong_kind_by_name(name: str) -> None:
    torch = pytest.importorskip("torch")
    import fastattn.torch as ft

    x = torch.zeros(1, 2, 3, 4)
    given = {"dropout_p": 0.5} if name == "dropout_seed" else {}
    calls = [lambda **options: ft.attention(x, x, x, **options)]
    if WEIGHTS in BY_NAME[name].calls:
        calls.append(lambda **options: ft.attention_weights(x, x, **options))
    for call in calls:
        with pytest.raises(TypeError, match=rf"`{name}(\[0\])?` must "):
            call(**given, **{name: object()})


def test_the_self_test_has_every_option() -> None:
    rng = np.random.default_rng(0)
    given = {name for make in CASES.values() for name in make(rng, "float32").options}
    assert given == set(NAMES) - {"num_threads"}  # which every case has


def test_functions_behind_the_doors_refuse_unknown_options() -> None:
    x = np.zeros((1, 2, 3, 4), np.float32)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sofcap'"):
        attention_and_kept(x, x, x, sofcap=1.0)
    out, lse, kept = attention_and_kept(x, x, x)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sofcap'"):
        attention_backward_of_kept(x, x, x, x, out, lse, kept, sofcap=1.0)


def test_as_many_values_as_rows() -> None:
    with pytest.raises(SystemError, match="another number of options"):
        _core.differing((*DEFAULTS, None), DEFAULTS)


def test_fields_are_those_of_the_stub_and_of_the_core() -> None:
    stub = ast.parse((ROOT / "fastattn/_core.pyi").read_text(encoding="utf-8"))
    (problem,) = (
        x for x in stub.body if isinstance(x, ast.ClassDef) and x.name == _core.Problem.__name__
    )
    fields = {
        statement.target.id
        for statement in problem.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    methods = {x.name for x in problem.body if isinstance(x, ast.FunctionDef)}
    public = {name for name in dir(_core.Problem) if not name.startswith("_")}
    assert public == fields | methods - {"__init__"}
    assert {field for option in OPTIONS for field in option.fields} <= fields


def test_the_operators_arguments_are_the_rows() -> None:
    pytest.importorskip("torch")
    from fastattn.torch import _ops

    schema = _ops.FORWARD._schema
    arguments = {argument.name: str(argument.type) for argument in schema.arguments[3:]}
    assert sorted(arguments) == sorted(name for option in OPTIONS for name, _ in option.torch)


def test_the_documentation_has_the_rows() -> None:
    text = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert rows == [*NAMES, "return_lse", "out"]


def test_defaults_of_signatures_are_told_from_what_is_given() -> None:
    written = fa.attention.__kwdefaults__
    assert _core.differing(tuple(written[name] for name in NAMES), DEFAULTS) == []
    given = list(DEFAULTS)
    given[NAMES.index("causal")] = True
    assert _core.differing(tuple(given), DEFAULTS) == [NAMES.index("causal")]
