"""Right before fast: results beside the reference."""

from typing import Any

import numpy as np

from fastattn import reference
from fastattn._bench import models
from fastattn._bench.forms import Call
from fastattn._bench.workloads import Array, Workload
from fastattn._gauge import in_units

# Largest difference as a share of the largest element of a row, which is a few times their usual
# size.  float32: long sums in other orders.  16-bit: one rounding of the result, and, in peers, one
# of each weight.  int8: keys and values to within 0.4 % of the largest of their row.
TOLERANCES = {
    "float64": 1e-3,
    "float32": 1e-3,
    "float16": 5e-3,
    "bfloat16": 3e-2,
    "int8": 6e-2,
}


def check(call: Call, result: Any, workload: Workload) -> None:
    """Compare the first and the last head with the reference, a few rows of it where rows are
    independent; and the whole result of a model with the same model around eager attention.

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
        If they differ by more than rounding explains.
    """
    compare = _check_gradients if workload.gradients else _check_rows
    if workload.layer:
        compare = _check_layer
    if workload.model:
        compare = _check_model
    compare(call, call.read(result), workload)


def _near(found: Array, expected: Array, workload: Workload) -> None:
    found = np.asarray(found, np.float64)
    expected = np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise AssertionError(f"shape {found.shape} instead of {expected.shape}")
    tolerance = TOLERANCES[workload.cache_dtype or workload.dtype]
    size = np.abs(expected).max(axis=-1, keepdims=True)
    # A row whose gradients cancel is as exact as the others, not as its own small size.
    size = np.maximum(size, np.sqrt(np.mean(expected**2)))
    wrong = in_units(np.abs(found - expected), tolerance * size) > 1
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise AssertionError(f"{found[at]:.6g} instead of {expected[at]:.6g} at {at}")


def _heads(workload: Workload) -> set[tuple[int, int]]:
    return {(0, 0), (workload.batch - 1, workload.num_heads - 1)}


def _check_rows(call: Call, out: Any, workload: Workload) -> None:
    q, k, v = workload.arrays()
    options = workload.options()
    for b, h in _heads(workload):
        num_rows, num_keys = workload.query_lengths[b], workload.key_lengths[b]
        rows = np.unique(np.linspace(0, num_rows - 1, 5).astype(int))
        keys, values = (x[b, h // workload.group_size, :num_keys] for x in (k, v))
        if call.scores_only:
            expected = q[b, h, rows].astype(np.float64) @ keys.T
        elif workload.option == "queries":
            expected = reference.attention(q[b, h], keys, values, **options)[rows]
        else:
            offset = num_keys - num_rows
            expected = np.concatenate(
                [_expected_row(q[b, h, i], keys, values, i, offset, h, options) for i in rows]
            )
        _near(out[b][h, rows], expected, workload)


def _expected_row(
    q: Array, k: Array, v: Array, i: int, offset: int, h: int, options: dict[str, Any]
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
    out: Array = reference.attention(q[None], k, v, q_offset=int(i) + offset, **mine)
    return out


def _check_layer(call: Call, out: Any, workload: Workload) -> None:
    w_q, w_k, w_v, w_o = (w.astype(np.float64) for w in workload.layer_weights())
    for b in {0, workload.batch - 1}:
        x = workload.layer_input()[b].astype(np.float64)
        q, k, v = (
            (x @ w).reshape(len(x), -1, workload.head_dim).swapaxes(0, 1) for w in (w_q, w_k, w_v)
        )
        heads = reference.attention(q, k, v, **workload.options())
        _near(out[b], heads.swapaxes(0, 1).reshape(len(x), -1) @ w_o, workload)


def _check_model(call: Call, out: Any, workload: Workload) -> None:
    _near(out, models.expected(workload), workload)


def _check_gradients(call: Call, grads: Any, workload: Workload) -> None:
    q, k, v = workload.arrays()
    grad_out = workload.grad_out()
    size = workload.group_size
    # All query heads of a key head: its gradient is their sum.
    for b, group in {(b, h // size) for b, h in _heads(workload)}:
        mine = np.s_[b, group * size : (group + 1) * size]
        its = np.s_[b, group : group + 1]
        expected = reference.attention_backward(
            grad_out[mine], q[mine], k[its], v[its], **workload.options()
        )
        wanted = (expected.q, expected.k, expected.v)
        for found, where, gradient in zip(grads, (mine, its, its), wanted, strict=True):
            assert gradient is not None
            _near(found[where], gradient, workload)
