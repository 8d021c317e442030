"""fastattn in processes that fork, start others, or end during a call."""

from pathlib import Path

import pytest
from process import marks, output_of, run

from fastattn import _core

pytestmark = marks


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
