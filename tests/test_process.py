"""fastattn as a guest of its process: fork, signals, the GIL, threads, memory that ends.

Every script runs in a fresh interpreter on one kernel set.  No test asserts a speed: calls that
must be under way for a while are sized by a measurement of their own.
"""

import sys
from pathlib import Path

import pytest
from process import output_of
from support import compile_c

ROOT = Path(__file__).parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# What the scripts share.
PRELUDE = """
import hashlib, os, signal, sys, threading, time
import numpy as np
import fastattn as fa

# A job in the background inherits SIGINT as ignored, and Python then leaves it so.
signal.signal(signal.SIGINT, signal.default_int_handler)

def make(seqlen, batch=1, num_heads=1, head_dim=64, dtype=np.float32):
    rng = np.random.default_rng(0)
    shape = (batch, num_heads, seqlen, head_dim)
    return [rng.standard_normal(shape).astype(dtype) for _ in range(3)]

def digest(*arrays):
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()

def seqlen_for(seconds, **options):
    # Length of a one-head call that takes about that long on one thread.
    q, k, v = make(1024)
    fa.attention(q, k, v, num_threads=1, **options)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        fa.attention(q, k, v, num_threads=1, **options)
        times.append(time.perf_counter() - start)
    return int(1024 * (seconds / min(times)) ** 0.5)

def busy_threads(call):
    # Result of call(), and how many threads of this process spent processor time in it.
    def ticks():
        spent = {}
        for task in os.listdir("/proc/self/task"):
            try:
                with open(f"/proc/self/task/{task}/stat") as stat:
                    fields = stat.read().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            spent[int(task)] = int(fields[11]) + int(fields[12])
        return spent

    before, latest, done = ticks(), {}, threading.Event()
    def watch():
        while not done.wait(0.02):
            latest.update(ticks())
        latest.pop(threading.get_native_id(), None)
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = call()
    latest.update(ticks())
    done.set()
    watcher.join()
    return result, sum(latest[task] - before.get(task, 0) >= 2 for task in latest)

def wait_for(pid):
    # Exit status of a child that must not hang.
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"
"""


def run(script: str, kernel_set: str, *args: str, **env: str) -> str:
    return output_of(
        "-X", "faulthandler", "-c", PRELUDE + script, *args, FASTATTN_ISA=kernel_set, **env
    )


def test_forked_child_computes_with_several_threads(kernel_set: str) -> None:
    """After the parent has: the same bits, and two threads at work where the build has threads."""
    script = """
q, k, v = make(seqlen_for(0.1), num_heads=6)
expected = digest(fa.attention(q, k, v, num_threads=2))
_, parent_threads = busy_threads(lambda: fa.attention(q, k, v, num_threads=2))
for generation in range(2):                       # a child, and a child's child
    pid = os.fork()
    if pid:
        status = wait_for(pid)
        assert status == 0, status
        if generation == 0:
            print("parent", parent_threads)
        os._exit(0) if generation else sys.exit()
    out, threads = busy_threads(lambda: fa.attention(q, k, v, num_threads=2))
    assert digest(out) == expected, "other bits"
    assert threads >= min(parent_threads, 2), f"{threads} threads in the child"
    assert digest(fa.attention(q, k, v)) == expected
os._exit(0)
"""
    output = run(script, kernel_set)
    from fastattn import _core

    if _core.has_openmp():
        assert output == "parent 2"


def test_fork_while_another_thread_is_inside_a_call(kernel_set: str) -> None:
    script = """
q, k, v = make(seqlen_for(1.0))
small = make(200, num_heads=4)
expected = digest(fa.attention(*small, num_threads=2))
whole = digest(fa.attention(q, k, v, num_threads=2))
inside = []
def work():
    inside.append(digest(fa.attention(q, k, v, num_threads=2)))
worker = threading.Thread(target=work)
worker.start()
time.sleep(0.1)
pid = os.fork()
if pid == 0:
    ok = digest(fa.attention(*small, num_threads=2)) == expected
    os._exit(0 if ok else 1)
assert wait_for(pid) == 0
worker.join()
assert inside == [whole]
print("ok")
"""
    assert run(script, kernel_set) == "ok"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, kernel_set: str, tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text("""
import hashlib, multiprocessing, sys
import numpy as np
import fastattn as fa

def work(seed):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((4, 150, 32)).astype(np.float32) for _ in range(3))
    return hashlib.sha256(fa.attention(q, k, v, num_threads=2).tobytes()).hexdigest()

if __name__ == "__main__":
    expected = [work(seed) for seed in range(6)]
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        assert pool.map_async(work, range(6)).get(60) == expected
    print("ok")
""")
    assert output_of(str(script), method, FASTATTN_ISA=kernel_set) == "ok"


@pytest.mark.parametrize("options", ["{}", "{'softmax_axis': 'queries'}", "{'num_threads': 1}"])
def test_ctrl_c_ends_a_long_call(options: str, kernel_set: str) -> None:
    """KeyboardInterrupt long before the call would have ended, and the next call is right."""
    script = (
        f"options = {options}"
        + """
small = make(300, num_heads=2)
expected = digest(fa.attention(*small))
estimate = 240
seqlen = seqlen_for(estimate)
rng = np.random.default_rng(0)
q, k, v = (np.broadcast_to(rng.standard_normal((1, 64)).astype(np.float32), (seqlen, 64))
           for _ in range(3))
sent = []
def interrupt():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.3, interrupt).start()
try:
    fa.attention(q, k, v, **options)
except KeyboardInterrupt:
    latency = time.monotonic() - sent[0]
    print(f"interrupted after {latency:.3f} s of an estimated {estimate} s")
else:
    raise AssertionError("the call ran to its end")
assert latency < estimate / 8, latency
assert digest(fa.attention(*small)) == expected
"""
    )
    print(run(script, kernel_set))


@pytest.mark.parametrize(
    "options", ["{}", "{'softmax_axis': 'queries'}", "{'bias': 0.0, 'needs': ['bias']}"]
)
def test_ctrl_c_ends_a_long_backward_call(options: str, kernel_set: str) -> None:
    script = (
        f"options = {options}"
        + """
def gradients(q, k, v, out, lse, **options):
    grads = fa.attention_backward(q, q, k, v, out, lse, **options)
    return digest(*(x for x in grads if x is not None))

small = make(300, num_heads=2)
made = fa.attention(*small, return_lse=True)
expected = gradients(*small, *made)
estimate = 240
seqlen = seqlen_for(estimate)
rng = np.random.default_rng(0)
q, k, v = (np.broadcast_to(rng.standard_normal((1, 64)).astype(np.float32), (seqlen, 64))
           for _ in range(3))
lse = np.zeros(seqlen, np.float32)
sent = []
def interrupt():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.5, interrupt).start()
try:
    gradients(q, k, v, q, lse, **options)
except KeyboardInterrupt:
    latency = time.monotonic() - sent[0]
else:
    raise AssertionError("the call ran to its end")
assert latency < estimate / 8, latency
assert gradients(*small, *made) == expected
print("interrupted")
"""
    )
    assert run(script, kernel_set) == "interrupted"


def test_gradients_in_a_forked_child(kernel_set: str) -> None:
    """After the parent has computed some, and while another thread of it does: the same bits."""
    script = """
small, large = make(200, num_heads=4), make(seqlen_for(0.3), num_heads=1)
def gradients(qkv):
    out, lse = fa.attention(*qkv, return_lse=True, num_threads=2)
    grads = fa.attention_backward(out, *qkv, out, lse, num_threads=2)
    return digest(grads.q, grads.k, grads.v)
expected, whole = gradients(small), gradients(large)
inside = []
worker = threading.Thread(target=lambda: inside.append(gradients(large)))
worker.start()
time.sleep(0.1)
pid = os.fork()
if pid == 0:
    os._exit(0 if gradients(small) == expected else 1)
assert wait_for(pid) == 0
worker.join()
assert inside == [whole]
print("ok")
"""
    assert run(script, kernel_set) == "ok"


def test_interrupt_handler_may_return(kernel_set: str) -> None:
    """A signal handler that does not raise leaves the call running, its result right."""
    script = """
seqlen = seqlen_for(0.5)
q, k, v = make(seqlen)
expected = digest(fa.attention(q, k, v))
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
out = fa.attention(q, k, v)
signal.setitimer(signal.ITIMER_REAL, 0)
assert digest(out) == expected
print("handled" if seen else "no signal came")
"""
    assert run(script, kernel_set) == "handled"


def test_call_from_another_thread_leaves_signals_to_the_main_one(kernel_set: str) -> None:
    script = """
q, k, v = make(seqlen_for(0.5))
expected = digest(fa.attention(q, k, v))
results = []
worker = threading.Thread(target=lambda: results.append(digest(fa.attention(q, k, v))))
try:
    worker.start()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    pass
worker.join()
assert results == [expected]
print("ok")
"""
    assert run(script, kernel_set) == "ok"


def test_gil_is_released(kernel_set: str) -> None:
    """Another thread goes on counting between the start and the end of one call."""
    script = """
q, k, v = make(seqlen_for(0.5))
moments, done = [], threading.Event()
def count():
    while not done.wait(0.001):
        moments.append(time.perf_counter())
counter = threading.Thread(target=count)
counter.start()
start = time.perf_counter()
fa.attention(q, k, v, num_threads=1)
end = time.perf_counter()
done.set()
counter.join()
margin = (end - start) / 10     # where the GIL may still, or again, be held
inside = sum(start + margin < moment < end - margin for moment in moments)
assert inside >= 10, inside
print("ok")
"""
    assert run(script, kernel_set) == "ok"


def test_concurrent_calls(kernel_set: str) -> None:
    """Eight Python threads, mixed shapes and options: the results of serial calls."""
    script = """
calls = []
rng = np.random.default_rng(0)
for i in range(40):
    q, k, v = make(int(rng.integers(1, 260)), num_heads=4, head_dim=int(rng.choice([8, 33, 64])),
                   dtype=[np.float32, np.float64][i % 2])
    options = [{}, {"causal": True}, {"softmax_axis": "queries"}, {"window": (9, 9)}][i % 4]
    calls.append(((q, k, v), {"num_threads": 1 + i % 3, **options}))
expected = [digest(fa.attention(*qkv, **options)) for qkv, options in calls]
wrong = []
def work(seed):
    for i in np.random.default_rng(seed).permutation(len(calls)):
        qkv, options = calls[i]
        if digest(fa.attention(*qkv, **options)) != expected[i]:
            wrong.append(int(i))
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong, wrong
print("ok")
"""
    assert run(script, kernel_set) == "ok"


def test_floating_point_environment_is_left_as_found(kernel_set: str) -> None:
    """Rounding mode and flush-to-zero stay; no NumPy warning or error comes from a call."""
    script = """
import ctypes, platform
libm = ctypes.CDLL("libm.so.6")
q, k, v = make(130, num_heads=4)
q[0, 0, 3] = np.nan
q[0, 0, 4] = np.inf
v[0, 0, 5] = 1e-42
tiny = np.array([1e-40, 1e-45], np.float32)

def control_bits():
    state = (ctypes.c_uint8 * 256)()
    assert libm.fegetenv(state) == 0
    if platform.machine() != "x86_64":
        return libm.fegetround()
    return int.from_bytes(bytes(state[28:32]), "little") & 0xFFC0     # MXCSR without its flags

for rounding in (libm.fegetround(), 0x800, 0x400):       # nearest, then upward and downward
    assert libm.fesetround(rounding) == 0
    before = control_bits()
    with np.errstate(all="raise"):
        for axis in ("keys", "queries"):
            fa.attention(q, k, v, causal=True, softcap=3.0, softmax_axis=axis, num_threads=2)
    after = control_bits()
    assert libm.fegetround() == rounding and after == before
libm.fesetround(0)
assert np.all(tiny * np.float32(1) == tiny) and np.all(tiny > 0)
halves = [np.zeros(1, np.float32)]
thread = threading.Thread(target=lambda: halves.append(tiny * np.float32(0.5)))
thread.start()
thread.join()
assert halves[1][0] > 0
print("ok")
"""
    assert run(script, kernel_set) == "ok"


def test_failed_allocation(kernel_set: str, tmp_path: Path) -> None:
    """The k-th allocation fails, k = 1, 2, ... until none does, once and for good: MemoryError each
    time, inputs untouched, and the next call is right."""
    shim = compile_c(
        ROOT / "c" / "failing_malloc.c", tmp_path / "failing_malloc.so", "-shared", "-fPIC"
    )
    script = """
import ctypes
shim = ctypes.CDLL(sys.argv[1])
shim.fail_arm.argtypes = [ctypes.c_long, ctypes.c_size_t, ctypes.c_int]
shim.fail_disarm.restype = ctypes.c_long
q, k, v = make(300, num_heads=4)
bias = np.random.default_rng(1).standard_normal((300, 300))
inputs = digest(q, k, v, bias)
calls = [
    {"num_threads": 1}, {"num_threads": 2}, {"softmax_axis": "queries"},
    {"bias": bias, "softcap": 2.0, "causal": True, "return_lse": True},
]
total = 0
for options in calls:
    expected = digest(*np.atleast_2d(fa.attention(q, k, v, **{**options, "return_lse": False})))
    for forever in (0, 1):
        for nth in range(1, 1000):
            shim.fail_arm(nth, 4096, forever)
            try:
                result = fa.attention(q, k, v, **options)
            except MemoryError:
                result = None
            failures = shim.fail_disarm()
            assert (result is None) == (failures > 0), (options, nth, failures)
            out = fa.attention(q, k, v, **{**options, "return_lse": False})
            assert digest(*np.atleast_2d(out)) == expected
            total += failures
            if not failures:
                break
        assert nth > 2, "neither the result nor a workspace was allocated"
assert digest(q, k, v, bias) == inputs
print("failures", total)
"""
    output = run(script, kernel_set, shim, LD_PRELOAD=shim)
    assert int(output.removeprefix("failures ")) >= 16


def test_failed_allocation_of_gradients(kernel_set: str, tmp_path: Path) -> None:
    """Like the forward pass: each allocation in turn."""
    shim = compile_c(
        ROOT / "c" / "failing_malloc.c", tmp_path / "failing_malloc.so", "-shared", "-fPIC"
    )
    script = """
import ctypes
shim = ctypes.CDLL(sys.argv[1])
shim.fail_arm.argtypes = [ctypes.c_long, ctypes.c_size_t, ctypes.c_int]
shim.fail_disarm.restype = ctypes.c_long
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
    for forever in (0, 1):
        for nth in range(1, 1000):
            shim.fail_arm(nth, 4096, forever)
            try:
                result = gradients()
            except MemoryError:
                result = None
            failures = shim.fail_disarm()
            assert (result is None) == (failures > 0), (options, nth, failures)
            assert digest_of(gradients()) == expected
            total += failures
            if not failures:
                break
        assert nth > 4, "neither a gradient nor a workspace was allocated"
print("failures", total)
"""
    output = run(script, kernel_set, shim, LD_PRELOAD=shim)
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
