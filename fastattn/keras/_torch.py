"""Attention of PyTorch's tensors, by `fastattn.torch`."""

from __future__ import annotations

from typing import Any

from fastattn.keras._numpy import Call
from fastattn.torch import attention


def refusal(query: Any) -> str:
    """Why a call cannot be computed here, whatever its arguments are; empty if it can."""
    if query.device.type not in ("cpu", "meta"):
        return f"attention is computed on the CPU, and `query` is on {query.device}"
    return ""


def attend(call: Call, q: Any, k: Any, v: Any, *arrays: Any) -> tuple[Any, Any]:
    """`_numpy.attend`, with gradients."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    options = call.options(arrays)
    if call.dropout_p:
        first, second = options["dropout_seed"].long() & 0xFFFFFFFF
        options["dropout_seed"] = first << 32 | second
    out, lse = attention(q, k, v, return_lse=True, **options)
    return out.transpose(-3, -2), lse
