"""Who computes, which of them are installed, and with how many threads they run."""

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

from fastattn._bench import models, ours, peers, plain
from fastattn._bench.forms import Call
from fastattn._bench.workloads import Workload


class Contender(NamedTuple):
    """A way to compute attention, or what attention is a part of."""

    module: str  # that must be importable, along with those in `needs`
    make: Callable[[Workload, int], Call]
    needs: tuple[str, ...] = ()
    holds_scores: bool = False  # memory for whole score matrices
    repeats_heads: bool = False  # memory for a key head for each query head
    does: tuple[str, ...] = ("attention",)  # of which other workloads it is no contender


CONTENDERS = {
    "fastattn": Contender("fastattn", ours.make, does=("attention", "program", "model")),
    "numpy": Contender("numpy", plain.numpy, holds_scores=True),
    "blas": Contender("numpy", plain.blas, holds_scores=True),
    "torch": Contender(
        "torch", peers.torch, repeats_heads=True, does=("attention", "program", "model")
    ),
    "eager": Contender(
        "transformers", models.eager, ("torch",), holds_scores=True, does=("model",)
    ),
    "onnxruntime": Contender("onnxruntime", peers.onnxruntime, ("onnx",)),
    "openvino": Contender("openvino", peers.openvino, repeats_heads=True),
    "jax": Contender("jax", peers.jax, holds_scores=True),
}


def installed() -> dict[str, str]:
    """Names and versions of the contenders that can run here.

    Returns
    -------
    dict
        Name to version, in the order in which they are shown.

    Examples
    --------
    >>> from fastattn._bench.contenders import installed
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
    >>> from fastattn._bench.contenders import environment
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
