"""The one door to C.  Every argument is already validated, broadcast and allocated."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

_Result = TypeVar("_Result")

class Problem:
    dtype: np.dtype[Any]
    like: NDArray[Any]
    single_head: bool
    is_plain: bool
    isa: str
    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    k_scale: NDArray[np.float32] | None
    v_scale: NDArray[np.float32] | None
    page_table: NDArray[np.int64] | None
    q_starts: NDArray[np.int64] | None
    k_starts: NDArray[np.int64] | None
    q_shape: tuple[int, ...]
    num_kv_heads: int
    seqlen_k: int
    head_dim_v: int
    out: NDArray[Any] | None
    lse: NDArray[Any] | None
    residual: NDArray[Any] | None
    weighing: NDArray[Any] | None
    exact: NDArray[Any] | None
    scale: float
    softcap: float
    bias: NDArray[Any] | None
    alibi_slopes: NDArray[np.float64] | None
    sinks: NDArray[np.float64] | None
    mask: NDArray[np.bool_] | None
    kv_lengths: NDArray[np.int64] | None
    q_offset: NDArray[np.int64] | None
    q_segment_ids: NDArray[np.int64] | None
    k_segment_ids: NDArray[np.int64] | None
    causal: bool
    softmax_over_queries: bool
    window_left: int
    window_right: int
    dropout_p: float
    dropout_seed: int | None
    num_threads: int
    def __init__(
        self,
        isa: str,
        q: NDArray[Any],
        k: NDArray[Any],
        v: NDArray[Any],
        q_shape: tuple[int, ...],
        num_kv_heads: int,
        seqlen_k: int,
        head_dim_v: int,
        like: NDArray[Any],
        single_head: bool,
    ) -> None: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def seqlen_q(self) -> int: ...
    @property
    def batch_shape(self) -> tuple[int, ...]: ...
    @property
    def entries(self) -> tuple[int, ...]: ...
    @property
    def out_shape(self) -> tuple[int, ...]: ...
    @property
    def lse_shape(self) -> tuple[int, ...]: ...
    def as_in_core(self, array: NDArray[Any]) -> NDArray[Any]: ...
    def with_heads(self, array: NDArray[Any]) -> NDArray[Any]: ...

def plain_problem(
    isa: str,
    q: Any,
    k: Any,
    v: Any,
    array: type,
    dtypes: tuple[np.dtype[Any], ...],
) -> Problem | None: ...
def attention(problem: Problem) -> None: ...
def attention_backward(
    problem: Problem,
    grad_out: NDArray[Any],
    grad_lse: NDArray[Any] | None = None,
    grad_q: NDArray[Any] | None = None,
    grad_k: NDArray[Any] | None = None,
    grad_v: NDArray[Any] | None = None,
    grad_bias: NDArray[Any] | None = None,
    sink_terms: NDArray[Any] | None = None,
) -> None: ...
def attention_weights(
    problem: Problem,
    weights: NDArray[Any],
    rows: NDArray[np.int64] | None = None,
    places: NDArray[np.int64] | None = None,
    heads: NDArray[np.int64] | None = None,
    pool: tuple[int, int] | None = None,
    sums: bool = False,
) -> None: ...
def describe(problem: Problem) -> dict[str, Any]: ...
def differing(given: tuple[Any, ...], defaults: tuple[Any, ...]) -> list[int]: ...
def probe_fma(
    isa: str, double_precision: bool, rounds: int, num_threads: int
) -> tuple[float, float]: ...
def probe_read(array: NDArray[Any], num_threads: int) -> float: ...
def available_isas() -> tuple[str, ...]: ...
def engines(isa: str) -> tuple[str, ...]: ...
def known_isas() -> tuple[str, ...]: ...
def is_granted(isa: str) -> bool: ...
def selected_isa() -> str: ...
def has_openmp() -> bool: ...
def openmp_max_threads() -> int: ...
def team_limit() -> int: ...
def build_info() -> dict[str, str]: ...

class DefaultFloatMode:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...

class Gate:
    def change(
        self,
        prepare: Callable[..., tuple[_Result, list[tuple[Any, Any, Any]]]],
        *args: Any,
    ) -> _Result: ...
    def read(self, look: Callable[[], Any], use: Callable[..., _Result], *args: Any) -> _Result: ...
    def being_read(self) -> list[Any]: ...
