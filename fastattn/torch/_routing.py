"""PyTorch's own attention, sent to fastattn.

``aten::scaled_dot_product_attention``, which PyTorch's layers and functions end in, is a composite:
its kernel for every backend chooses another operator.  `enable` registers kernels of its own for
CPU tensors beside that; they call fastattn, or the composite where fastattn does not do the same.
`disable` takes them out, and nothing is left of them.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fastattn._backward import MAX_HEAD_DIM
from fastattn._enabled import Enabled
from fastattn._explain import Explanation
from fastattn._explain import explain as explain_arrays
from fastattn.torch._ops import (
    DEFAULTS,
    as_array,
    has_tangent,
    numpy_options,
    transforms_active,
)
from fastattn.torch._sdpa import (
    DTYPES,
    as_in_autocast,
    directly,
    scaled_dot_product_attention,
    translated,
)

OPERATOR = torch.ops.aten.scaled_dot_product_attention.default
# With autograd, and in torch.inference_mode, where tensors know nothing of it.
DISPATCH_KEYS = ("AutogradCPU", "CPU")
# Wrappers of tensors that PyTorch's compiler traces with.
TRACED = (FakeTensor, FunctionalTensor)

# PyTorch's compiler keeps what it compiled in files, by the graph before it chooses kernels.
CACHE_TAG = "fastattn"

_lock = threading.Lock()
_library: Any = None
_fast_path_before = True
_cache_tag_before: Any = None


def enable() -> Enabled:
    """Route PyTorch's own attention of CPU tensors to fastattn, until `disable`.

    ``torch.nn.functional.scaled_dot_product_attention``, and with it
    ``torch.nn.MultiheadAttention`` (``need_weights=False``), ``torch.nn.TransformerEncoderLayer``
    and models of other packages, are then computed by fastattn wherever it does the same, with
    autograd and in ``torch.compile``; `explain` says where not.  The fused kernel that PyTorch's
    layers use in evaluation, ``torch.backends.mha``, is turned off meanwhile.

    Returns
    -------
    context manager
        ``with fastattn.torch.enable():`` restores at its end what was before it.

    Raises
    ------
    RuntimeError
        Another package has overridden PyTorch's attention.

    See Also
    --------
    disable, is_enabled, explain

    Notes
    -----
    It holds for the whole process, all threads.  A compiled function keeps the attention that
    it was compiled with.

    Examples
    --------
    >>> import torch
    >>> import fastattn.torch
    >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
    >>> with fastattn.torch.enable():
    ...     y = layer(torch.randn(2, 10, 64))
    >>> fastattn.torch.is_enabled()
    False
    """
    global _library, _fast_path_before, _cache_tag_before
    with _lock:
        if _library is not None:
            return Enabled(True, disable)
        for key in DISPATCH_KEYS:
            if torch._C._dispatch_has_kernel_for_dispatch_key(OPERATOR.name(), key):
                raise RuntimeError(
                    f"{OPERATOR.name()} has a kernel for {key} already, of another package"
                )
        library = torch.library.Library("aten", "IMPL")
        for key in DISPATCH_KEYS:
            library.impl("scaled_dot_product_attention", _routed, key)
        _fast_path_before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        _library = library
        _cache_tag_before = _set_cache_tag(CACHE_TAG)
        OPERATOR._dispatch_cache.clear()  # of choices between kernels, which the compiler makes
        return Enabled(False, disable)


def disable() -> None:
    """Leave PyTorch's attention to PyTorch again; nothing happens where it is."""
    global _library
    with _lock:
        if _library is None:
            return
        _library._destroy()
        _library = None
        torch.backends.mha.set_fastpath_enabled(_fast_path_before)
        _set_cache_tag(_cache_tag_before)
        OPERATOR._dispatch_cache.clear()


def is_enabled() -> bool:
    """Whether `enable` is in effect."""
    return _library is not None


def _set_cache_tag(tag: Any) -> Any:
    """The tag before; without tags (before torch 2.7), what is compiled is not kept so early."""
    config: Any = getattr(torch.compiler, "config", None)
    before = getattr(config, "cache_key_tag", None)
    if before is not None:
        config.cache_key_tag = tag
    return before


def _routed(
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
    finite = scale is None or (type(scale) is float and math.isfinite(scale))
    if finite and torch.backends.cuda.flash_sdp_enabled():
        quick = directly(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if quick is not None:
            return quick
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    if _why_not(query, key, value, attn_mask, scale):
        result: Tensor = OPERATOR.decompose(*arguments, **options)
        return result
    return scaled_dot_product_attention(*arguments, **options)


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> str:
    """Why a call stays with PyTorch; empty if it does not."""
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if x is None:
            continue
        if name == "attn_mask" and x.device != query.device:
            continue  # refused by name: PyTorch would read memory that is not there
        if x.device.type != "cpu" or x.layout != torch.strided or x.is_nested:
            return f"`{name}` is not a dense CPU tensor"
        if type(x) not in (Tensor, torch.nn.Parameter) and not isinstance(x, TRACED):
            return f"`{name}` is a {type(x).__name__}, which may have an attention of its own"
        if name != "attn_mask" and x.dtype not in DTYPES:
            return f"`{name}` is {x.dtype}"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "the flash backend is off (torch.nn.attention.sdpa_kernel), here for CPUs as well"
    if transforms_active():
        return "a transform of torch.func is active"
    if isinstance(scale, float) and not math.isfinite(scale):
        return f"`scale` is {scale}"
    inputs = (query, key, value, attn_mask)
    if has_tangent(inputs):
        return "forward-mode gradients are asked for"
    width = max(query.shape[-1], value.shape[-1])
    if width > MAX_HEAD_DIM and any(x is not None and x.requires_grad for x in inputs):
        return f"gradients of more than {MAX_HEAD_DIM} elements in a head, got {width}"
    return ""


@dataclasses.dataclass(frozen=True)
class Route:
    """Which way a call of PyTorch's attention goes; ``print`` shows it as text."""

    to: Literal["fastattn", "torch"]  #: what computes the call
    reason: str
    plan: Explanation | None  #: what fastattn would run, where it does the same

    def __str__(self) -> str:
        plan = "" if self.plan is None else f"\n{self.plan}"
        return f"{'route':12}{self.to}: {self.reason}{plan}"


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Route:
    """Say which way a call of PyTorch's own attention goes now, without running it, and why.

    Parameters
    ----------
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        As in ``torch.nn.functional.scaled_dot_product_attention``.

    Returns
    -------
    Route

    Raises
    ------
    TypeError, RuntimeError
        As `scaled_dot_product_attention`, where fastattn would do the call; TypeError for tensors
        without values (``FakeTensor``).

    Examples
    --------
    >>> import torch
    >>> import fastattn.torch
    >>> x = torch.randn(1, 4, 100, 64)
    >>> fastattn.torch.explain(x, x, x).reason
    'fastattn.torch.enable() is not in effect; with it, fastattn would compute this call'
    >>> with fastattn.torch.enable():
    ...     fastattn.torch.explain(x, x, x).to
    'fastattn'
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value, attn_mask = as_in_autocast(query, key, value, attn_mask)
    why_not = _why_not(query, key, value, attn_mask, scale)
    if why_not:
        return Route("torch", why_not, None)
    q, k, v, options = translated(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    for name, x in (("query", q), ("key", k), ("value", v), ("attn_mask", attn_mask)):
        if isinstance(x, TRACED):
            raise TypeError(f"`{name}` must hold values to explain, got a {type(x).__name__}")
    arrays = map(as_array, (q, k, v))
    given = numpy_options(DEFAULTS | options)
    if dropout_p > 0.0:
        given |= {"dropout_p": dropout_p, "dropout_seed": 0}
    plan = explain_arrays(*arrays, return_lse=True, **given)
    # NumPy has no bfloat16 of its own, and calls it by its bits.
    plan = dataclasses.replace(plan, dtype=str(query.dtype).removeprefix("torch."))
    if is_enabled():
        return Route("fastattn", "fastattn.torch.enable() is in effect", plan)
    return Route(
        "torch",
        "fastattn.torch.enable() is not in effect; with it, fastattn would compute this call",
        plan,
    )
