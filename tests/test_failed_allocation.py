"""Memory that ends, in every allocation of a call, and memory that leaks."""

from pathlib import Path

import pytest
from process import ROOT, marks, run
from support import compile_c

pytestmark = marks


@pytest.mark.parametrize("megabytes", [1, 6, 12, 20, 40, 100])
def test_address_space_ends(megabytes: int, kernel_set: str) -> None:
    """RLIMIT_AS: the right result on fewer threads, or MemoryError."""
    script = """
import resource
x = make(512, num_heads=8)
digests = set()
size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]) * 2**20,) * 2)
for num_threads in (1, 2, 8, 2):
    try:
        digests.add(digest(fa.attention(*x, num_threads=num_threads)))
    except MemoryError:
        continue
assert len(digests) <= 1
print("ok")
"""
    assert run(script, kernel_set, str(megabytes), OPENBLAS_NUM_THREADS="1") == "ok"


@pytest.fixture
def shim(tmp_path: Path) -> str:
    return compile_c(
        ROOT / "c" / "failing_malloc.c", tmp_path / "failing_malloc.so", "-shared", "-fPIC"
    )


# What the scripts of failing allocations share: fail_each lets each allocation of so many bytes
# fail in turn, once and for good, and returns how many failed.
FAIL_EACH = """
import ctypes
shim = ctypes.CDLL(sys.argv[1])
shim.fail_arm.argtypes = [ctypes.c_long, ctypes.c_size_t, ctypes.c_int]
shim.fail_disarm.restype = ctypes.c_long

def fail_each(call, is_right, options, least_bytes, allocated):
    total = 0
    for forever in (0, 1):
        for nth in range(1, 1000):
            shim.fail_arm(nth, least_bytes, forever)
            try:
                result = call()
            except MemoryError:
                result = None
            failures = shim.fail_disarm()
            assert (result is None) == (failures > 0), (options, nth, failures)
            assert is_right()
            total += failures
            if not failures:
                break
        assert nth > allocated, "neither a result nor a workspace was allocated"
    return total
"""


def test_failed_allocation(kernel_set: str, shim: str) -> None:
    """The k-th allocation fails, k = 1, 2, ... until none does, once and for good: MemoryError each
    time, inputs untouched, and the next call is right."""
    script = """
q, k, v = make(300, num_heads=4)
bias = np.random.default_rng(1).standard_normal((300, 300))
inputs = digest(q, k, v, bias)
calls = [
    {"num_threads": 1}, {"num_threads": 2}, {"softmax_axis": "queries"},
    {"bias": bias, "softcap": 2.0, "causal": True, "return_lse": True},
]
total = 0
for options in calls:
    def call():
        return fa.attention(q, k, v, **options)
    def without_lse():
        return digest(*np.atleast_2d(fa.attention(q, k, v, **{**options, "return_lse": False})))
    expected = without_lse()
    total += fail_each(call, lambda: without_lse() == expected, options, 4096, 2)
assert digest(q, k, v, bias) == inputs
print("failures", total)
"""
    output = run(FAIL_EACH + script, kernel_set, shim, LD_PRELOAD=shim)
    assert int(output.removeprefix("failures ")) >= 16


def test_failed_allocation_of_gradients(kernel_set: str, shim: str) -> None:
    """Like the forward pass: each allocation in turn."""
    script = """
q, k, v = make(300, num_heads=4)
shared = [x[:, :1] for x in (k, v)]
bias = np.random.default_rng(1).standard_normal((300, 300))
calls = [
    ((q, k, v), {"num_threads": 1}), ((q, *shared), {"num_threads": 2}),
    ((q, k, v), {"softmax_axis": "queries"}),
    ((q, k, v), {"bias": bias, "softcap": 2.0, "sinks": np.zeros(4)}),
    ((q, k, v), {"dropout_p": 0.5, "dropout_seed": 1}),
]
total = 0
for qkv, options in calls:
    out, lse = fa.attention(*qkv, return_lse=True, **options)
    def gradients():
        return fa.attention_backward(out, *qkv, out, lse, **options)
    def digest_of(grads):
        return digest(*(x for x in grads if x is not None))
    expected = digest_of(gradients())
    total += fail_each(gradients, lambda: digest_of(gradients()) == expected, options, 4096, 4)
print("failures", total)
"""
    output = run(FAIL_EACH + script, kernel_set, shim, LD_PRELOAD=shim)
    assert int(output.removeprefix("failures ")) >= 32


def test_failed_allocation_of_weights(kernel_set: str, shim: str) -> None:
    """Like the forward pass: each allocation in turn."""
    script = """
q, k, _ = make(1200, num_heads=4)
large = q.copy()
large[0, 2, 7] = 1e38
calls = [
    (q, {"num_threads": 1, "rows": slice(0, 600)}), (q, {"num_threads": 2, "reduce": "keys"}),
    (q, {"softmax_axis": "queries", "pool": (8, 9)}), (large, {"pool": (1, 1200)}),
    (large, {"softmax_axis": "queries", "reduce": "keys"}),
]
total = 0
for q, options in calls:
    def weights():
        return fa.attention_weights(q, k, **options)
    expected = digest(weights())
    total += fail_each(weights, lambda: digest(weights()) == expected, options, 1024, 2)
print("failures", total)
"""
    output = run(FAIL_EACH + script, kernel_set, shim, LD_PRELOAD=shim)
    assert int(output.removeprefix("failures ")) >= 32


def test_no_leak(kernel_set: str) -> None:
    """Resident memory stays where it is over thousands of calls, failing ones included."""
    script = """
def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")

q, k, v = make(20, num_heads=2, head_dim=16)
mask = np.ones((20, 20), bool)
wrong = [
    (TypeError, dict(mask=np.ones((20, 20)))), (ValueError, dict(window=(-1, 0))),
    (ValueError, dict(bias=np.zeros((3, 3)))), (ValueError, dict(softcap=0.0)),
    (ValueError, dict(out=np.empty((1, 1), np.float32))), (TypeError, dict(scale="one")),
]
def many(n):
    for i in range(n):
        fa.attention(q, k, v, mask=mask, return_lse=True, num_threads=1 + i % 2)
        fa.attention(q, k, v, softmax_axis="queries", segment_ids=(np.arange(20), np.arange(20)))
        error, options = wrong[i % len(wrong)]
        try:
            fa.attention(q, k, v, **options)
        except error:
            continue
        raise AssertionError(f"{options} did not raise {error}")
many(300)
before = resident()
many(4000)
grown = resident() - before
assert grown < 2**20, grown
print("ok")
"""
    assert run(script, kernel_set) == "ok"
