"""Keras's own attention, sent to fastattn.

``keras.ops.dot_product_attention``, which layers and models end in, under all of its names and for
symbolic tensors too, ends in a function of the backend, which it looks up at each call.  `enable`
puts another one in its place, and `disable` puts it back.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from keras import ops
from keras.src.backend import nn

from fastattn._backward import MAX_HEAD_DIM
from fastattn._enabled import Enabled
from fastattn.keras import _ops

_lock = threading.Lock()
_kerass: Any = None  # Keras's own function, while it is replaced


def enable() -> Enabled:
    """Route Keras's own attention to fastattn, until `disable`.

    ``keras.ops.dot_product_attention``, and with it ``keras.layers.MultiHeadAttention`` and
    ``GroupQueryAttention`` without dropout and models of other packages, are then computed by
    fastattn wherever it does the same.

    Returns
    -------
    context manager
        ``with fastattn.keras.enable():`` restores at its end what was before it.

    Raises
    ------
    RuntimeError
        Another package has replaced Keras's attention.

    See Also
    --------
    disable, is_enabled

    Notes
    -----
    It holds for the whole process, all threads.  What was compiled or traced keeps the attention
    that it was traced with: enable first, then build, compile and fit.

    Keras keeps calls that `dot_product_attention` refuses, tensors on other devices, what
    TensorFlow compiles by XLA, and heads of more than 1024 elements, which have no gradients here.

    Examples
    --------
    >>> import keras
    >>> import fastattn.keras
    >>> layer = keras.layers.MultiHeadAttention(num_heads=4, key_dim=16)
    >>> x = keras.random.normal((2, 10, 64))
    >>> with fastattn.keras.enable():
    ...     y = layer(x, x)
    >>> fastattn.keras.is_enabled()
    False
    """
    global _kerass
    with _lock:
        if _kerass is not None:
            return Enabled(True, disable)
        if getattr(nn.dot_product_attention, "__module__", "") != nn.__name__:
            raise RuntimeError(
                f"{nn.__name__}.dot_product_attention has been replaced already, by "
                f"{nn.dot_product_attention!r}"
            )
        _kerass = nn.dot_product_attention
        nn.dot_product_attention = functools.partial(_routed, _kerass)
        return Enabled(False, disable)


def disable() -> None:
    """Leave Keras's attention to Keras again; nothing happens where it is."""
    global _kerass
    with _lock:
        if _kerass is not None:
            nn.dot_product_attention, _kerass = _kerass, None


def is_enabled() -> bool:
    """Whether `enable` is in effect."""
    return _kerass is not None


def _routed(
    kerass: Any,
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    scale: Any = None,
    is_causal: bool = False,
    flash_attention: bool | None = None,
    attn_logits_soft_cap: float | None = None,
) -> Any:
    query, key, value = map(ops.convert_to_tensor, (query, key, value))
    bias, mask = (x if x is None else ops.convert_to_tensor(x) for x in (bias, mask))
    options = (flash_attention, attn_logits_soft_cap)
    if (
        _ops.refusal(query, key, value, bias, mask, scale, *options)
        or _ops.BACKEND.refusal(query)
        or max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM
    ):
        return kerass(query, key, value, bias, mask, scale, is_causal, *options)
    return _ops.computed(query, key, value, bias, mask, scale, is_causal)
