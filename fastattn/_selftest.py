"""A quick check of this installation: every kernel set that this machine runs, every option,
against `fastattn.reference`.

It finds a broken build or a machine that does not compute what it promises; the test suite in the
source tree is the full proof.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from fastattn import _config, _core, reference
from fastattn._attention import attention
from fastattn._gauge import Exact, lse_gauge, out_gauge

Array = NDArray[Any]
Options = dict[str, Any]

# Largest gauge allowed.  Naive NumPy float32 shows up to 4.1; float64 has no more precise reference
# here, so its results carry the reference's own error too.
MAX_ERROR = {"float32": 4.0, "float64": 8.0}

THREADS = (1, 2, 3)


class Case(NamedTuple):
    """Arrays and options of one call; the dtype of `q`, `k`, `v` and the residual is the case's."""

    q: Array
    k: Array
    v: Array
    options: Options


class Outcome(NamedTuple):
    """What one call showed."""

    error: float  # in the units of MAX_ERROR
    problems: tuple[str, ...]


# Sizes that are no multiple of any register tile or block.
_BATCH, _HEADS, _SEQLEN_Q, _SEQLEN_K, _HEAD_DIM = 2, 4, 70, 151, 40


def _plain(rng: np.random.Generator, dtype: str, **options: Any) -> Case:
    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(dtype)

    return Case(
        normal(_BATCH, _HEADS, _SEQLEN_Q, _HEAD_DIM),
        normal(_BATCH, _HEADS, _SEQLEN_K, _HEAD_DIM),
        normal(_BATCH, _HEADS, _SEQLEN_K, _HEAD_DIM),
        options,
    )


def _grouped_views(rng: np.random.Generator, dtype: str) -> Case:
    q, k, v, _ = _plain(rng, dtype)
    q, k, v = (x.swapaxes(-2, -3).copy().swapaxes(-2, -3) for x in (q, k[:, ::2], v[:, ::2]))
    return Case(q, k, v, {"causal": True})


def _masked(rng: np.random.Generator, dtype: str) -> Case:
    case = _plain(rng, dtype)
    mask = rng.random((_SEQLEN_Q, _SEQLEN_K)) < 0.7
    mask[5] = False  # a query with no key left
    mask[:, 100] = False
    case.k[..., 100, :] = np.nan
    case.v[..., 100, :] = np.nan
    return case._replace(options={"mask": mask})


def _segments(rng: np.random.Generator, dtype: str) -> Case:
    ids = np.sort(rng.integers(0, 4, _SEQLEN_K))
    return _plain(rng, dtype, segment_ids=(ids[:_SEQLEN_Q], ids))


def _residual(rng: np.random.Generator, dtype: str) -> Case:
    case = _plain(rng, dtype)
    residual = rng.standard_normal((_BATCH, _HEADS, _SEQLEN_Q, 17)).astype(dtype)
    return case._replace(v=case.v[..., :17], options={"residual": residual})


def _bias(rng: np.random.Generator, dtype: str) -> Case:
    return _plain(rng, dtype, bias=rng.standard_normal((_HEADS, 1, _SEQLEN_K)).astype(dtype))


def _decode(rng: np.random.Generator, dtype: str) -> Case:
    case = _plain(rng, dtype, kv_lengths=np.array([_SEQLEN_K, 33]), causal=True)
    return case._replace(q=case.q[..., :1, :])


CASES: Mapping[str, Callable[[np.random.Generator, str], Case]] = {
    "all keys": _plain,
    "causal, grouped heads, views": _grouped_views,
    "window": lambda rng, dtype: _plain(rng, dtype, window=(20, 3)),
    "mask over NaN": _masked,
    "segments": _segments,
    "one query, two lengths": _decode,
    "bias": _bias,
    "alibi": lambda rng, dtype: _plain(rng, dtype, alibi_slopes=np.array([0.5, 0.25, 0.1, 0.0])),
    "softcap, scale": lambda rng, dtype: _plain(rng, dtype, softcap=5.0, scale=-0.7),
    "sinks": lambda rng, dtype: _plain(rng, dtype, sinks=np.array([0.0, 3.0, -2.0, 1.0])),
    "dropout": lambda rng, dtype: _plain(rng, dtype, dropout_p=0.3, dropout_seed=1),
    "residual, other head_dim_v": _residual,
    "softmax over queries": lambda rng, dtype: _plain(
        rng, dtype, softmax_axis="queries", causal=True, q_offset=60
    ),
}


@contextmanager
def _kernel_set(isa: str) -> Iterator[None]:
    selected = _config.ISA
    _config.ISA = isa
    try:
        yield
    finally:
        _config.ISA = selected


def _largest_score(case: Case) -> float:
    """An upper bound of every |score|, with all that is added to the product."""
    options = case.options
    scale = abs(options.get("scale", 1 / np.sqrt(case.q.shape[-1])))
    rows = [np.linalg.norm(np.nan_to_num(x).astype(np.float64), axis=-1) for x in (case.q, case.k)]
    score = scale * rows[0].max() * rows[1].max()
    for name, factor in (("bias", 1), ("sinks", 1), ("alibi_slopes", _SEQLEN_K)):
        if name in options:
            score += factor * np.abs(options[name]).max()
    return float(score)


def check(case: Case, isa: str) -> Outcome:
    """Compute `case` with the kernel set `isa` and compare it with the reference.

    Parameters
    ----------
    case : Case
        What to compute.
    isa : str
        One of the kernel sets available on this machine.

    Returns
    -------
    Outcome
        The largest error, and a line for each promise that was not kept.
    """
    with _kernel_set(isa):
        results = [
            attention(*case[:3], **case.options, return_lse=True, num_threads=threads)
            for threads in THREADS
        ]
    out, lse = results[0]
    problems = [
        f"other bits with {threads} threads"
        for threads, (other, other_lse) in zip(THREADS, results, strict=True)
        if out.tobytes() != other.tobytes() or lse.tobytes() != other_lse.tobytes()
    ]
    exact = _exact(case)
    error, lse_error = out_gauge(out, exact), lse_gauge(lse, exact)
    allowed = MAX_ERROR[out.dtype.name]
    problems += [
        f"{name} {value:.3g} > {allowed:g}"
        for name, value in (("error", error), ("error of lse", lse_error))
        if value > allowed
    ]
    return Outcome(error, tuple(problems))


def _exact(case: Case) -> Exact:
    """The reference's result, with one bound of K for all rows."""
    out, lse = reference.attention(*case[:3], **case.options, return_lse=True)
    options = {key: x for key, x in case.options.items() if key != "residual"}
    weighted = reference.attention(case.q, case.k, np.abs(case.v), **options)
    gain = 1 + _largest_score(case)
    return Exact(
        out,
        lse,
        out_unit=gain * weighted + np.abs(case.options.get("residual", 0)),
        lse_unit=gain + np.abs(lse),
        floor_unit=np.zeros(()),
    )


def run(file: TextIO) -> int:
    """Check every case on every available kernel set and print a table.

    Parameters
    ----------
    file : text file
        Where to print, as ``sys.stdout``.

    Returns
    -------
    int
        The number of checks that failed: 0 is a good installation.

    Examples
    --------
    >>> import io
    >>> from fastattn import _selftest
    >>> _selftest.run(io.StringIO())
    0
    """
    isas = _core.available_isas()
    columns = [(isa, dtype) for isa in isas for dtype in MAX_ERROR]
    width = max(map(len, CASES))
    allowed = ", ".join(f"{limit:g} in {dtype}" for dtype, limit in MAX_ERROR.items())
    print(f"errors in units of rounding (allowed: {allowed});", file=file)
    print(f"every call with {', '.join(map(str, THREADS))} threads, bit for bit\n", file=file)
    print(f"{'':{width}}" + "".join(f"{isa:>9}" for isa, _ in columns), file=file)
    print(f"{'':{width}}" + "".join(f"{dtype:>9}" for _, dtype in columns), file=file)

    passed, failures = 0, []
    for name, make_case in CASES.items():
        cells = []
        for isa, dtype in columns:
            outcome = check(make_case(np.random.default_rng(0), dtype), isa)
            cells.append("FAILED" if outcome.problems else f"{outcome.error:.2f}")
            failures += [f"{name}, {isa} {dtype}: {text}" for text in outcome.problems]
            passed += not outcome.problems
        print(f"{name:{width}}" + "".join(f"{cell:>9}" for cell in cells), file=file)

    failed = len(CASES) * len(columns) - passed
    print("", *failures, f"{passed} passed, {failed} failed", sep="\n", file=file)
    return failed
