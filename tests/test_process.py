"""fastattn as a guest of its process: fork, signals, the GIL, threads, memory that ends.

Every script runs in a fresh interpreter on one kernel set.  No test asserts a speed: calls that
must be under way for a while are sized by a measurement of their own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from process import output_of
from support import compile_c

from fastattn import _core

ROOT = Path(__file__).parent

pytestmark = [
    pytest.mark.slow_on_other_sets,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

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


def test_fork_in_a_signal_handler_during_a_call(kernel_set: str) -> None:
    """The child that returns from the handler ends its call, with the result or with an error that
    says why there is none, and makes further ones; the parent's call is not disturbed."""
    script = """
q, k, v = make(seqlen_for(1.0))
small = make(200, num_heads=4)
def gradients(out, lse):
    grads = fa.attention_backward(out, *small, out, lse, num_threads=2)
    return digest(grads.q, grads.k, grads.v)
made = fa.attention(*small, return_lse=True, num_threads=2)
expected = digest(*made), gradients(*made)
whole = {n: digest(fa.attention(q, k, v, num_threads=n)) for n in (1, 2)}
children = []
def handler(*_):
    children.append(os.fork())
signal.signal(signal.SIGALRM, handler)
for num_threads in (1, 2):
    children.clear()
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        ended = digest(fa.attention(q, k, v, num_threads=num_threads)) == whole[num_threads]
    except RuntimeError as error:
        ended = num_threads == 2 and "forked by a signal handler" in str(error) and 0 in children
    if 0 in children:
        again = fa.attention(*small, return_lse=True, num_threads=2)
        ok = ended and (digest(*again), gradients(*again)) == expected
        os._exit(0 if ok else 1)
    assert ended and len(children) == 1
    assert wait_for(children[0]) == 0
print("ok")
"""
    assert run(script, kernel_set) == "ok"


@pytest.mark.parametrize("seconds", [0.0, 0.5])
@pytest.mark.parametrize("threads", [1, 3])
def test_interpreter_exits_during_a_call(seconds: float, threads: int, kernel_set: str) -> None:
    """Daemon threads are inside calls of several threads when the interpreter is finalized; one
    that then asks for its lock ends, and helpers must have left its memory before."""
    script = """
class Slow:
    def __del__(self, sleep=time.sleep, sys_argv=tuple(sys.argv)):
        sleep(float(sys_argv[1]))

slow = Slow()
q, k, v = make(seqlen_for(2.0), num_heads=2)
def work():
    while True:
        fa.attention(q, k, v, num_threads=2)
for _ in range(int(sys.argv[2])):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
print("ok")
"""
    assert run(script, kernel_set, str(seconds), str(threads)) == "ok"


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


@pytest.mark.parametrize(
    "options", ["{'pool': (8, 8)}", "{'reduce': 'keys', 'softmax_axis': 'queries'}"]
)
def test_ctrl_c_ends_a_long_call_of_weights(options: str, kernel_set: str) -> None:
    script = """
options = eval(sys.argv[1])
n = 400_000
x = np.broadcast_to(np.ones(64, np.float32), (1, 8, n, 64))
few = make(300)[0]
expected = digest(fa.attention_weights(few, few, **options))
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    fa.attention_weights(x, x, **options)  # for an hour
except KeyboardInterrupt:
    print("interrupted")
assert digest(fa.attention_weights(few, few, **options)) == expected
"""
    assert run(script, kernel_set, options) == "interrupted"


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


def test_floating_point_mode_of_the_thread(kernel_set: str, tmp_path: Path) -> None:
    """The same bits in every rounding mode, with subnormal numbers flushed or not, on the caller
    and on helpers; the mode and the exception flags are left as found."""
    shim = compile_c(
        ROOT / "c" / "float_control.c", tmp_path / "float_control.so", "-shared", "-fPIC"
    )
    script = """
import ctypes
import ml_dtypes
mode = ctypes.CDLL(sys.argv[1])
mode.get_control.restype = ctypes.c_uint64
caches = {}

def results(q, k, v, num_threads):
    made = []
    for options in (
        {"causal": True, "softcap": 3.0, "bias": np.float64(0.3)},
        {"softmax_axis": "queries", "scale": 0.3},
        {"dropout_p": 0.25, "dropout_seed": 1, "sinks": np.full(4, 0.1)},
        {"alibi_slopes": np.full(4, 0.1), "window": (70, 3)},
    ):
        out, lse = fa.attention(q, k, v, return_lse=True, num_threads=num_threads, **options)
        grads = fa.attention_backward(q, q, k, v, out, lse, num_threads=num_threads, **options)
        made += [out, lse, grads.q, grads.k, grads.v]
    few = fa.attention(q[..., :1, :], k, v, num_threads=num_threads)
    part, part_lse = fa.attention(q, k[..., :90, :], v[..., :90, :], return_lse=True)
    rest, rest_lse = fa.attention(q, k[..., 90:, :], v[..., 90:, :], return_lse=True)
    merged = fa.merge_attention([part, rest], [part_lse, rest_lse])
    return digest(*made, few, *merged)

problems = []
for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
    q, k, v = make(160, num_heads=4, head_dim=48, dtype=np.float32)
    # Products and sums that are subnormal numbers, or lose one.
    v[..., ::3] *= np.finfo(np.float32).tiny if dtype is np.float32 else np.float32(1e-5)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    problems.append((q, k, v))
expected = [results(*problem, 1) for problem in problems]

large = problems[0][2] * np.float32(2.0**120)

def stored():
    cache = fa.KVCache(1, 4, 300, 48, dtype="int8")
    cache.append(problems[0][1], large)
    return digest(cache.attention(problems[0][0][:, :, -1:]))

expected.append(stored())
wrong = []
for rounding in range(4):
    for flush in range(2):
        for num_threads in (1, 2):
            mode.set_mode(rounding, flush)
            mode.set_flags(mode.divbyzero())
            before = mode.get_control()
            got = [results(*problem, num_threads) for problem in problems] + [stored()]
            after = mode.get_control()
            flags = mode.get_flags()
            mode.set_mode(0, 0)
            if got != expected or before & 0xFFC0 != after & 0xFFC0:
                same = [a == b for a, b in zip(got, expected)]
                wrong.append((rounding, flush, num_threads, same))

# What C itself raises and leaves: nothing.
from fastattn import _core
from fastattn._options import set_named
from fastattn._problem import of_arrays
from fastattn._results import place_results
for flags in (0, mode.divbyzero()):
    problem = of_arrays(*problems[0])
    set_named(problem, {"num_threads": 2})
    place_results(problem, None, False)
    mode.set_flags(flags)
    _core.attention(problem)
    assert mode.get_flags() == flags
assert not wrong, wrong
print("ok")
"""
    assert run(script, kernel_set, shim) == "ok"


# ---- the team ------------------------------------------------------------------------------------

needs_openmp = pytest.mark.skipif(not _core.has_openmp(), reason="built without OpenMP")


@needs_openmp
def test_threads_of_the_process(kernel_set: str) -> None:
    """None at import; then those that a call may use, one of which sleeps, whoever calls."""
    script = """
def count():
    return len(os.listdir("/proc/self/task"))
before = count()
q, k, v = make(300, num_heads=4)
expected = digest(fa.attention(q, k, v, num_threads=1))
assert count() == before
for num_threads in (2, 4, 3):
    assert digest(fa.attention(q, k, v, num_threads=num_threads)) == expected
    time.sleep(0.05)
    # The caller's place is the sleeper's.
    assert count() - before <= {2: 2, 4: 4, 3: 4}[num_threads], count()
most, wrong = [], []
def work():
    for _ in range(20):
        if digest(fa.attention(q, k, v, num_threads=4)) != expected:
            wrong.append(1)
        most.append(count())
threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong
assert max(most) <= before + 4 + 16, max(most)
print("ok")
"""
    assert run(script, kernel_set) == "ok"


@needs_openmp
def test_idle_team_leaves_the_cores(kernel_set: str) -> None:
    """Processor time of 50 ms after a call is the short look for the next one, not milliseconds."""
    script = """
q, k, v = make(400, num_heads=4)
spent = []
for _ in range(9):
    fa.attention(q, k, v, num_threads=4)
    start = time.process_time()
    time.sleep(0.05)
    spent.append(time.process_time() - start)
print(sorted(spent)[4])
"""
    assert float(run(script, kernel_set)) < 1.5e-3


@needs_openmp
@pytest.mark.parametrize("policy", ["PASSIVE", "ACTIVE"])
def test_openmp_variables_hold(policy: str, kernel_set: str) -> None:
    """OMP_THREAD_LIMIT makes the team smaller; binding and waiting as OpenMP is told to, too."""
    script = """
before = len(os.listdir("/proc/self/task"))
q, k, v = make(400, num_heads=8)
expected = digest(fa.attention(q, k, v, num_threads=1))
for num_threads in (2, 8):
    for _ in range(5):
        assert digest(fa.attention(q, k, v, num_threads=num_threads)) == expected
        time.sleep(0.01)
print(len(os.listdir("/proc/self/task")) - before)
"""
    limits = {"OMP_WAIT_POLICY": policy, "OMP_PROC_BIND": "true", "OMP_STACKSIZE": "1 m"}
    for limit, threads in (("1", 0), ("3", 3)):
        assert run(script, kernel_set, OMP_THREAD_LIMIT=limit, **limits) == str(threads)


def test_absurd_number_of_threads(kernel_set: str) -> None:
    """Fewer threads, no more workspaces than threads, the same bits."""
    script = """
x = np.broadcast_to(np.zeros((1, 1, 1, 64), np.float32), (1, 8192, 64, 64))
limit = fa._core.team_limit()
plan = fa.explain(x, x, x, num_threads=10**6)
assert plan.num_threads <= limit
assert limit == 1 or f"a call has no more than {limit}" in str(plan)
q, k, v = make(300, num_heads=64)
expected = digest(fa.attention(q, k, v, num_threads=1))
for num_threads in (100_000, 10**6, 10**30):
    assert digest(fa.attention(q, k, v, num_threads=num_threads)) == expected
assert not fa.attention(x, x, x, num_threads=100_000).any()
assert len(os.listdir("/proc/self/task")) <= limit + 2
print("ok")
"""
    assert run(script, kernel_set) == "ok"


def test_threads_that_cannot_be_had(kernel_set: str, tmp_path: Path) -> None:
    """Every number of threads less than was asked for: the right result on fewer, also when a call
    asks for more than the team has, and when threads can be had again."""
    shim = compile_c(
        ROOT / "c" / "few_threads.c", tmp_path / "few_threads.so", "-shared", "-fPIC", "-ldl"
    )
    script = """
import ctypes
threads = ctypes.CDLL(sys.argv[1])
q, k, v = make(300, num_heads=8)
expected = digest(fa.attention(q, k, v, num_threads=1))
threads.few_threads_limit(int(sys.argv[2]))
for num_threads in (2, 8):
    for _ in range(3):
        assert digest(fa.attention(q, k, v, num_threads=num_threads)) == expected
        time.sleep(0.02)
threads.few_threads_limit(20)
time.sleep(1.1)
for _ in range(2):
    assert digest(fa.attention(q, k, v, num_threads=8)) == expected
    time.sleep(0.1)
print(len(os.listdir("/proc/self/task")))
"""
    for most in range(6):
        output = run(script, kernel_set, shim, str(most), LD_PRELOAD=shim)
        assert int(output) >= 9 or not _core.has_openmp()


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


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs another user")
def test_number_of_processes_ends(kernel_set: str) -> None:
    """RLIMIT_NPROC, which does not hold for root: the right result on what there is."""
    script = """
import resource
q, k, v = make(300, num_heads=8)
expected = digest(fa.attention(q, k, v, num_threads=1))
os.setresuid(12345, 12345, 12345)
resource.setrlimit(resource.RLIMIT_NPROC, (int(sys.argv[1]),) * 2)
for num_threads in (2, 8, 8):
    assert digest(fa.attention(q, k, v, num_threads=num_threads)) == expected
    time.sleep(0.02)
threads = len(os.listdir("/proc/self/task"))
assert threads <= int(sys.argv[1]), threads
print("ok")
"""
    for most in ("1", "2", "5"):
        assert run(script, kernel_set, most, OPENBLAS_NUM_THREADS="1") == "ok"


def test_explain_stops_at_ctrl_c(kernel_set: str) -> None:
    script = """
n = 100_000
x = np.broadcast_to(np.zeros(64, np.float32), (1, 8, n, 64))
mask = np.broadcast_to(np.zeros(1, bool), (n, n))
sent = []
def interrupt():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.3, interrupt).start()
try:
    fa.explain(x, x, x, mask=mask)
except KeyboardInterrupt:
    print(time.monotonic() - sent[0])
"""
    assert float(run(script, kernel_set)) < 2.0


@needs_openmp
@pytest.mark.any_kernel_set
def test_team_under_load(tmp_path: Path) -> None:
    """Callers of many kinds at once and forks, in C."""
    program = compile_team_stress(tmp_path / "stress")
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@needs_openmp
@pytest.mark.any_kernel_set
@pytest.mark.skipif(shutil.which("clang") is None, reason="GCC's OpenMP hides its barriers")
def test_team_has_no_data_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ThreadSanitizer, which knows LLVM's OpenMP; without forks, which it does not follow."""
    monkeypatch.setenv("CC", "clang")
    try:
        program = compile_team_stress(tmp_path / "stress", "-g", "-fsanitize=thread")
    except subprocess.CalledProcessError:
        pytest.skip("no ThreadSanitizer or no OpenMP runtime for clang")
    done = subprocess.run(
        [program, "no-forks"],
        env={**os.environ, "TSAN_OPTIONS": "ignore_noninstrumented_modules=1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def compile_team_stress(target: Path, *flags: str) -> str:
    csrc = ROOT.parent / "csrc"
    parts = [str(csrc / f"{part}.c") for part in ("team", "schedule", "float_mode")]
    return compile_c(
        ROOT / "c" / "team_stress.c", target, *flags, "-std=c11", "-fopenmp", f"-I{csrc}", *parts
    )


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


def test_failed_allocation_of_weights(kernel_set: str, tmp_path: Path) -> None:
    """Like the forward pass: each allocation in turn."""
    shim = compile_c(
        ROOT / "c" / "failing_malloc.c", tmp_path / "failing_malloc.so", "-shared", "-fPIC"
    )
    script = """
import ctypes
shim = ctypes.CDLL(sys.argv[1])
shim.fail_arm.argtypes = [ctypes.c_long, ctypes.c_size_t, ctypes.c_int]
shim.fail_disarm.restype = ctypes.c_long
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
    expected = digest(fa.attention_weights(q, k, **options))
    for forever in (0, 1):
        for nth in range(1, 1000):
            shim.fail_arm(nth, 1024, forever)
            try:
                result = fa.attention_weights(q, k, **options)
            except MemoryError:
                result = None
            failures = shim.fail_disarm()
            assert (result is None) == (failures > 0), (options, nth, failures)
            assert digest(fa.attention_weights(q, k, **options)) == expected
            total += failures
            if not failures:
                break
        assert nth > 2, "neither the result nor a workspace was allocated"
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
