"""Who computes: each contender turns a workload into a call, in the form that suits it best.

Layouts are changed, heads repeated, masks built, graphs compiled before the clock starts; a call
makes a new result, as users call them.  `Unsupported` says that a contender has no such call.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn import reference
from fastattn.attention import attention
from fastattn.bench.workloads import Workload

Array = NDArray[Any]


class Unsupported(Exception):
    """The contender cannot compute this workload; the message says why."""


class Call(NamedTuple):
    """What is timed, and how to read its result."""

    run: Callable[[], Any]
    # The result as (batch, num_heads, seqlen_q, head_dim), or, where `scores_only` is true, the
    # unscaled scores, (batch, num_heads, seqlen_q, seqlen_k).
    read: Callable[[Any], Array]
    scores_only: bool = False


class Contender(NamedTuple):
    """A way to compute attention."""

    module: str  # that must be importable, along with those in `needs`
    make: Callable[[Workload, int], Call]
    needs: tuple[str, ...] = ()
    holds_scores: bool = False  # memory for whole score matrices


# ---- arguments in the forms that others take ----------------------------------------------------


def _takes_part(workload: Workload) -> Array | None:
    """Which keys take part, (seqlen_q, seqlen_k), for those who know no such option by name."""
    options = workload.options()
    shape = (workload.seqlen_q, workload.seqlen_k)
    offset = workload.seqlen_k - workload.seqlen_q
    keep: Array | None = options.get("mask")
    if "segment_ids" in options:
        q_ids, k_ids = options["segment_ids"]
        keep = q_ids[:, None] == k_ids
    if "window" in options:
        keep = np.tri(*shape, offset, dtype=bool)
        keep &= ~np.tri(*shape, offset - options["window"][0] - 1, dtype=bool)
    return keep


def _score_terms(workload: Workload) -> Array | None:
    """What is added to the scores, (num_heads, seqlen_q, seqlen_k)."""
    options = workload.options()
    if "alibi_slopes" in options:
        position = np.arange(workload.seqlen_q)[:, None] + workload.seqlen_k - workload.seqlen_q
        distance = np.abs(position - np.arange(workload.seqlen_k))
        terms = -options["alibi_slopes"][:, None, None] * distance
        made: Array = terms.astype(workload.dtype)
        return made
    bias: Array | None = options.get("bias")
    return bias


def _additive_mask(workload: Workload) -> Array | None:
    """`_takes_part` and `_score_terms` as one array of terms, (1, num_heads or 1, ..., ...)."""
    keep, terms = _takes_part(workload), _score_terms(workload)
    if keep is not None:
        terms = np.where(keep, 0, -np.inf).astype(workload.dtype)[None]
    return None if terms is None else terms[None]


def _grouped(workload: Workload, x: Array) -> Array:
    """Query heads beside the key head that they read: (batch, kv heads, group, rows, columns)."""
    return x.reshape(x.shape[0], workload.num_kv_heads, -1, *x.shape[2:])


def _repeated(workload: Workload, x: Array) -> Array:
    return np.repeat(x, workload.group_size, axis=1)


def _only(workload: Workload, *options: str) -> None:
    if workload.option not in ("", *options):
        raise Unsupported(f"no {workload.option}")
    if workload.option and workload.causal:
        raise Unsupported(f"no {workload.option} with causal")


# ---- the contenders -----------------------------------------------------------------------------


def _fastattn(workload: Workload, num_threads: int) -> Call:
    q, k, v = workload.arrays()
    options = workload.options()
    return Call(lambda: attention(q, k, v, num_threads=num_threads, **options), np.asarray)


def _numpy(workload: Workload, num_threads: int) -> Call:
    """Softmax on whole score matrices, in place where NumPy can."""
    q, k, v = (_grouped(workload, x) for x in workload.arrays())
    options = workload.options()
    real = np.dtype(workload.dtype).type
    scale = real(workload.head_dim**-0.5)
    keep, terms = _takes_part(workload), _score_terms(workload)
    if terms is not None:
        terms = _grouped(workload, terms[None])
    if workload.causal:
        offset = workload.seqlen_k - workload.seqlen_q
        seen = np.tri(workload.seqlen_q, workload.seqlen_k, offset, dtype=bool)
        keep = seen if keep is None else keep & seen
    removed = None if keep is None else ~keep
    sinks = options.get("sinks")
    if sinks is not None:
        sinks = _grouped(workload, sinks.astype(workload.dtype)[None, :, None, None])
    axis = -2 if workload.option == "queries" else -1

    def call() -> Array:
        scores = (q * scale) @ k.swapaxes(-1, -2)
        if "softcap" in options:
            scores /= real(options["softcap"])
            np.tanh(scores, out=scores)
            scores *= real(options["softcap"])
        if terms is not None:
            scores += terms
        if removed is not None:
            np.copyto(scores, real(-np.inf), where=removed)
        largest = scores.max(axis=axis, keepdims=True)
        if sinks is not None:
            np.maximum(largest, sinks, out=largest)
        scores -= largest
        np.exp(scores, out=scores)
        total = scores.sum(axis=axis, keepdims=True)
        if sinks is not None:
            total += np.exp(sinks - largest)
        scores /= total
        result: Array = scores @ v
        return result

    q_shape = (workload.batch, workload.num_heads, workload.seqlen_q, workload.head_dim)
    return Call(call, lambda out: out.reshape(q_shape))


def _blas(workload: Workload, num_threads: int) -> Call:
    """The two matrix products alone, into memory that is there already: no softmax, no mask."""
    _only(workload)
    q, k, v = (_grouped(workload, x) for x in workload.arrays())
    # Filled, because memory that was never written is not there yet.
    scores = np.full((*q.shape[:-1], workload.seqlen_k), 0, q.dtype)
    out = np.full(q.shape, 0, q.dtype)

    def call() -> Array:
        np.matmul(q, k.swapaxes(-1, -2), out=scores)
        np.matmul(scores, v, out=out)
        return scores

    shape = (workload.batch, workload.num_heads, workload.seqlen_q, workload.seqlen_k)
    return Call(call, lambda scores: scores.reshape(shape), scores_only=True)


def _torch(workload: Workload, num_threads: int) -> Call:
    import torch

    _only(workload, "mask", "bias", "alibi", "window", "segments")
    torch.set_num_threads(num_threads)
    q, k, v = (torch.from_numpy(x) for x in workload.arrays())
    keep, terms = _takes_part(workload), _score_terms(workload)
    mask = keep if terms is None else terms
    attn_mask = None if mask is None else torch.from_numpy(mask)
    grouped = workload.group_size > 1
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def call() -> Any:
        with torch.inference_mode():
            return sdpa(q, k, v, attn_mask=attn_mask, is_causal=workload.causal, enable_gqa=grouped)

    return Call(call, lambda out: np.asarray(out))


def _onnxruntime(workload: Workload, num_threads: int) -> Call:
    """The MultiHeadAttention operator; ONNX's own Attention for what that lacks."""
    import onnxruntime
    from onnx import TensorProto, helper

    _only(workload, "mask", "bias", "alibi", "window", "segments", "softcap")
    if workload.dtype != "float32":
        raise Unsupported(f"no {workload.dtype}")
    contrib = workload.group_size == 1 and workload.option != "softcap"
    q, k, v = workload.arrays()
    terms = _additive_mask(workload)

    def packed(x: Array) -> Array:  # (batch, rows, heads * head_dim)
        return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(len(x), x.shape[2], -1)

    feeds = {"q": packed(q), "k": packed(k), "v": packed(v)}
    if terms is not None:
        feeds["terms"] = terms
    attributes: dict[str, Any]
    if contrib:
        inputs = ["q", "k", "v", *(["", "", "terms"] if terms is not None else [])]
        attributes = {"num_heads": workload.num_heads, "unidirectional": int(workload.causal)}
        kind, domain = "MultiHeadAttention", "com.microsoft"
        attributes["domain"] = domain
    else:
        inputs = ["q", "k", "v", *(["terms"] if terms is not None else [])]
        attributes = {"q_num_heads": workload.num_heads, "kv_num_heads": workload.num_kv_heads}
        attributes["is_causal"] = int(workload.causal)
        if workload.option == "softcap":
            attributes["softcap"] = workload.options()["softcap"]
        kind = "Attention"
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, ["out"], **attributes)],
        "attention",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in feeds.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = num_threads
    settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    shape = (workload.batch, workload.seqlen_q, workload.num_heads, workload.head_dim)
    return Call(lambda: session.run(None, feeds)[0], lambda out: out.reshape(shape).swapaxes(1, 2))


def _openvino(workload: Workload, num_threads: int) -> Call:
    import openvino
    from openvino import opset13

    _only(workload, "mask", "bias", "alibi", "window", "segments")
    q, k, v = workload.arrays()
    # Its operator has no grouped heads; repeating them does not count.
    feeds = [q, _repeated(workload, k), _repeated(workload, v)]
    terms = _additive_mask(workload)
    if terms is not None:
        feeds.append(terms)
    parameters = [opset13.parameter(list(x.shape), x.dtype) for x in feeds]
    node = opset13.scaled_dot_product_attention(*parameters, causal=workload.causal)
    config = {
        "INFERENCE_NUM_THREADS": num_threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f64" if workload.dtype == "float64" else "f32",
    }
    if workload.dtype != "float32":
        raise Unsupported(f"no {workload.dtype}")
    model = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU", config)
    request = model.create_infer_request()
    return Call(lambda: request.infer(feeds, share_inputs=True)[0], np.asarray)


def _jax(workload: Workload, num_threads: int) -> Call:
    import jax

    _only(workload, "mask", "bias", "alibi", "window", "segments")
    if workload.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in workload.arrays())
    keep, terms = _takes_part(workload), _score_terms(workload)
    arrays = {"query": q, "key": k, "value": v}
    if keep is not None:
        arrays["mask"] = keep[None, None]
    if terms is not None:
        arrays["bias"] = terms[None]
    arguments = {name: jax.device_put(x) for name, x in arrays.items()}

    def compute(arguments: dict[str, Any]) -> Any:
        return jax.nn.dot_product_attention(**arguments, is_causal=workload.causal)

    compiled = jax.jit(compute).lower(arguments).compile()
    return Call(
        lambda: compiled(arguments).block_until_ready(),
        lambda out: np.asarray(out).swapaxes(1, 2),
    )


CONTENDERS = {
    "fastattn": Contender("fastattn", _fastattn),
    "numpy": Contender("numpy", _numpy, holds_scores=True),
    "blas": Contender("numpy", _blas, holds_scores=True),
    "torch": Contender("torch", _torch),
    "onnxruntime": Contender("onnxruntime", _onnxruntime, ("onnx",)),
    "openvino": Contender("openvino", _openvino),
    "jax": Contender("jax", _jax, holds_scores=True),
}


def installed() -> dict[str, str]:
    """Names and versions of the contenders that can run here.

    Returns
    -------
    dict
        Name to version, in the order in which they are shown.

    Examples
    --------
    >>> from fastattn.bench.contenders import installed
    >>> list(installed())[:3]
    ['fastattn', 'numpy', 'blas']
    """
    found = {}
    for name, contender in CONTENDERS.items():
        if all(importlib.util.find_spec(m) for m in (contender.module, *contender.needs)):
            try:
                found[name] = importlib.metadata.version(contender.module)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "unknown"
    return found


def environment(num_threads: int) -> dict[str, str]:
    """Variables that give every contender the same number of threads, and no other settings.

    They are read when a library is loaded, and must be there before its import.

    Parameters
    ----------
    num_threads : int
        At least 1.

    Returns
    -------
    dict
        Name to value.

    Examples
    --------
    >>> from fastattn.bench.contenders import environment
    >>> environment(2)["OMP_NUM_THREADS"]
    '2'
    """
    names = ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM", "FASTATTN")
    made = {f"{name}_NUM_THREADS": str(num_threads) for name in names}
    made |= {
        "NPROC": str(num_threads),  # XLA's threads
        "JAX_PLATFORMS": "cpu",
    }
    if num_threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        made["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    return made


# ---- right before fast --------------------------------------------------------------------------


def check(call: Call, result: Any, workload: Workload) -> None:
    """Compare a few rows of the first and the last head with the reference.

    Parameters
    ----------
    call : Call
        What computed `result`.
    result : object
        What ``call.run()`` returned.
    workload : Workload
        What it was to compute.

    Raises
    ------
    AssertionError
        If they differ by more than rounding in single precision explains.
    """
    out = call.read(result)
    q, k, v = workload.arrays()
    options = workload.options()
    rows = np.unique(np.linspace(0, workload.seqlen_q - 1, 5).astype(int))
    for b, h in {(0, 0), (workload.batch - 1, workload.num_heads - 1)}:
        keys, values = (x[b, h // workload.group_size] for x in (k, v))
        if call.scores_only:
            expected = q[b, h, rows].astype(np.float64) @ keys.T
        elif workload.option == "queries":
            expected = reference.attention(q[b, h], keys, values, **options)[rows]
        else:
            expected = np.concatenate(
                [
                    _expected_row(workload, q[b, h, i], keys, values, i, h, options)
                    for i in map(int, rows)
                ]
            )
        np.testing.assert_allclose(out[b, h, rows], expected, rtol=1e-3, atol=1e-4)


def _expected_row(
    workload: Workload, q: Array, k: Array, v: Array, i: int, h: int, options: dict[str, Any]
) -> Array:
    """Row i of head h by the reference, shape (1, head_dim)."""
    mine = dict(options)
    if "mask" in mine:
        mine["mask"] = mine["mask"][i : i + 1]
    if "bias" in mine:
        mine["bias"] = mine["bias"][h, i : i + 1]
    for name in ("alibi_slopes", "sinks"):
        if name in mine:
            mine[name] = mine[name][h : h + 1]
    if "segment_ids" in mine:
        q_ids, k_ids = mine["segment_ids"]
        mine["segment_ids"] = (q_ids[i : i + 1], k_ids)
    offset = i + workload.seqlen_k - workload.seqlen_q
    out: Array = reference.attention(q[None], k, v, q_offset=offset, **mine)
    return out
