"""The ONNX node tests for `Attention` (onnx 1.23.2), through an adapter from node to fa.attention.

ONNX publishes 93 cases; 75 ask for the result and the present keys and values only, and all of
them must pass.  The other 18 also ask for the score matrix, which fastattn never forms.
"""

import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest

import fastattn as fa

# ONNX takes some ten seconds to make its cases, in each process that asks for them.
pytestmark = pytest.mark.xdist_group("onnx")

NUM_CASES = 75
NUM_SCORE_MATRIX_CASES = 18

# Of the attributes, softmax_precision says what the softmax is computed in; it is absent here.
KNOWN_ATTRIBUTES = {
    "is_causal", "kv_num_heads", "left_window_size", "q_num_heads", "right_window_size", "scale",
    "softcap",
}  # fmt: skip


@cache
def _cases() -> tuple[list[Any], list[Any]]:
    """The cases without and with the score matrix.  ONNX makes their data at import, unseeded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = np.random.get_state()  # noqa: NPY002
        np.random.seed(0)  # noqa: NPY002
        from onnx.backend.test.case.node import collect_testcases

        cases = [c for c in collect_testcases("Attention") if not c.name.endswith("_expanded")]
        np.random.set_state(state)  # noqa: NPY002
    plain, with_scores = [], []
    for case in cases:
        outputs = list(case.model.graph.node[0].output)
        (with_scores if len(outputs) > 3 and outputs[3] else plain).append(case)
    return plain, with_scores


def _inputs(case: Any) -> dict[str, np.ndarray]:
    """The node's inputs by the names of the operator's definition; absent ones are left out."""
    names = ["Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"]
    arrays = iter(case.data_sets[0][0])
    given = zip(names, case.model.graph.node[0].input, strict=False)
    return {name: next(arrays) for name, shown in given if shown}


def _heads(x: np.ndarray, num_heads: int | None) -> np.ndarray:
    """(batch, seqlen, num_heads * head_dim) as (batch, num_heads, seqlen, head_dim)."""
    if x.ndim == 4:
        return x
    assert num_heads is not None
    return x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)


def run_node(
    attributes: dict[str, Any], inputs: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Y, present_key and present_value of an ONNX Attention node, computed by fastattn."""
    assert set(attributes) <= KNOWN_ATTRIBUTES
    three_d = inputs["Q"].ndim == 3
    q = _heads(inputs["Q"], attributes.get("q_num_heads"))
    k = _heads(inputs["K"], attributes.get("kv_num_heads"))
    v = _heads(inputs["V"], attributes.get("kv_num_heads"))
    seqlen_q = q.shape[-2]

    # Query i stands behind the past keys; in a padded cache of given length it is one of the last
    # valid ones; without a cache the alignment is top-left.
    options: dict[str, Any] = {"q_offset": 0}
    if "past_key" in inputs:
        options["q_offset"] = inputs["past_key"].shape[2]
        k = np.concatenate([inputs["past_key"], k], axis=2)
        v = np.concatenate([inputs["past_value"], v], axis=2)
    if "nonpad_kv_seqlen" in inputs:
        options["kv_lengths"] = inputs["nonpad_kv_seqlen"]
        options["q_offset"] = inputs["nonpad_kv_seqlen"] - seqlen_q
    present_key, present_value = k, v

    if "attn_mask" in inputs:
        attn_mask = inputs["attn_mask"]
        missing = k.shape[-2] - attn_mask.shape[-1]  # keys past the mask do not take part
        is_bool = attn_mask.dtype == np.bool_
        pad = [(0, 0)] * (attn_mask.ndim - 1) + [(0, missing)]
        if not is_bool:
            attn_mask = attn_mask.astype(np.float32)
        attn_mask = np.pad(attn_mask, pad, constant_values=False if is_bool else -np.inf)
        options["mask" if is_bool else "bias"] = attn_mask
    windows = [attributes.get(f"{side}_window_size", -1) for side in ("left", "right")]
    options["window"] = tuple(None if size == -1 else size for size in windows)
    options["causal"] = bool(attributes.get("is_causal", 0))
    options["scale"] = attributes.get("scale")
    options["softcap"] = attributes.get("softcap") or None

    # 16-bit arrays are not accepted by this version of fastattn: computed in float32, rounded once.
    dtype = q.dtype
    if dtype.itemsize == 2:
        q, k, v = (x.astype(np.float32) for x in (q, k, v))
    y = fa.attention(q, k, v, **options).astype(dtype)
    if three_d:
        y = y.swapaxes(1, 2).reshape(y.shape[0], seqlen_q, -1)
    return y, present_key, present_value


@pytest.mark.any_kernel_set
def test_number_of_cases() -> None:
    plain, with_scores = _cases()
    assert len(plain) == NUM_CASES
    assert len(with_scores) == NUM_SCORE_MATRIX_CASES


@pytest.mark.parametrize("index", range(NUM_CASES))
def test_node(index: int) -> None:
    from onnx.helper import get_attribute_value

    case = _cases()[0][index]
    print(case.name)
    node = case.model.graph.node[0]
    attributes = {a.name: get_attribute_value(a) for a in node.attribute}
    results = run_node(attributes, _inputs(case))
    expected = case.data_sets[0][1]
    # The bfloat16 expectations carry bfloat16 intermediates: two of its roundings are 1.6e-2.
    rtol = 1.6e-2 if expected[0].dtype.name == "bfloat16" else 1e-3
    for result, right in zip(results, expected, strict=False):
        assert result.shape == right.shape and result.dtype == right.dtype
        np.testing.assert_allclose(
            result.astype(np.float64),
            right.astype(np.float64),
            rtol=rtol,
            atol=1e-7,
            err_msg=case.name,
        )
