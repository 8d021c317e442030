"""fastattn for PyTorch: attention of CPU tensors, in place, with gradients.

`attention` is `fastattn.attention` on tensors, `scaled_dot_product_attention` is PyTorch's own
function computed by fastattn.  Both work with autograd, ``torch.compile``, ``torch.export``,
autocast, ``torch.vmap`` and ``torch.func.grad``.  `enable` routes PyTorch's own attention, and what
is built on it, to fastattn.

>>> import torch
>>> import fastattn.torch
>>> q, k, v = torch.randn(3, 2, 8, 100, 64, requires_grad=True)
>>> out = fastattn.torch.attention(q, k, v, causal=True, window=(32, 0))
>>> out.sum().backward()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from fastattn import _validate
from fastattn._torch_ops import attend
from fastattn._torch_routing import Enabled, Route, disable, enable, explain, is_enabled
from fastattn._torch_sdpa import scaled_dot_product_attention

__all__ = [
    "Enabled",
    "Route",
    "attention",
    "disable",
    "enable",
    "explain",
    "is_enabled",
    "scaled_dot_product_attention",
]


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
        As in `fastattn.attention`, with tensors for arrays.
    dropout_seed : int or int64 Tensor of one element, optional
        As in `fastattn.attention`.  Default: drawn from PyTorch's CPU generator, which
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
        An argument has the wrong dtype or kind; the message names it.
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
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got a {type(x).__name__}")
        if x.dtype != q.dtype:
            raise TypeError(f"`{name}` must have dtype {q.dtype} like `q`, got {x.dtype}")
    if not torch.compiler.is_compiling():  # where numbers may be symbols
        _check_kinds(scale, softcap, causal, window, softmax_axis, dropout_p, num_threads)
    left, right = (None, None) if window is None else window
    q_ids, k_ids = (None, None) if segment_ids is None else _pair("segment_ids", segment_ids)
    options: dict[str, Any] = {}
    if isinstance(q_offset, int):
        options["q_offset"] = q_offset
    else:
        options["q_offsets"] = _tensor(q_offset)
    out, lse = attend(
        q,
        k,
        v,
        bias=_tensor(bias),
        sinks=_tensor(sinks),
        residual=_tensor(residual),
        alibi_slopes=_tensor(alibi_slopes),
        mask=_tensor(mask),
        kv_lengths=_tensor(kv_lengths),
        q_segment_ids=_tensor(q_ids),
        k_segment_ids=_tensor(k_ids),
        dropout_seed=_seed(dropout_p, dropout_seed),
        scale=scale,
        softcap=softcap,
        causal=causal,
        window_left=left,
        window_right=right,
        softmax_axis=softmax_axis,
        dropout_p=dropout_p,
        num_threads=num_threads,
        **options,
    )
    return (out, lse) if return_lse else out


def _tensor(x: Any) -> Tensor | None:
    return x if x is None or isinstance(x, Tensor) else torch.as_tensor(x)


def _check_kinds(
    scale: Any,
    softcap: Any,
    causal: Any,
    window: Any,
    softmax_axis: Any,
    dropout_p: Any,
    num_threads: Any,
) -> None:
    """What an operator would refuse in words of its own; `fastattn.attention` checks the rest."""
    for name, x in (("scale", scale), ("softcap", softcap), ("dropout_p", dropout_p)):
        if x is not None:
            _validate.real(name, x)
    _validate.flag("causal", causal)
    if window is not None:
        _validate._window(window)
    _validate._is_over_queries(softmax_axis)
    if num_threads is not None:
        _validate.count("num_threads", num_threads)


def _pair(name: str, x: Any) -> tuple[Any, Any]:
    try:
        first, second = x
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be a pair, got {x!r}") from None
    return first, second


def _seed(dropout_p: float, dropout_seed: int | Tensor | None) -> Tensor | None:
    """A seed as the operator takes it, from PyTorch's generator where none is given."""
    if dropout_seed is None:
        return torch.randint(2**63 - 1, ()) if dropout_p else None
    if isinstance(dropout_seed, Tensor):
        return dropout_seed
    if not 0 <= dropout_seed < 2**64:
        raise ValueError(f"`dropout_seed` must be 0 to 2**64 - 1, got {dropout_seed}")
    # The signed number with the same 64 bits.
    return torch.tensor(dropout_seed - 2**64 if dropout_seed >= 2**63 else dropout_seed)
