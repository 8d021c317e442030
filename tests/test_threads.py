"""Threads of the caller, the GIL, and the team of threads."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from process import ROOT, marks, run
from support import compile_c

from fastattn import _core

pytestmark = marks


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
