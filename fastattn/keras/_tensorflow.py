"""Attention of TensorFlow's tensors: a function that the graph calls back, with a gradient."""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from fastattn.keras import _numpy
from fastattn.keras._numpy import Call


def refusal(query: Any) -> str:
    """Why a call cannot be computed here, whatever its arguments are; empty if it can."""
    if not tf.executing_eagerly() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        return (
            "XLA (jit_compile=True) cannot call functions of other libraries on TensorFlow: "
            "compile with jit_compile=False"
        )
    for device in tf.config.list_logical_devices():
        if device.device_type in ("GPU", "TPU"):
            return f"attention is computed on the CPU, and TensorFlow would use {device.name}"
    return ""


def attend(call: Call, q: Any, k: Any, v: Any, *arrays: Any) -> tuple[Any, Any]:
    """`_numpy.attend`, and `_numpy.gradients` for its gradient."""
    lse_dtype = tf.float64 if q.dtype == tf.float64 else tf.float32

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def forward(q: Any, k: Any, v: Any, *arrays: Any) -> Any:
        out, lse = _called_back(
            functools.partial(_numpy.attend, call), (q, k, v, *arrays), (q.dtype, lse_dtype)
        )
        out.set_shape((*q.shape[:-1], v.shape[-1]))
        lse.set_shape((q.shape[0], q.shape[2], q.shape[1]))

        def gradient(grad_out: Any, grad_lse: Any) -> Any:
            grads = backward(grad_out, q, k, v, out, lse, *arrays)
            return (*grads, *[None] * (3 + len(arrays) - call.num_gradients))

        return (out, lse), gradient

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def backward(*inputs: Any) -> Any:
        of = (*inputs[1:4], *inputs[6:])[: call.num_gradients]
        grads = _called_back(
            functools.partial(_numpy.gradients, call), inputs, [x.dtype for x in of]
        )
        for gradient, x in zip(grads, of, strict=True):
            gradient.set_shape(x.shape)

        def second(*upstream: Any) -> Any:
            raise NotImplementedError("fastattn has no second derivatives")

        return tuple(grads), second

    result: tuple[Any, Any] = forward(q, k, v, *arrays)
    return result


def _called_back(function: Any, inputs: Any, dtypes: Any) -> Any:
    # Without state, so that a graph drops what it does not need, gradients of inference first.
    return tf.numpy_function(function, inputs, dtypes, stateful=False, name="fastattn_attention")
