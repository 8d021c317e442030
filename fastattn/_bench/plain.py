"""The calls of NumPy: the reference, attention as it is defined, its two matrix products alone."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fastattn import reference as specification
from fastattn._bench.forms import (
    Call,
    grouped,
    no_gradients,
    no_layer,
    only_dtypes,
    only_options,
    score_terms,
    sequences,
    takes_part,
)
from fastattn._bench.workloads import Array, Workload, real_dtype
from fastattn._layers import MultiHeadAttention


def reference(workload: Workload, num_threads: int) -> Call:
    """`fastattn.reference`, the specification, in float64."""
    only_dtypes(workload, "float32", "float64", "float16", "bfloat16")
    options = workload.options()
    if workload.layer:
        return _layer(workload, lambda *operands: specification.attention(*operands, **options))
    if workload.gradients:
        q, k, v = workload.arrays()
        grad_out = workload.grad_out()
        return Call(
            lambda: specification.attention_backward(grad_out, q, k, v, **options),
            lambda grads: (grads.q, grads.k, grads.v),
        )
    if workload.lengths:
        parts = sequences(workload)
        return Call(
            lambda: [specification.attention(*part, **options) for part in parts],
            lambda outs: [out[0] for out in outs],
        )
    q, k, v = workload.arrays()
    return Call(lambda: specification.attention(q, k, v, **options), np.asarray)


def numpy(workload: Workload, num_threads: int) -> Call:
    """Softmax on whole score matrices, in place where NumPy can; 16-bit types in float32, which is
    several times faster than NumPy's own float16."""
    only_dtypes(workload, "float32", "float64", "float16", "bfloat16")
    if workload.layer:
        only_options(workload)
        settings = _Settings(workload)

        def attend(*operands: Array) -> Array:
            made = settings.attend(*(grouped(workload, x) for x in operands))
            return made.reshape(workload.q_shape)

        return _layer(workload, attend)
    if workload.gradients:
        only_options(workload)
        return _both_passes(workload)
    if workload.lengths:
        return _one_by_one(workload)
    q, k, v = (grouped(workload, x) for x in workload.arrays())
    settings = _Settings(workload)

    def call() -> Array:
        wide = (x.astype(settings.dtype, copy=False) for x in (q, k, v))
        return settings.attend(*wide).astype(q.dtype, copy=False)

    return Call(call, lambda out: out.reshape(workload.q_shape))


class _Settings:
    """The options of a workload, made ready, and attention with them."""

    def __init__(self, workload: Workload) -> None:
        double = workload.dtype == "float64"
        self.dtype = np.dtype(np.float64 if double else np.float32)
        self.axis = -2 if workload.option == "queries" else -1
        self.real = self.dtype.type
        self.scale = self.real(workload.head_dim**-0.5)
        options = workload.options()
        self.softcap = options.get("softcap")
        terms = score_terms(workload)
        self.terms = None if terms is None else grouped(workload, terms[None])
        keep = takes_part(workload)
        if workload.causal:
            seen = _seen(workload.seqlen_q, workload.seqlen_k)
            keep = seen if keep is None else keep & seen
        self.removed = None if keep is None else ~keep
        sinks = options.get("sinks")
        if sinks is not None:
            sinks = grouped(workload, sinks.astype(self.dtype)[None, :, None, None])
        self.sinks = sinks

    def weights(self, q: Array, k: Array, removed: Array | None) -> Array:
        scores = (q * self.scale) @ k.swapaxes(-1, -2)
        if self.softcap is not None:
            scores /= self.real(self.softcap)
            np.tanh(scores, out=scores)
            scores *= self.real(self.softcap)
        if self.terms is not None:
            scores += self.terms
        if removed is not None:
            np.copyto(scores, self.real(-np.inf), where=removed)
        largest = scores.max(axis=self.axis, keepdims=True)
        if self.sinks is not None:
            np.maximum(largest, self.sinks, out=largest)
        scores -= largest
        np.exp(scores, out=scores)
        total = scores.sum(axis=self.axis, keepdims=True)
        if self.sinks is not None:
            total += np.exp(self.sinks - largest)
        scores /= total
        made: Array = scores
        return made

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        made: Array = self.weights(q, k, self.removed) @ v
        return made


def _seen(seqlen_q: int, seqlen_k: int) -> Array:
    """Which keys a causal query sees."""
    return np.tri(seqlen_q, seqlen_k, seqlen_k - seqlen_q, dtype=bool)


def _one_by_one(workload: Workload) -> Call:
    """A loop over sequences of unequal lengths: less work than padding them."""
    only_options(workload)
    settings = _Settings(workload._replace(causal=False))
    parts = [[grouped(workload, x) for x in part] for part in sequences(workload)]
    removed = [~_seen(q.shape[-2], k.shape[-2]) if workload.causal else None for q, k, _ in parts]

    def call() -> list[Array]:
        made = []
        for (q, k, v), out_of_sight in zip(parts, removed, strict=True):
            wide_q, wide_k, wide_v = (x.astype(settings.dtype, copy=False) for x in (q, k, v))
            out = settings.weights(wide_q, wide_k, out_of_sight) @ wide_v
            made.append(out.astype(q.dtype, copy=False))
        return made

    def read(outs: list[Array]) -> list[Array]:
        return [out.reshape(workload.num_heads, -1, workload.head_dim) for out in outs]

    return Call(call, read)


def _layer(workload: Workload, attend: Callable[..., Array]) -> Call:
    """The layer of fastattn, whose projections are NumPy's, around another attention."""

    class Layer(MultiHeadAttention):
        def attend(self, q: Array, k: Array, v: Array, **options: Any) -> None:
            options["out"][...] = attend(q, k, v)

    layer = Layer(*workload.layer_weights(), num_heads=workload.num_heads)
    x = workload.layer_input()
    return Call(lambda: layer(x), np.asarray)


def _both_passes(workload: Workload) -> Call:
    """The gradients by the chain rule, the weights kept from the forward pass."""
    q, k, v = (grouped(workload, x) for x in workload.arrays())
    grad_out = grouped(workload, workload.grad_out())
    settings = _Settings(workload)
    narrow = real_dtype(workload.dtype)

    def call() -> list[Array]:
        wide_q, wide_k, wide_v, wide_grad = (
            x.astype(settings.dtype, copy=False) for x in (q, k, v, grad_out)
        )
        weights = settings.weights(wide_q, wide_k, settings.removed)
        out = weights @ wide_v
        grad_v = weights.swapaxes(-1, -2) @ wide_grad
        grad_scores = wide_grad @ wide_v.swapaxes(-1, -2)
        grad_scores -= (wide_grad * out).sum(axis=-1, keepdims=True)
        grad_scores *= weights
        grad_scores *= settings.scale
        grad_k = grad_scores.swapaxes(-1, -2) @ wide_q
        grads = (grad_scores @ wide_k, grad_k.sum(axis=2), grad_v.sum(axis=2))
        return [grad.astype(narrow, copy=False) for grad in grads]

    return Call(call, lambda grads: (grads[0].reshape(workload.q_shape), *grads[1:]))


def blas(workload: Workload, num_threads: int) -> Call:
    """The two matrix products alone, into memory that is there already: no softmax, no mask."""
    only_options(workload)
    only_dtypes(workload, "float32", "float64")
    no_gradients(workload)
    no_layer(workload)
    parts = sequences(workload) if workload.lengths else [workload.arrays()]
    grids = [[grouped(workload, x) for x in part] for part in parts]
    # Filled, because memory that was never written is not there yet.
    scores = [np.full((*q.shape[:-1], k.shape[-2]), 0, q.dtype) for q, k, _ in grids]
    outs = [np.full(q.shape, 0, q.dtype) for q, _, _ in grids]

    def call() -> list[Array]:
        for (q, k, v), products, out in zip(grids, scores, outs, strict=True):
            np.matmul(q, k.swapaxes(-1, -2), out=products)
            np.matmul(products, v, out=out)
        return scores

    def read(made: list[Array]) -> list[Array]:
        heads_first = [x.reshape(-1, workload.num_heads, *x.shape[-2:]) for x in made]
        return [x for batch in heads_first for x in batch]

    return Call(call, read, scores_only=True)
