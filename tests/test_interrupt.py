"""Ctrl-C and signal handlers during a call."""

import pytest
from process import marks, run

pytestmark = marks


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
sent = interrupt_in(0.3)
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
sent = interrupt_in(0.5)
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


def test_explain_stops_at_ctrl_c(kernel_set: str) -> None:
    script = """
n = 100_000
x = np.broadcast_to(np.zeros(64, np.float32), (1, 8, n, 64))
mask = np.broadcast_to(np.arange(n) % 2 == 0, (n, n))  # every other key: read tile by tile
sent = interrupt_in(0.3)
try:
    fa.explain(x, x, x, mask=mask)
except KeyboardInterrupt:
    print(time.monotonic() - sent[0])
"""
    assert float(run(script, kernel_set)) < 2.0
