"""`fastattn::attention` and `fastattn::attention_backward`: the operators behind `fastattn.torch`.

Where there will be a backward pass, `fastattn::attention_and_kept` does what `fastattn::attention`
does, and returns what the backward pass can use besides.  Each operator has a CPU kernel, which
hands NumPy views of the tensors to the package's functions of arrays; a fake one, which knows
shapes and strides, for ``torch.compile`` and ``torch.export``; and rules for autograd, autocast and
vmap.  Tensors are never copied.  The operators are registered with `torch.library.Library`, whose
dispatch takes half the time of `custom_op`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from fastattn._attention import attention
from fastattn._backward import (
    MAX_HEAD_DIM,
    Kept,
    attention_and_kept,
    attention_backward_of_kept,
)
from fastattn._options import OPTIONS, Option
from fastattn._validate import BFLOAT16_BITS, real_array

Array = NDArray[Any]
# What has a gradient, in the order of the operators' arguments.
DIFFERENTIABLE = ("q", "k", "v", *(option.name for option in OPTIONS if option.gradient))
_ARGUMENTS = {
    name: kind
    for option in sorted(OPTIONS, key=lambda option: not option.gradient)
    for name, kind in option.torch
}
_OPTION_OF = {name: option for option in OPTIONS for name, _ in option.torch}
# Tensors come first.
TENSOR_OPTIONS = tuple(name for name, kind in _ARGUMENTS.items() if kind == "Tensor?")
PLAIN_OPTIONS = {name: kind for name, kind in _ARGUMENTS.items() if kind != "Tensor?"}
ARGUMENTS = (*TENSOR_OPTIONS, *PLAIN_OPTIONS)
DEFAULTS = dict.fromkeys(ARGUMENTS) | {
    option.name: option.default for option in OPTIONS if option.default is not None
}
RESIDUAL = 3 + TENSOR_OPTIONS.index("residual")
# "meta" tensors have shapes alone, for which the fake kernels are enough.
DEVICES = ("cpu", "meta")

_OPTIONS_SCHEMA = ", ".join(
    [f"Tensor? {name}" for name in TENSOR_OPTIONS]
    + [f"{kind} {name}" for name, kind in PLAIN_OPTIONS.items()]
)

LIBRARY = torch.library.Library("fastattn", "DEF")
LIBRARY.define(f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS_SCHEMA}) -> (Tensor, Tensor)")
LIBRARY.define(f"attention_and_kept(Tensor q, Tensor k, Tensor v, {_OPTIONS_SCHEMA}) -> Tensor[]")
LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, "
    "Tensor weighing, Tensor? exact, "
    f"Tensor q, Tensor k, Tensor v, {_OPTIONS_SCHEMA}, bool[] needs) -> Tensor[]"
)
FORWARD = torch.ops.fastattn.attention.default
FORWARD_AND_KEPT = torch.ops.fastattn.attention_and_kept.default
BACKWARD = torch.ops.fastattn.attention_backward.default


# --- tensors and arrays -----------------------------------------------------------------------


def out_of_place(x: Tensor, like: Tensor, like_name: str) -> str:
    """What is wrong with where `x` lies, for an error after its name; empty if nothing is.

    `like` is the tensor that the others go by, which may be `x` itself.
    """
    if x.is_nested or x.layout != torch.strided:
        return f"must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}"
    if x.device != like.device:
        return f"must be on {like.device} like `{like_name}`, got {x.device}"
    if x.device.type not in DEVICES:
        return f"must be on the CPU, got {x.device}"
    return ""


def as_array(tensor: Tensor) -> Array:
    """The memory of a CPU tensor, or a copy with the signs that a lazy negation only notes."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.dtype is torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(BFLOAT16_BITS)
    array: Array = tensor.numpy()
    return array


def as_tensor(array: Array) -> Tensor:
    if array.dtype is BFLOAT16_BITS:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _named(arguments: Iterable[Any]) -> dict[str, Any]:
    return dict(zip(ARGUMENTS, arguments, strict=True))


def numpy_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the operators as options of `fastattn.attention`, as far as they are given."""
    options: dict[str, Any] = {}
    for option in dict.fromkeys(_OPTION_OF[name] for name in arguments):
        found = [arguments.get(name) for name, _ in option.torch]
        if all(x is None for x in found):
            continue
        values = [as_array(_exact(option, x)) if isinstance(x, Tensor) else x for x in found]
        if option.name == "dropout_seed":
            # A tensor has no unsigned 64 bits.
            values = [int(x.item()) % 2**64 for x in found if x is not None]
        if len(option.fields) > 1:
            options[option.name] = tuple(values)
        else:  # `q_offset` is a number or a tensor
            options[option.name] = next(x for x in values if x is not None)
    return options


def _exact(option: Option, tensor: Tensor) -> Tensor:
    """The tensor, but float32 where NumPy's side takes any real numbers, and would take the bits of
    bfloat16 for integers."""
    few = option.check is real_array and tensor.dtype is torch.bfloat16
    return tensor.float() if few else tensor


def _empty_like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor with the strides of ``_results.empty_result``."""
    if x.is_contiguous() or x.dim() != len(shape):
        return x.new_empty(shape)
    strides = [stride or sys.maxsize for stride in x.stride()]
    order = sorted(range(x.dim()), key=strides.__getitem__, reverse=True)
    result = x.new_empty([shape[axis] for axis in order])
    return result.permute([order.index(axis) for axis in range(x.dim())])


# --- calls that PyTorch has no part in -----------------------------------------------------------
# Its dispatcher would only hand them on to the CPU kernel, and takes longer than a short call.


# What tells sets of dispatch keys apart: early versions have no number of a set, and compare none.
_told_apart = getattr(torch._C.DispatchKeySet, "raw_repr", repr)
# The dispatch keys that every call of a thread has, within torch.inference_mode and elsewhere.
_INFERENCE = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_ELSEWHERE = _INFERENCE | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_KEYS_OF_NO_MODE = (_told_apart(_INFERENCE), _told_apart(_ELSEWHERE))

_keys_of_thread = torch._C._dispatch_tls_local_include_set
_num_function_modes = torch._C._len_torch_function_stack
_is_profiled = torch.autograd._profiler_enabled


def bare_arrays(*tensors: Any) -> list[Array] | None:
    """What `as_array` makes of tensors, or None where PyTorch has a part in calls of them: by a
    gradient, a mode, a compiler, a tracer, a transform, autocast or a profiler, or because one is
    no plain memory of the CPU."""
    if (
        torch.compiler.is_compiling()
        or _told_apart(_keys_of_thread()) not in _KEYS_OF_NO_MODE
        or _num_function_modes()
        or forward_ad._current_level >= 0
        or _is_profiled()
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    graph = torch.is_grad_enabled()
    arrays = []
    for x in tensors:
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
            return None
        if x.requires_grad and graph:
            return None
        try:
            arrays.append(as_array(x) if x.dtype is torch.bfloat16 else x.numpy())
        except (RuntimeError, TypeError):  # it refuses whatever is no plain memory
            return None
    return arrays


# --- the forward pass -------------------------------------------------------------------------


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    arrays = map(as_array, (q, k, v))
    out, lse = attention(*arrays, return_lse=True, **numpy_options(_named(options)))
    return as_tensor(out), as_tensor(lse)


def attend_arrays(arrays: list[Array], options: dict[str, Any]) -> Tensor:
    """`out` of `bare_arrays`, with options of `fastattn.attention`."""
    return as_tensor(attention(*arrays, **options))


def _forward_and_kept(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> list[Tensor]:
    """`out`, `lse`, and the arrays of `Kept` that are there."""
    out, lse, kept = attention_and_kept(
        as_array(q), as_array(k), as_array(v), **numpy_options(_named(options))
    )
    return [as_tensor(x) for x in (out, lse, *kept) if x is not None]


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    # Also the kernel of calls with any tensor on "meta", whose result would never be written.
    for name, x in zip(("k", "v", *TENSOR_OPTIONS), (k, v, *options), strict=False):
        if x is not None and x.device != q.device:
            raise TypeError(f"`{name}` {out_of_place(x, q, 'q')}")
    if q.dim() == k.dim() == v.dim() == 2:
        lead: tuple[int, ...] = ()
    else:
        lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        lead = (*lead, q.shape[-3] if q.dim() > 2 else 1)
    over_queries = options[ARGUMENTS.index("softmax_axis")] == "queries"
    rows = k.shape[-2] if over_queries else q.shape[-2]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = _empty_like(q, (*lead, q.shape[-2], v.shape[-1]))
    return out, q.new_empty((*lead, rows), dtype=lse_dtype)


def _fake_forward_and_kept(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> list[Tensor]:
    out, lse = _fake_forward(q, k, v, *options)
    given = _named(options)
    results = [out, lse, lse.new_empty((*lse.shape, 2))]
    has_exact_out = out.dtype == lse.dtype and given["residual"] is None
    if not (has_exact_out or given["softmax_axis"] == "queries"):
        results.append(lse.new_empty(out.shape))
    return results


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    for index, name in enumerate(TENSOR_OPTIONS, 3):
        if ctx.needs_input_grad[index] and name not in (*DIFFERENTIABLE, "residual"):
            raise ValueError(f"`{name}` must not require a gradient: it has none, detach it")
    for name, x in (("head_dim", inputs[0]), ("head_dim_v", inputs[2])):
        if x.shape[-1] > MAX_HEAD_DIM:  # said now, not after the forward pass of a whole model
            raise ValueError(
                f"{name} must be at most {MAX_HEAD_DIM} for gradients, got {x.shape[-1]}"
            )
    end = 3 + len(TENSOR_OPTIONS)
    ctx.mark_non_differentiable(*output[2:])
    exact = output[3] if len(output) > 3 else None
    ctx.save_for_backward(*output[:3], exact, *inputs[:end])
    ctx.plain_options = inputs[end:]
    ctx.set_materialize_grads(False)


def _autograd_backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad_out is None and grad_lse is None:
        return tuple(gradients)
    backward = BACKWARD
    if transforms_active():
        backward = _AttentionBackward.apply  # every transform asks for a graph, used or not
    elif torch.is_grad_enabled():
        raise NotImplementedError(SECOND_DERIVATIVES)
    out, *results_and_inputs = ctx.saved_tensors
    if grad_out is None:
        grad_out = out.new_zeros(()).expand(out.shape)
    # `q`, `k`, `v`, `bias` and `sinks` are the first of the arguments.
    needs = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
    if any(needs):
        arguments = (grad_out, grad_lse, out, *results_and_inputs, *ctx.plain_options, needs)
        computed = iter(backward(*arguments))
        gradients[: len(needs)] = [next(computed) if need else None for need in needs]
    if ctx.needs_input_grad[RESIDUAL]:
        gradients[RESIDUAL] = grad_out
    return tuple(gradients)


# --- the backward pass ------------------------------------------------------------------------

SECOND_DERIVATIVES = (
    "fastattn has no second derivatives (create_graph=True): compute this attention with "
    "torch.nn.functional.scaled_dot_product_attention under "
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    weighing: Tensor,
    exact: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> list[Tensor]:
    *options, needs = rest
    inputs = (q, k, v, *options[: len(DIFFERENTIABLE) - 3])
    wanted = {name: x for name, x, need in zip(DIFFERENTIABLE, inputs, needs, strict=True) if need}
    gradients = attention_backward_of_kept(
        as_array(grad_out),
        as_array(q),
        as_array(k),
        as_array(v),
        as_array(out),
        as_array(lse),
        Kept(as_array(weighing), None if exact is None else as_array(exact)),
        grad_lse=None if grad_lse is None else as_array(grad_lse),
        needs=tuple(wanted),
        **numpy_options(_named(options)),
    )
    return [_laid_out(as_tensor(getattr(gradients, name)), x) for name, x in wanted.items()]


def _laid_out(gradient: Tensor, x: Tensor) -> Tensor:
    """A gradient with the dtype and strides that were foretold."""
    if gradient.dtype == x.dtype and gradient.is_contiguous() and x.is_contiguous():
        return gradient
    expected = _empty_like(x, x.shape)
    if gradient.dtype == x.dtype and gradient.stride() == expected.stride():
        return gradient
    return expected.copy_(gradient)


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    weighing: Tensor,
    exact: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    inputs, needs = rest[: len(DIFFERENTIABLE)], rest[-1]
    return [_empty_like(x, x.shape) for x, need in zip(inputs, needs, strict=True) if need]


# --- autograd and transforms of torch.func ----------------------------------------------------
# Transforms take functions with a rule for autograd, but no operators.


def transforms_active() -> bool:
    active: bool = torch._C._are_functorch_transforms_active()
    return active


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return tuple(FORWARD_AND_KEPT(*args))

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_autograd_backward)


class _AttentionBackward(torch.autograd.Function):  # type: ignore[misc]
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return tuple(BACKWARD(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """There is nothing to keep: second derivatives are refused."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError(SECOND_DERIVATIVES)


def _wants_gradients(args: tuple[Any, ...]) -> bool:
    tensors = [x for x in args if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    return has_tangent(tensors)  # for which PyTorch says that the functions have no rule


def has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a derivative in forward mode is asked for."""
    return forward_ad._current_level >= 0 and any(
        x is not None and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None
        for x in tensors
    )


def _autograd_rule(operator: Any, function: Any, result: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.library.register_autograd`` does, whose way to read a schema takes 0.2 ms."""

    def rule(keyset: Any, *args: Any) -> Any:
        if _wants_gradients(args):
            return result(function.apply(*args))
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return rule


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`fastattn::attention` with some of `ARGUMENTS`, also in transforms of `torch.func`."""
    arguments = (q, k, v, *(DEFAULTS | options).values())
    if not torch.compiler.is_compiling() and transforms_active():
        return _without_kept(_Attention.apply(*arguments))
    result: tuple[Tensor, Tensor] = FORWARD(*arguments)
    return result


def _without_kept(results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    out, lse, *_ = results
    return out, lse


# --- autocast and vmap ------------------------------------------------------------------------


def _autocast_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """In the region's dtype, as PyTorch's attention is; what is added to the scores is kept."""
    given = _named(options)
    given["residual"] = autocast(given["residual"])
    q, k, v = map(autocast, (q, k, v))
    with torch.autocast("cpu", enabled=False):
        result: tuple[Tensor, Tensor] = FORWARD(q, k, v, *given.values())
    return result


def autocast(x: Any) -> Any:
    """`x` as an autocast region that is in effect hands it to PyTorch's attention.

    Only floats are cast, and no float64.
    """
    if not isinstance(x, Tensor) or not x.is_cpu or not x.is_floating_point():
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype("cpu"))


def _vmap_rule(operator: Any, fake: Any) -> Callable[..., Any]:
    """The rule for `torch.vmap`."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        stacked = _one_by_one(operator, fake, info.batch_size, in_dims, args)
        return stacked, type(stacked)(0 for _ in stacked)

    return rule


def _one_by_one(
    operator: Any, fake: Any, size: int, dims: tuple[Any, ...], args: tuple[Any, ...]
) -> Any:
    """One call after the other, each of which uses all threads, and their results stacked."""

    def entry(i: int) -> list[Any]:
        return [
            x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x
            for x, dim in zip(args, dims, strict=True)
        ]

    if size == 0:  # whose results have shapes nevertheless, those of any entry
        args = tuple(
            x.new_empty([1 if axis == dim else n for axis, n in enumerate(x.shape)])
            if isinstance(x, Tensor) and dim is not None
            else x
            for x, dim in zip(args, dims, strict=True)
        )
        results = fake(*entry(0))
        return type(results)(x.new_empty((0, *x.shape)) for x in results)
    results = [operator(*entry(i)) for i in range(size)]
    return type(results[0])(torch.stack(parts) for parts in zip(*results, strict=True))


def _batched_rule(operator: Any, fake: Any) -> Callable[..., Any]:
    """The rule for the older kind of batch: ``autograd.grad(is_grads_batched=True)`` and others.

    Its tensors carry numbers of levels, one for each loop that they are inside of; an operator sees
    those of all loops at once, and takes the innermost off first.
    """

    def rule(*args: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        return unbatched(level, args)

    def unbatched(level: int, args: tuple[Any, ...]) -> Any:
        batched = torch._C._functorch.is_legacy_batchedtensor
        inside = [isinstance(x, Tensor) and batched(x) for x in args]
        if not any(inside):
            return operator(*args)
        # A tensor that is not of this level gets an axis of one entry.
        bare = [
            torch._remove_batch_dim(x, level, 1, 0) if is_inside else x
            for x, is_inside in zip(args, inside, strict=True)
        ]
        lengths = [x.shape[0] for x, is_inside in zip(bare, inside, strict=True) if is_inside]
        size = next((n for n in lengths if n != 1), 1)
        bare = [
            x.expand(size, *x.shape[1:]) if is_inside else x
            for x, is_inside in zip(bare, inside, strict=True)
        ]
        dims = tuple(0 if is_inside else None for is_inside in inside)
        outer = lambda *args: unbatched(level - 1, args)  # noqa: E731
        stacked = _one_by_one(outer, fake, size, dims, tuple(bare))
        return type(stacked)(torch._add_batch_dim(x, 0, level) for x in stacked)

    return rule


LIBRARY.impl("attention", _forward, "CPU")
LIBRARY.impl("attention", _autocast_forward, "AutocastCPU")
LIBRARY.impl("attention_and_kept", _forward_and_kept, "CPU")
LIBRARY.impl("attention_backward", _backward, "CPU")
for _operator, _function, _result in (
    (FORWARD, _Attention, _without_kept),
    (BACKWARD, _AttentionBackward, list),
):
    _rule = _autograd_rule(_operator, _function, _result)
    LIBRARY.impl(_operator._schema.name, _rule, "Autograd", with_keyset=True)
for _operator, _fake in (
    (FORWARD, _fake_forward),
    (FORWARD_AND_KEPT, _fake_forward_and_kept),
    (BACKWARD, _fake_backward),
):
    torch.library.register_fake(_operator, _fake, lib=LIBRARY)
    LIBRARY.impl(_operator._schema.name, _batched_rule(_operator, _fake), "Batched")
    if hasattr(torch.library, "register_vmap"):  # since torch 2.5; before, vmap says what misses
        torch.library.register_vmap(_operator, _vmap_rule(_operator, _fake), lib=LIBRARY)
