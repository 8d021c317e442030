"""Keras's attention function, and the one way from Keras's tensors to a backend."""

from __future__ import annotations

import importlib
import math
from numbers import Real
from typing import Any

import keras
from keras import ops

from fastattn.keras._numpy import Call

DTYPES = ("float16", "bfloat16", "float32", "float64")
_BACKENDS = ("tensorflow", "jax", "torch", "numpy")

if keras.backend.backend() not in _BACKENDS:
    raise ImportError(
        f"fastattn.keras runs on Keras's backends {', '.join(_BACKENDS)}, "
        f"and KERAS_BACKEND is {keras.backend.backend()}"
    )
BACKEND: Any = importlib.import_module(f"fastattn.keras._{keras.backend.backend()}")


def attend(
    query: Any,
    key: Any,
    value: Any,
    *,
    scale: float | None,
    causal: bool,
    window: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    **arrays: Any,
) -> Any:
    """Attention of tensors of one dtype in Keras's layout, with Keras's rule for empty rows.

    `arrays` are the other options of `Call` that are given; a None is one that is not.
    """
    if reason := BACKEND.refusal(query):
        raise NotImplementedError(f"fastattn.keras: {reason}")
    arrays = {name: x for name, x in arrays.items() if x is not None}
    call = Call(tuple(arrays), scale, causal, window, dropout_p)
    out, lse = BACKEND.attend(call, query, key, value, *arrays.values())
    if window is None and not {"mask", "q_ids"} & set(arrays):
        return out
    # A query without keys gets 0 from fastattn and the average of all values from Keras, whose
    # masked scores are large and equal.
    is_empty = ops.swapaxes(ops.equal(lse, -math.inf), 1, 2)
    average = ops.mean(value, axis=1, keepdims=True)
    average = ops.repeat(average, query.shape[2] // value.shape[2], axis=2)
    return ops.where(ops.expand_dims(is_empty, -1), average, out)


def refusal(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    scale: Any,
    flash_attention: Any,
    attn_logits_soft_cap: Any,
) -> Exception | None:
    """What is wrong with the arguments of `dot_product_attention`, as the error that says it."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if len(x.shape) != 4:
            return ValueError(f"`{name}` must have 4 dimensions, got shape {tuple(x.shape)}")
    dtype = keras.backend.result_type(query.dtype, key.dtype, value.dtype)
    if dtype not in DTYPES:
        return TypeError(f"`query`, `key` and `value` must be {' or '.join(DTYPES)}, got {dtype}")
    heads, kv_heads = query.shape[2], key.shape[2]
    if not kv_heads or heads % kv_heads:
        return ValueError(
            f"`key` must have a number of heads that divides the {heads} of `query`, got {kv_heads}"
        )
    if value.shape[2] != kv_heads:
        return ValueError(f"`value` must have {kv_heads} heads like `key`, got {value.shape[2]}")
    if mask is not None and keras.backend.standardize_dtype(mask.dtype) != "bool":
        return TypeError(
            f"`mask` must be bool, True = takes part (what is added to the scores goes to `bias`), "
            f"got {keras.backend.standardize_dtype(mask.dtype)}"
        )
    if bias is not None and keras.backend.standardize_dtype(bias.dtype) not in DTYPES:
        return TypeError(f"`bias` must be {' or '.join(DTYPES)}, got {bias.dtype}")
    if scale is not None and not (isinstance(scale, Real) and math.isfinite(scale)):
        return TypeError(f"`scale` must be a finite number or None, got {scale!r}")
    if flash_attention not in (None, True):
        return ValueError(
            "`flash_attention` must be None or True, for attention in blocks; what False asks for "
            "is keras.ops.dot_product_attention"
        )
    if attn_logits_soft_cap is not None:
        return ValueError("`attn_logits_soft_cap` is for JAX on TPUs and must be None here")
    return None


def computed(
    query: Any, key: Any, value: Any, bias: Any, mask: Any, scale: Any, is_causal: bool
) -> Any:
    """`dot_product_attention` of arguments without a refusal."""
    dtype = keras.backend.result_type(query.dtype, key.dtype, value.dtype)
    query, key, value = (ops.cast(x, dtype) for x in (query, key, value))
    return attend(
        query,
        key,
        value,
        scale=None if scale is None else float(scale),
        causal=bool(is_causal),
        bias=None if bias is None else ops.cast(bias, dtype),
        mask=mask,
    )


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    scale: float | None = None,
    is_causal: bool = False,
    flash_attention: bool | None = None,
    attn_logits_soft_cap: float | None = None,
) -> Any:
    """``keras.ops.dot_product_attention``, computed by fastattn on the CPU, in linear memory.

    Parameters
    ----------
    query : tensor, (batch, seqlen_q, num_heads, head_dim)
        float32, float64, float16 or bfloat16.
    key : tensor, (batch, seqlen_k, num_kv_heads, head_dim)
        ``num_kv_heads`` divides ``num_heads``; shared heads are not repeated in memory.
    value : tensor, (batch, seqlen_k, num_kv_heads, head_dim_v)
        The three are computed in their joint dtype, as ``keras.backend.result_type`` has it.
    bias : tensor, broadcastable to (batch, num_heads, seqlen_q, seqlen_k), optional
        Added to the scores, in the joint dtype; it has a gradient.
    mask : bool tensor, broadcastable to (batch, num_heads, seqlen_q, seqlen_k), optional
        True = this key takes part.  Applies together with `bias` and `is_causal`.
    scale : float, optional
        Factor of the products.  Default: ``1 / sqrt(head_dim)``.
    is_causal : bool, optional
        Query i sees keys j <= i only ("top-left").
    flash_attention : None or True, optional
        Every call is computed in blocks.
    attn_logits_soft_cap : None
        What Keras has on JAX with TPUs alone.

    Returns
    -------
    tensor, (batch, seqlen_q, num_heads, head_dim_v)
        In the joint dtype.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong dtype, shape or value; the message names it.
    NotImplementedError
        The call is inside what TensorFlow compiles by XLA, or tensors are not on the CPU, or a
        second derivative is asked for.

    See Also
    --------
    enable : Keras's own function, and what is built on it, computed by this one.

    Notes
    -----
    A query without keys gets the average of all values, as in Keras.  Where it has keys whose
    `bias` is -inf, and no others, Keras gives NaN; here they take no part.

    Examples
    --------
    >>> import keras
    >>> import numpy as np
    >>> from fastattn.keras import dot_product_attention
    >>> query = keras.random.normal((2, 100, 8, 64))
    >>> key, value = keras.random.normal((2, 2, 100, 8, 64))
    >>> out = dot_product_attention(query, key, value, is_causal=True)
    >>> expected = keras.ops.dot_product_attention(query, key, value, is_causal=True)
    >>> bool(np.allclose(out, expected, atol=1e-5))
    True
    """
    given = [query, key, value, bias, mask]
    if any(map(keras.utils.is_keras_tensor, given)):
        options = (scale, is_causal, flash_attention, attn_logits_soft_cap)
        return DotProductAttention(*options)(query, key, value, bias, mask)
    query, key, value, bias, mask = (x if x is None else ops.convert_to_tensor(x) for x in given)
    error = refusal(query, key, value, bias, mask, scale, flash_attention, attn_logits_soft_cap)
    if error is not None:
        raise error
    return computed(query, key, value, bias, mask, scale, is_causal)


@keras.saving.register_keras_serializable(package="fastattn")
class DotProductAttention(keras.Operation):  # type: ignore[misc]
    """`dot_product_attention` as a node of a functional model."""

    def __init__(
        self,
        scale: float | None = None,
        is_causal: bool = False,
        flash_attention: bool | None = None,
        attn_logits_soft_cap: float | None = None,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.options: dict[str, Any] = {
            "scale": scale,
            "is_causal": is_causal,
            "flash_attention": flash_attention,
            "attn_logits_soft_cap": attn_logits_soft_cap,
        }

    def call(self, query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None) -> Any:
        return dot_product_attention(query, key, value, bias, mask, **self.options)

    def compute_output_spec(
        self, query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None
    ) -> Any:
        options = {x: y for x, y in self.options.items() if x != "is_causal"}
        error = refusal(query, key, value, bias, mask, *options.values())
        if error is not None:
            raise error
        dtype = keras.backend.result_type(query.dtype, key.dtype, value.dtype)
        return keras.KerasTensor((*query.shape[:-1], value.shape[-1]), dtype)
