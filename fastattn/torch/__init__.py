"""fastattn for PyTorch: attention of CPU tensors, in place, with gradients.

`attention` is `fastattn.attention` on tensors, `scaled_dot_product_attention` is PyTorch's own
function computed by fastattn.  Both work with autograd, ``torch.compile``, ``torch.export``,
autocast, ``torch.vmap`` and ``torch.func.grad``.  `enable` routes PyTorch's own attention, and what
is built on it, to fastattn.  `attention_weights` makes weights visible, without gradients.

>>> import torch
>>> import fastattn.torch
>>> q, k, v = torch.randn(3, 2, 8, 100, 64, requires_grad=True)
>>> out = fastattn.torch.attention(q, k, v, causal=True, window=(32, 0))
>>> out.sum().backward()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from fastattn import _core, _validate
from fastattn._enabled import Enabled
from fastattn._options import BY_NAME, DEFAULTS, NAMES, OPTIONS, Option, given, read_pair
from fastattn._weights import attention_weights as weights_of_arrays
from fastattn.torch._ops import (
    as_array,
    attend,
    attend_arrays,
    autocast,
    bare_arrays,
    numpy_options,
    out_of_place,
    transforms_active,
)
from fastattn.torch._routing import Route, disable, enable, explain, is_enabled
from fastattn.torch._sdpa import DTYPES, drawn_seed, scaled_dot_product_attention

__all__ = [
    "Enabled",
    "Route",
    "attention",
    "attention_weights",
    "disable",
    "enable",
    "explain",
    "is_enabled",
    "scaled_dot_product_attention",
]


_FLOATS = "float16, bfloat16, float32 or float64"
_INTEGERS = (
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)
# The checks of options that are tensors: the dtypes that pass, and what an error calls those.  What
# is not a tensor yet becomes an array first, as in NumPy, so that no digit is lost.
_KINDS: dict[Any, tuple[tuple[torch.dtype, ...], str]] = {
    _validate.float_array: (DTYPES, _FLOATS),
    _validate.real_array: ((*DTYPES, *_INTEGERS), "real numbers"),
    _validate.integer_array: (_INTEGERS, "integers of at most 64 bits"),
    _validate.bool_array: (
        (torch.bool,),
        "bool, True = takes part (a float mask, which is added to the scores, goes to `bias`)",
    ),
}
# Rows of options that are numbers in PyTorch too.  Dropout draws its seed from PyTorch's generator.
_NUMBERS = frozenset(
    index
    for index, option in enumerate(OPTIONS)
    if option.name != "dropout_p" and all(kind != "Tensor?" for _, kind in option.torch)
)


class Options(TypedDict, total=False):
    """Options of `attention` other than `return_lse`, for type checkers."""

    scale: float | None
    softcap: float | None
    bias: Tensor | None
    alibi_slopes: Tensor | Sequence[float] | None
    mask: Tensor | None
    causal: bool
    window: Sequence[int | None] | None
    q_offset: int | Tensor | Sequence[int] | None
    kv_lengths: int | Tensor | Sequence[int] | None
    segment_ids: Sequence[Tensor | Sequence[int]] | None
    sinks: Tensor | None
    softmax_axis: Literal["keys", "queries"]
    dropout_p: float
    dropout_seed: int | Tensor | None
    residual: Tensor | None
    num_threads: int | None


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | Sequence[float] | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    q_offset: int | Tensor | Sequence[int] | None = None,
    kv_lengths: int | Tensor | Sequence[int] | None = None,
    segment_ids: Sequence[Tensor | Sequence[int]] | None = None,
    sinks: Tensor | None = None,
    softmax_axis: Literal["keys", "queries"] = "keys",
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    residual: Tensor | None = None,
    return_lse: bool = False,
    num_threads: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastattn.attention` of CPU tensors, with gradients, in linear memory.

    Parameters
    ----------
    q : Tensor, (..., num_heads, seqlen_q, head_dim)
        Queries: float32, float64, float16 or bfloat16, on the CPU, with any strides.
    k : Tensor, (..., num_kv_heads, seqlen_k, head_dim)
        Keys, of q's dtype.
    v : Tensor, (..., num_kv_heads, seqlen_k, head_dim_v)
        Values, of q's dtype.
    scale, softcap, bias, alibi_slopes, mask, causal, window, q_offset, kv_lengths, segment_ids, \
sinks, softmax_axis, dropout_p, residual, num_threads : optional
        As in `fastattn.attention`, with tensors for arrays, on q's device.  Numbers, sequences and
        arrays are read as NumPy does, whatever PyTorch's default dtype and device are.
    dropout_seed : int or integer Tensor of one element, optional
        As in `fastattn.attention`; an int64 Tensor that is negative is the seed with the same 64
        bits.  Default: drawn from PyTorch's CPU generator, which
        ``torch.manual_seed`` seeds.
    return_lse : bool, optional
        Whether to return `lse` too.

    Returns
    -------
    out : Tensor, (..., num_heads, seqlen_q, head_dim_v)
        In q's dtype, its axes in memory in the order of q's.
    lse : Tensor, (..., num_heads, seqlen_q), or (..., num_heads, seqlen_k) over the queries
        With `return_lse`; float64 for float64 input, else float32.

    Raises
    ------
    TypeError
        An argument has the wrong dtype or kind, or is on another device; the message names it.
    ValueError
        An argument has the wrong shape or value, or requires a gradient and has none; the message
        names it.
    NotImplementedError
        A second derivative is asked for.

    See Also
    --------
    scaled_dot_product_attention : The same with PyTorch's arguments.

    Notes
    -----
    `out` and `lse` have gradients by `q`, `k`, `v`, `bias`, `sinks` and `residual`; see
    `fastattn.attention_backward`.

    In an autocast region, `q`, `k`, `v` and `residual` are cast to the region's dtype before
    anything is checked, unless they are float64.

    Examples
    --------
    >>> import torch
    >>> import fastattn.torch
    >>> q, k, v = torch.randn(3, 2, 8, 100, 64)
    >>> sinks = torch.zeros(8, requires_grad=True)
    >>> out, lse = fastattn.torch.attention(q, k, v, sinks=sinks, causal=True, return_lse=True)
    >>> lse.sum().backward()
    >>> sinks.grad.shape
    torch.Size([8])
    """
    arrays = bare_arrays(q, k, v)
    if arrays is None or not (q.dtype in DTYPES and q.dtype is k.dtype is v.dtype):
        if torch.is_autocast_enabled("cpu"):
            q, k, v, residual = map(autocast, (q, k, v, residual))
        _check_operands(q, k=k, v=v)
    values = (
        scale,
        softcap,
        bias,
        alibi_slopes,
        mask,
        causal,
        window,
        q_offset,
        kv_lengths,
        segment_ids,
        sinks,
        softmax_axis,
        dropout_p,
        dropout_seed,
        residual,
        num_threads,
    )
    if arrays is not None and not return_lse:
        chosen = _core.differing(values, DEFAULTS)
        if _NUMBERS.issuperset(chosen):
            return attend_arrays(arrays, {NAMES[index]: values[index] for index in chosen})
    arguments = _operator_arguments(values, q)
    if arguments.get("dropout_p") and dropout_seed is None:
        arguments["dropout_seed"] = drawn_seed(q)
    added = arguments.get("residual")
    if added is not None and added.dtype != q.dtype:
        raise TypeError(f"`residual` must have dtype {q.dtype} like `q`, got {added.dtype}")
    out, lse = attend(q, k, v, **arguments)
    return (out, lse) if return_lse else out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    rows: Tensor | Sequence[int] | slice | None = None,
    heads: Tensor | Sequence[int] | slice | None = None,
    pool: Sequence[int] | None = None,
    reduce: Literal["keys"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | Sequence[float] | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    q_offset: int | Tensor | Sequence[int] | None = None,
    kv_lengths: int | Tensor | Sequence[int] | None = None,
    segment_ids: Sequence[Tensor | Sequence[int]] | None = None,
    sinks: Tensor | None = None,
    softmax_axis: Literal["keys", "queries"] = "keys",
    num_threads: int | None = None,
) -> Tensor:
    """`fastattn.attention_weights` of CPU tensors: numbers to look at, without gradients.

    Parameters
    ----------
    q : Tensor, (..., num_heads, seqlen_q, head_dim)
        Queries: float32, float64, float16 or bfloat16, on the CPU, with any strides.
    k : Tensor, (..., num_kv_heads, seqlen_k, head_dim)
        Keys, of q's dtype.
    rows, heads, pool, reduce : optional
        As in `fastattn.attention_weights`; `rows` and `heads` may be integer tensors.
    scale, softcap, bias, alibi_slopes, mask, causal, window, q_offset, kv_lengths, segment_ids, \
sinks, softmax_axis, num_threads : optional
        As in `attention`.

    Returns
    -------
    weights : Tensor, (..., num_heads, seqlen_q, seqlen_k)
        With the chosen heads and queries in the place of all, or (..., num_heads, r, c) with
        `pool`, or (..., num_heads, seqlen_k) with `reduce`; float64 for float64 input, else
        float32.

    Raises
    ------
    TypeError
        An argument has the wrong dtype or kind, or is on another device; the message names it.
    ValueError
        An argument has the wrong shape or value, or requires a gradient, of which there is none;
        the message names it.
    NotImplementedError
        It is called inside a transform of ``torch.func``, ``torch.vmap`` among them.

    Notes
    -----
    There is no gradient by anything.  So that no loss goes without one in silence, a tensor that
    requires a gradient is refused as PyTorch's ``Tensor.numpy`` refuses it, but under
    ``torch.no_grad()``: call there, or pass ``q.detach()``.

    ``torch.compile`` leaves the call out of its graph.

    Examples
    --------
    >>> import torch
    >>> import fastattn.torch
    >>> q, k = torch.randn(2, 8, 100, 64)
    >>> fastattn.torch.attention_weights(q, k, causal=True, rows=[-1]).sum(-1).shape
    torch.Size([8, 1])
    """
    options = given(locals())
    if torch.is_autocast_enabled("cpu"):
        q, k = map(autocast, (q, k))
    _check_operands(q, k=k)
    if q.device.type != "cpu":
        raise TypeError(f"`q` must be on the CPU, got {q.device}")
    if transforms_active():
        raise NotImplementedError("attention_weights has no rule for transforms of torch.func")
    arguments = _operator_arguments(tuple(map(options.get, NAMES, DEFAULTS)), q)
    for name, x in {"q": q, "k": k, **arguments}.items():
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"`{name}` must not require a gradient, of which there is none: detach it, or call "
                "under torch.no_grad()"
            )
    chosen = [as_array(x) if isinstance(x, Tensor) else x for x in (rows, heads)]
    weights = weights_of_arrays(
        as_array(q),
        as_array(k),
        rows=chosen[0],
        heads=chosen[1],
        pool=pool,
        reduce=reduce,
        **numpy_options(arguments),
    )
    return torch.from_numpy(weights)


def _check_operands(q: Any, **others: Any) -> None:
    """That q, k and v are tensors of one dtype that attention knows, in one place."""
    for name, x in {"q": q, **others}.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got a {type(x).__name__}")
        if wrong := out_of_place(x, q, "q"):
            raise TypeError(f"`{name}` {wrong}")
        if x.dtype != q.dtype:
            raise TypeError(f"`{name}` must have dtype {q.dtype} like `q`, got {x.dtype}")
    if q.dtype not in DTYPES:
        raise TypeError(f"`q` must be {_FLOATS}, got {q.dtype}")


def _operator_arguments(values: tuple[Any, ...], q: Tensor) -> dict[str, Any]:
    """Options, a value for each row of the table, as those arguments of the operators that differ
    from their defaults: tensors on q's device, and numbers.

    Numbers may be symbols while PyTorch compiles, and are checked when the operator runs.
    """
    arguments: dict[str, Any] = {}
    for option, x in _given(values):
        name = option.name
        names = [argument for argument, _ in option.torch]
        if name == "dropout_seed":
            arguments[name] = _seed(x, q)
        elif name == "segment_ids":
            for i, (argument, ids) in enumerate(zip(names, read_pair(name, x), strict=True)):
                arguments[argument] = _tensor(f"{name}[{i}]", ids, q, _validate.integer_array)
        elif name == "window":
            sides = x if torch.compiler.is_compiling() else option.check(name, x)
            sides = [None if side is None or side < 0 else side for side in sides]
            arguments |= dict(zip(names, sides, strict=True))
        elif name == "q_offset":
            if not isinstance(x, int) or isinstance(x, bool):
                arguments["q_offsets"] = _tensor(name, x, q, _validate.integer_array)
            elif torch.compiler.is_compiling():
                arguments["q_offset"] = x
            else:  # a tensor may be too small for it
                arguments["q_offset"] = int(option.check(name, x))
        elif option.check in _KINDS:
            arguments[name] = _tensor(name, x, q, option.check)
        elif torch.compiler.is_compiling():
            arguments[name] = x
        else:
            checked = option.check(name, x)
            arguments[name] = x if isinstance(x, str) else checked
    return arguments


def _tensor(name: str, x: Any, q: Tensor, check: Any) -> Tensor:
    """An option as a tensor on q's device, of a dtype that passes the check."""
    dtypes, kind = _KINDS[check]
    if not isinstance(x, Tensor):
        if torch.compiler.is_compiling():  # which has tensors in the place of arrays
            x = torch.as_tensor(x, device=q.device)
            x = x.double() if x.is_floating_point() else x
        else:
            x = _from_array(check(name, x)).to(q.device)
    if wrong := out_of_place(x, q, "q"):
        raise TypeError(f"`{name}` {wrong}")
    if x.dtype not in dtypes:
        raise TypeError(f"`{name}` must be {kind}, got {x.dtype}")
    return x


def _from_array(array: Any) -> Tensor:
    """A tensor of the same numbers, whatever dtype and device are PyTorch's defaults."""
    array = np.require(array, requirements=["C", "W"])  # of which tensors are views
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _given(values: tuple[Any, ...]) -> list[tuple[Option, Any]]:
    """The options whose value differs from the default, as in `_options.set_options`."""
    if torch.compiler.is_compiling():  # which sees no functions of C
        pairs = zip(OPTIONS, values, strict=True)
        return [(option, x) for option, x in pairs if x is not option.default]
    return [(OPTIONS[index], values[index]) for index in _core.differing(values, DEFAULTS)]


def _seed(dropout_seed: int | Tensor, q: Tensor) -> Tensor:
    """A seed as the operator takes it."""
    if not isinstance(dropout_seed, Tensor):
        if not torch.compiler.is_compiling():
            dropout_seed = BY_NAME["dropout_seed"].check("dropout_seed", dropout_seed)
        # The signed number with the same 64 bits.
        signed = dropout_seed - 2**64 if dropout_seed >= 2**63 else dropout_seed
        return torch.tensor(signed, dtype=torch.int64, device=q.device)
    if wrong := out_of_place(dropout_seed, q, "q"):
        raise TypeError(f"`dropout_seed` {wrong}")
    if dropout_seed.dtype not in _INTEGERS:
        raise TypeError(f"`dropout_seed` must be an integer, got {dropout_seed.dtype}")
    if dropout_seed.numel() != 1:
        shape = tuple(dropout_seed.shape)
        raise ValueError(f"`dropout_seed` must be one integer, got shape {shape}")
    return dropout_seed
