"""Attention of arrays in Keras's layout, (batch, seqlen, heads, head_dim).

It is Keras's NumPy backend, and what those of TensorFlow and JAX call back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn._attention import attention
from fastattn._backward import attention_backward

Array = NDArray[Any]


class Call(NamedTuple):
    """What is known of a call before there are arrays.

    It is compared by value, so that a compiler that keeps functions by it finds them again.
    """

    #: Which options are arrays, in their order: "bias", "mask", "q_ids" and "k_ids", "seed".
    arrays: tuple[str, ...]
    scale: float | None
    causal: bool
    window: tuple[int, int] | None
    dropout_p: float

    @property
    def num_gradients(self) -> int:
        """How many of q, k, v and the arrays have gradients: the first ones, with the bias."""
        return 4 if "bias" in self.arrays else 3

    def options(self, arrays: tuple[Any, ...]) -> dict[str, Any]:
        """The options of `fastattn.attention`; positions count from the first query and key."""
        given = dict(zip(self.arrays, arrays, strict=True))
        options = self._asdict() | {"q_offset": 0} | given
        del options["arrays"]
        if "q_ids" in given:
            options["segment_ids"] = options.pop("q_ids"), options.pop("k_ids")
        if "seed" in given:
            options["dropout_seed"] = options.pop("seed")
        return options


def refusal(query: Any) -> str:
    """Why a call cannot be computed here, whatever its arguments are; empty if it can."""
    return ""


def attend(call: Call, q: Array, k: Array, v: Array, *arrays: Array) -> tuple[Array, Array]:
    """`out` in q's layout, and `lse`, (batch, heads, seqlen_q)."""
    q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
    out, lse = attention(q, k, v, return_lse=True, **_options(call, arrays))
    return out.swapaxes(-3, -2), lse


def gradients(
    call: Call,
    grad_out: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *arrays: Array,
) -> tuple[Array, ...]:
    """Those by q, k and v, and by the bias where there is one."""
    grad_out, q, k, v, out = (x.swapaxes(-3, -2) for x in (grad_out, q, k, v, out))
    grads = attention_backward(grad_out, q, k, v, out, lse, **_options(call, arrays))
    by_qkv = [x.swapaxes(-3, -2) for x in grads[:3] if x is not None]
    return tuple(by_qkv) if grads.bias is None else (*by_qkv, grads.bias)


def _options(call: Call, arrays: tuple[Array, ...]) -> dict[str, Any]:
    options = call.options(arrays)
    if call.dropout_p:
        first, second = (int(word) % 2**32 for word in np.asarray(options["dropout_seed"]))
        options["dropout_seed"] = first << 32 | second
    return options
