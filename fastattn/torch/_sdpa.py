"""PyTorch's attention by fastattn: its arguments, meanings and errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from fastattn.torch._ops import attend, attend_arrays, autocast, bare_arrays, out_of_place

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`, computed by fastattn.

    The arguments, their meanings and the types of errors are those of
    ``torch.nn.functional.scaled_dot_product_attention``.  Every call is computed in linear memory,
    also with dropout, with ``Ev != E`` and with a mask that has a gradient.

    Parameters
    ----------
    query : Tensor, (N, ..., Hq, L, E)
        float32, float64, float16 or bfloat16, on the CPU, with any strides.
    key : Tensor, (N, ..., H, S, E)
        Of query's dtype.
    value : Tensor, (N, ..., H, S, Ev)
        Of query's dtype.
    attn_mask : Tensor, broadcastable to (N, ..., Hq, L, S), optional
        bool, True = this key takes part, or float32 or query's dtype, added to the scores and
        differentiable; or a ``torch.nn.attention.bias.CausalBias``.
    dropout_p : float, optional
        Share of the weights that are set to 0, drawn from PyTorch's CPU generator
        (``torch.manual_seed``), whether the model is in training or not.
    is_causal : bool, optional
        Query i sees keys j <= i only ("top-left"), of those that `attn_mask` leaves.
    scale : float, optional
        Factor of the products.  Default: ``1 / sqrt(E)``.
    enable_gqa : bool, optional
        Whether Hq may be a multiple of H.  Keys and values are not repeated in memory.

    Returns
    -------
    Tensor, (N, ..., Hq, L, Ev)
        In query's dtype, its axes in memory in the order of query's.

    Raises
    ------
    TypeError
        An argument is not a tensor where it must be.
    RuntimeError
        Dtypes, shapes or devices do not match, as PyTorch raises it.
    ValueError
        `scale` is infinite or NaN.
    NotImplementedError
        A second derivative is asked for.

    Notes
    -----
    A query without keys gets 0 and has gradient 0.  `attn_mask` and ``is_causal=True`` together,
    which PyTorch computes in one of its kernels for CPUs and refuses in the other, always both
    apply.  Dropout draws other weights than PyTorch's own
    function does from the same seed.

    Examples
    --------
    >>> import torch
    >>> from fastattn.torch import scaled_dot_product_attention
    >>> query, key, value = torch.randn(3, 2, 8, 100, 64)
    >>> out = scaled_dot_product_attention(query, key, value, is_causal=True)
    >>> expected = torch.nn.functional.scaled_dot_product_attention(
    ...     query, key, value, is_causal=True
    ... )
    >>> torch.allclose(out, expected, atol=1e-5)
    True
    """
    result = directly(query, key, value, attn_mask, dropout_p, is_causal, scale)
    if result is not None:
        return result
    if torch.is_autocast_enabled("cpu"):
        query, key, value, attn_mask = as_in_autocast(query, key, value, attn_mask)
    q, k, v, options = translated(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if dropout_p > 0.0:
        options |= {"dropout_p": dropout_p, "dropout_seed": drawn_seed(q)}
    return attend(q, k, v, **options)[0]


def directly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor | None:
    """The result where it is quick to have, because PyTorch has no part in the call and nothing
    must be matched, or None."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    arrays = None if dropout_p else bare_arrays(*tensors)
    if arrays is None:
        return None
    q, k, v, *masks = arrays
    shape, kv_shape = q.shape, k.shape
    if (
        query.dtype not in DTYPES
        or not query.dtype is key.dtype is value.dtype
        or len(shape) < 2
        or kv_shape[:-1] != v.shape[:-1]
        or (shape != kv_shape and (shape[:-2], shape[-1]) != (kv_shape[:-2], kv_shape[-1]))
    ):
        return None
    options: dict[str, Any] = {}
    if scale is not None:
        options["scale"] = scale
    if is_causal:
        options["causal"] = True
        if shape != kv_shape:
            options["q_offset"] = 0
    if attn_mask is not None:
        [mask] = masks
        scores = (*shape[:-1], kv_shape[-2])
        if not _is_mask(attn_mask, query) or not _broadcasts(mask.shape, scores):
            return None
        options["mask" if attn_mask.dtype is torch.bool else "bias"] = mask
    return attend_arrays([q, k, v], options)


def drawn_seed(like: Tensor) -> Tensor:
    """A seed of dropout from PyTorch's generator, on the device of `like`."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=like.device)


def as_in_autocast(*arguments: Any) -> tuple[Any, ...]:
    """query, key, value and attn_mask as an autocast region hands them to PyTorch's attention.

    A mask in 16 bits becomes float32 instead, which goes with every dtype and rounds nothing.
    """
    *qkv, mask = arguments
    if isinstance(mask, Tensor) and mask.dtype in (torch.float16, torch.bfloat16):
        mask = mask.float()
    return (*map(autocast, qkv), mask)


def translated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """What fastattn calls the same: q, k, v and its options, those of dropout left out."""
    _check(query, key, value, dropout_p)
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        query, key, value = _matched(query, key, value, enable_gqa)
    options: dict[str, Any] = {"scale": scale}
    if is_causal:
        options |= {"causal": True, "q_offset": 0}
    if isinstance(attn_mask, CausalBias):
        if is_causal:
            raise RuntimeError("`attn_mask` must be no CausalBias with is_causal=True, got both")
        options |= _causal_bias(query, key, attn_mask)
    elif attn_mask is not None:
        options |= _mask_option(query, key, value, attn_mask)
    return query, key, value, options


def _check(query: Any, key: Any, value: Any, dropout_p: float) -> None:
    named = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got a {type(x).__name__}")
        if wrong := out_of_place(x, query, "query"):
            raise RuntimeError(f"`{name}` {wrong}")
        if x.dim() < 2:
            raise RuntimeError(
                f"`{name}` must have at least 2 dimensions, got shape {tuple(x.shape)}"
            )
    dtype = query.dtype
    if dtype not in DTYPES:
        raise RuntimeError(f"`query` must be float16, bfloat16, float32 or float64, got {dtype}")
    if not dtype == key.dtype == value.dtype:
        raise RuntimeError(
            f"`key` and `value` must have dtype {dtype} like `query`, "
            f"got {key.dtype} and {value.dtype}"
        )
    if key.shape[-1] != query.shape[-1]:
        raise RuntimeError(f"`key` must have E {query.shape[-1]} like `query`, got {key.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise RuntimeError(f"`value` must have S {key.shape[-2]} like `key`, got {value.shape[-2]}")
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"`dropout_p` must be 0 to 1, got {dropout_p}")


def _num_heads(x: Tensor) -> int:
    heads: int = x.shape[-3] if x.dim() > 2 else 1
    return heads


def _matched(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operands with heads as fastattn takes them, where PyTorch broadcasts or groups them."""
    heads, key_heads, value_heads = map(_num_heads, (query, key, value))
    if enable_gqa:
        for name, kv_heads in (("key", key_heads), ("value", value_heads)):
            if kv_heads == 0 or heads % kv_heads:
                raise RuntimeError(
                    f"`{name}` must have a number of heads that divides the {heads} of `query` "
                    f"with enable_gqa=True, got {kv_heads}"
                )
        if key_heads != value_heads:
            key, value = (
                x.repeat_interleave(heads // _num_heads(x), -3) if x.dim() > 2 else x[None]
                for x in (key, value)
            )
            key, value = (x.expand(*x.shape[:-3], heads, *x.shape[-2:]) for x in (key, value))
    else:
        joint = max(heads, key_heads, value_heads) if min(heads, key_heads, value_heads) else 0
        for name, some in (("query", heads), ("key", key_heads), ("value", value_heads)):
            if some not in (1, joint):
                raise RuntimeError(
                    f"`{name}` must have {joint} heads or 1 (or enable_gqa=True), got {some}"
                )
        query = _with_heads(query, joint)
        if key_heads != value_heads:
            key, value = _with_heads(key, joint), _with_heads(value, joint)
    # Raises a RuntimeError that shows the shapes.
    torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    return query, key, value


def _with_heads(x: Tensor, heads: int) -> Tensor:
    if x.dim() == 2:
        x = x[None]
    return x.expand(*x.shape[:-3], heads, *x.shape[-2:])


def _mask_option(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> dict[str, Any]:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"`attn_mask` must be a torch.Tensor, got a {type(attn_mask).__name__}")
    if wrong := out_of_place(attn_mask, query, "query"):
        raise RuntimeError(f"`attn_mask` {wrong}")
    if not _is_mask(attn_mask, query):
        raise RuntimeError(
            f"`attn_mask` must be bool, float32 or {query.dtype} like `query`, "
            f"got {attn_mask.dtype}"
        )
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    scores = (*lead, *query.shape[-3:-1], key.shape[-2])
    if not _broadcasts(attn_mask.shape, scores):
        raise RuntimeError(
            f"`attn_mask` must broadcast to {tuple(scores)}, got shape {tuple(attn_mask.shape)}"
        )
    return {"mask" if attn_mask.dtype == torch.bool else "bias": attn_mask}


def _is_mask(attn_mask: Tensor, query: Tensor) -> bool:
    return attn_mask.dtype in (torch.bool, torch.float32, query.dtype)


def _broadcasts(shape: Sequence[int], target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        n in (1, wanted) for n, wanted in zip(reversed(shape), reversed(target), strict=False)
    )


def _causal_bias(query: Tensor, key: Tensor, bias: Any) -> dict[str, Any]:
    lengths = query.shape[-2], key.shape[-2]
    if lengths != (bias.seq_len_q, bias.seq_len_kv):
        raise RuntimeError(
            f"`attn_mask` must be for L and S {lengths}, "
            f"got one for {(bias.seq_len_q, bias.seq_len_kv)}"
        )
    upper_left = bias.variant == CausalVariant.UPPER_LEFT
    return {"causal": True, "q_offset": 0 if upper_left else lengths[1] - lengths[0]}
