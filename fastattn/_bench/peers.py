"""The calls of other libraries, each in the form that suits it best."""

from typing import Any

import numpy as np

from fastattn._bench import models, program
from fastattn._bench.forms import (
    Call,
    Unsupported,
    additive_mask,
    fastest,
    is_there,
    no_gradients,
    no_layer,
    no_packed,
    only_dtypes,
    only_options,
    repeated,
    score_terms,
    sequences,
    takes_part,
)
from fastattn._bench.workloads import Array, Workload, real_dtype

MASKS = ("mask", "bias", "alibi", "window", "segments")


# ---- PyTorch ------------------------------------------------------------------------------------


def torch(workload: Workload, num_threads: int) -> Call:
    """``scaled_dot_product_attention``, and autograd for gradients.

    One query per sequence: with grouped heads or with heads repeated beforehand, whichever is
    faster; unequal lengths padded behind a mask, or one call per sequence.
    """
    import torch

    only_options(workload, *MASKS)
    only_dtypes(workload, "float32", "float64", "float16", "bfloat16")
    torch.set_num_threads(num_threads)
    if workload.model:
        return models.make(workload, num_threads, "sdpa")
    if workload.product_of == "numpy":
        raise Unsupported("no product of NumPy")
    if workload.product_of:
        only_options(workload)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return program.of_torch(workload, sdpa, is_causal=workload.causal)
    if workload.layer:
        return _torch_layer(workload)
    if workload.gradients:
        return _torch_both_passes(workload)
    if workload.packed:
        return _torch_one_by_one(workload)
    keep, terms = takes_part(workload), score_terms(workload)
    mask = keep if terms is None else terms
    if workload.lengths:
        mask = is_there(workload)
    attn_mask = None if mask is None else torch.from_numpy(mask)
    q, k, v = workload.arrays()
    calls = [_torch_dense(workload, q, k, v, attn_mask)]
    if workload.reads and workload.group_size > 1:
        wide_k, wide_v = repeated(workload, k), repeated(workload, v)
        calls.append(_torch_dense(workload, q, wide_k, wide_v, attn_mask))
    if workload.lengths:
        calls.append(_torch_one_by_one(workload))
    return fastest(calls) if len(calls) > 1 else calls[0]


def _to_torch(x: Array) -> Any:
    """The same memory; torch and NumPy share no bfloat16."""
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _from_torch(x: Any) -> Array:
    import torch

    if x.dtype == torch.bfloat16:
        bits: Array = x.view(torch.uint16).numpy()
        return bits.view(real_dtype("bfloat16"))
    return np.asarray(x)


def _torch_dense(workload: Workload, q: Array, k: Array, v: Array, attn_mask: Any) -> Call:
    import torch

    sdpa = torch.nn.functional.scaled_dot_product_attention
    tensors = [_to_torch(x) for x in (q, k, v)]
    options: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": workload.causal}
    options["enable_gqa"] = q.shape[1] != k.shape[1]

    def call() -> Any:
        with torch.inference_mode():
            return sdpa(*tensors, **options)

    return Call(call, _from_torch)


def _torch_one_by_one(workload: Workload) -> Call:
    import torch

    sdpa = torch.nn.functional.scaled_dot_product_attention
    parts = [[_to_torch(x) for x in part] for part in sequences(workload)]
    options = {"is_causal": workload.causal, "enable_gqa": workload.group_size > 1}

    def call() -> list[Any]:
        with torch.inference_mode():
            return [sdpa(*part, **options) for part in parts]

    return Call(call, lambda outs: [_from_torch(out)[0] for out in outs])


def _torch_both_passes(workload: Workload) -> Call:
    import torch

    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (_to_torch(x).requires_grad_() for x in workload.arrays())
    grad_out = _to_torch(workload.grad_out())
    options = {"is_causal": workload.causal, "enable_gqa": workload.group_size > 1}

    def call() -> Any:
        return torch.autograd.grad(sdpa(q, k, v, **options), (q, k, v), grad_out)

    return Call(call, lambda grads: [_from_torch(grad) for grad in grads])


def _torch_layer(workload: Workload) -> Call:
    import torch

    only_options(workload)
    only_dtypes(workload, "float32", "float64")
    if workload.group_size > 1:
        raise Unsupported("no grouped heads in its layer")
    x = _to_torch(workload.layer_input())
    w_q, w_k, w_v, w_o = (_to_torch(w.T) for w in workload.layer_weights())
    layer = torch.nn.MultiheadAttention(
        len(w_q), workload.num_heads, bias=False, batch_first=True, dtype=x.dtype
    ).eval()
    layer.load_state_dict({"in_proj_weight": torch.cat([w_q, w_k, w_v]), "out_proj.weight": w_o})
    seen = torch.ones(workload.seqlen_q, workload.seqlen_k, dtype=torch.bool).tril()
    options = {"attn_mask": ~seen, "is_causal": True} if workload.causal else {}

    def call() -> Any:
        with torch.inference_mode():
            return layer(x, x, x, need_weights=False, **options)[0]

    return Call(call, _from_torch)


# ---- ONNX Runtime -------------------------------------------------------------------------------


def onnxruntime(workload: Workload, num_threads: int) -> Call:
    """The operator MultiHeadAttention; ONNX's own Attention for what that lacks; and
    GroupQueryAttention, which appends to a cache in place, where one query has more than one
    sequence length or several query heads per key head."""
    only_options(workload, *MASKS, "softcap")
    only_dtypes(workload, "float32", "float16")
    no_gradients(workload)
    no_packed(workload)
    no_layer(workload)
    if workload.lengths:
        return _onnx_cached(workload, num_threads)
    calls = [_onnx_attention(workload, num_threads)]
    if workload.reads:
        calls.append(_onnx_cached(workload, num_threads))
    return fastest(calls) if len(calls) > 1 else calls[0]


def _heads_last(x: Array) -> Array:
    """(batch, rows, heads * head_dim)."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(len(x), x.shape[2], -1)


def _onnx_session(
    kind: str, inputs: list[str], outputs: list[str], arrays: dict[str, Array], num_threads: int,
    **attributes: Any,
) -> Any:  # fmt: skip
    """A graph of one operator, whose outputs have q's dtype."""
    import onnxruntime
    from onnx import helper

    def described(name: str, dtype: np.dtype[Any], shape: tuple[int, ...] | None) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)

    graph = helper.make_graph(
        [helper.make_node(kind, inputs, outputs, **attributes)],
        "attention",
        [described(name, x.dtype, x.shape) for name, x in arrays.items()],
        [described(name, arrays["q"].dtype, None) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = num_threads
    settings.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )


def _onnx_attention(workload: Workload, num_threads: int) -> Call:
    contrib = (
        workload.group_size == 1 and workload.option != "softcap" and workload.dtype == "float32"
    )
    q, k, v = workload.arrays()
    terms = additive_mask(workload)
    feeds = {"q": _heads_last(q), "k": _heads_last(k), "v": _heads_last(v)}
    if terms is not None:
        feeds["terms"] = terms
    inputs, attributes = list(feeds), dict[str, Any]()
    if contrib:
        kind = "MultiHeadAttention"
        inputs[3:] = ["", "", *inputs[3:]] if terms is not None else []
        attributes = {"num_heads": workload.num_heads, "unidirectional": int(workload.causal)}
        attributes["domain"] = "com.microsoft"
    else:
        kind = "Attention"
        attributes = {"q_num_heads": workload.num_heads, "kv_num_heads": workload.num_kv_heads}
        attributes["is_causal"] = int(workload.causal)
        if workload.option == "softcap":
            attributes["softcap"] = workload.options()["softcap"]
    session = _onnx_session(kind, inputs, ["out"], feeds, num_threads, **attributes)
    rows_first = (workload.batch, workload.seqlen_q, workload.num_heads, workload.head_dim)
    return Call(
        lambda: session.run(None, feeds)[0], lambda out: out.reshape(rows_first).swapaxes(1, 2)
    )


def _onnx_cached(workload: Workload, num_threads: int) -> Call:
    """The last token's key and value are given with its query, and written into the cache, which is
    input and output: the same memory."""
    import onnxruntime

    q, k, v = workload.arrays()
    last = np.array(workload.key_lengths) - 1
    newest = np.arange(workload.batch), np.s_[:], last
    rows = {
        "q": _heads_last(q),
        "k": k[newest].reshape(workload.batch, 1, -1),
        "v": v[newest].reshape(workload.batch, 1, -1),
    }
    lengths = {
        "seqlens": last.astype(np.int32),
        "total": np.array(workload.seqlen_k, np.int32),
    }
    past = {"past_k": k, "past_v": v}
    feeds = {**rows, **past, **lengths}
    outputs = ["out", "present_k", "present_v"]
    session = _onnx_session(
        "GroupQueryAttention", list(feeds), outputs, feeds, num_threads,
        num_heads=workload.num_heads, kv_num_heads=workload.num_kv_heads, domain="com.microsoft",
    )  # fmt: skip
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("out")
    for name in ("k", "v"):
        binding.bind_ortvalue_output(f"present_{name}", values[f"past_{name}"])

    def call() -> Any:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    return Call(call, lambda out: out.reshape(workload.q_shape))


# ---- OpenVINO -----------------------------------------------------------------------------------


def openvino(workload: Workload, num_threads: int) -> Call:
    """Its operator has no grouped heads; repeating them does not count."""
    import openvino
    from openvino import opset13

    only_options(workload, *MASKS)
    only_dtypes(workload, "float32", "float16", "bfloat16")
    no_gradients(workload)
    no_packed(workload)
    no_layer(workload)
    names = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    kind = getattr(openvino.Type, names[workload.dtype])
    q, k, v = workload.arrays()
    arrays = [q, repeated(workload, k), repeated(workload, v)]
    terms = additive_mask(workload)
    if terms is not None:
        arrays.append(terms)
    parameters = [openvino.op.Parameter(kind, openvino.Shape(x.shape)) for x in arrays]
    node = opset13.scaled_dot_product_attention(*parameters, causal=workload.causal)
    config = {
        "INFERENCE_NUM_THREADS": num_threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": names[workload.dtype],
    }
    model = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU", config)
    request = model.create_infer_request()
    tensors = [_openvino_tensor(x, kind) for x in arrays]
    return Call(
        lambda: request.infer(tensors, share_inputs=True)[0],
        lambda out: out.view(real_dtype(workload.dtype)).reshape(workload.q_shape),
    )


def _openvino_tensor(x: Array, kind: Any) -> Any:
    import openvino

    if x.dtype.name == "bfloat16":
        return openvino.Tensor(x.view(np.uint16), openvino.Shape(x.shape), kind)
    return openvino.Tensor(x, shared_memory=True)


# ---- JAX ----------------------------------------------------------------------------------------


def jax(workload: Workload, num_threads: int) -> Call:
    """``jax.nn.dot_product_attention``, compiled; unequal lengths are padded, and it is told.  On
    CPUs it refuses float16."""
    import jax

    only_options(workload, *MASKS)
    only_dtypes(workload, "float32", "float64", "bfloat16")
    no_layer(workload)
    if workload.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in workload.arrays())
    keep, terms = takes_part(workload), score_terms(workload)
    arrays = {"query": q, "key": k, "value": v}
    if keep is not None:
        arrays["mask"] = keep[None, None]
    if terms is not None:
        arrays["bias"] = terms[None]
    if workload.lengths:
        arrays["key_value_seq_lengths"] = np.array(workload.key_lengths, np.int32)
        arrays["query_seq_lengths"] = np.array(workload.query_lengths, np.int32)
    arguments = {name: jax.device_put(x) for name, x in arrays.items()}

    def attend(arguments: dict[str, Any]) -> Any:
        return jax.nn.dot_product_attention(**arguments, is_causal=workload.causal)

    if workload.gradients:
        return _jax_both_passes(workload, attend, arguments)
    compiled = jax.jit(attend).lower(arguments).compile()
    return Call(
        lambda: compiled(arguments).block_until_ready(),
        lambda out: np.asarray(out).swapaxes(1, 2),
    )


def _jax_both_passes(workload: Workload, attend: Any, arguments: dict[str, Any]) -> Call:
    import jax

    grad_out = jax.device_put(np.ascontiguousarray(workload.grad_out().swapaxes(1, 2)))

    def compute(arguments: dict[str, Any], grad_out: Any) -> Any:
        _, pull_back = jax.vjp(attend, arguments)
        grads = pull_back(grad_out)[0]
        return [grads[name] for name in ("query", "key", "value")]

    compiled = jax.jit(compute).lower(arguments, grad_out).compile()
    return Call(
        lambda: jax.block_until_ready(compiled(arguments, grad_out)),
        lambda grads: [np.asarray(grad).swapaxes(1, 2) for grad in grads],
    )
