"""Memory beside inputs and outputs stays small for every option, and sizes past 2^31 are right."""

import mmap
import sys
from typing import Any

import numpy as np
import pytest
from process import output_of

import fastattn as fa

LIMIT_MIB = 40

# Name -> (keyword arguments as source, head_dim_v) of a call on (1, 1, 8192, 64).  One matrix of
# scores would be 256 MiB.
CALLS = {
    "softcap, sinks and window": ("softcap=30.0, sinks=np.zeros(1), window=(1000, 1000)", 64),
    "causal": ("causal=True", 64),
    "mask of one row": ("mask=np.arange(seqlen) % 3 > 0", 64),
    "mask of one column": ("mask=np.arange(seqlen)[:, None] % 3 > 0", 64),
    "bias of one row": ("bias=np.linspace(0, 1, seqlen)", 64),
    "bias of one column": ("bias=np.linspace(0, 1, seqlen, dtype=np.float32)[:, None]", 64),
    "alibi, segments, lengths": (
        "alibi_slopes=np.ones(1), segment_ids=(np.arange(seqlen) // 3000,) * 2,"
        " kv_lengths=seqlen - 9",
        64,
    ),
    "softmax over queries": ("softmax_axis='queries', window=(1000, 1000)", 64),
    "residual": ("residual=v", 64),
    "wide values": ("window=(1000, 1000)", 300),
    "narrow values": ("window=(1000, 1000)", 3),
}

SCRIPT = """
import sys
import numpy as np
import fastattn as fa

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

seqlen, head_dim_v = 8192, int(sys.argv[1])
rng = np.random.default_rng(0)
q, k = (rng.standard_normal((1, 1, seqlen, 64), dtype=np.float32) for _ in range(2))
v = rng.standard_normal((1, 1, seqlen, head_dim_v), dtype=np.float32)
options = dict({options})
out = np.ones((1, 1, seqlen, head_dim_v), np.float32)
before = status("VmRSS")
fa.attention(q, k, v, out=out, num_threads=2, **options)
print(status("VmHWM") - before)
"""


@pytest.mark.slow_on_other_sets
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", CALLS)
def test_peak_memory(name: str, kernel_set: str) -> None:
    options, head_dim_v = CALLS[name]
    script = SCRIPT.replace("{options}", options)
    added = int(output_of("-c", script, str(head_dim_v), FASTATTN_ISA=kernel_set))
    assert added < LIMIT_MIB * 2**20, f"{added / 2**20:.1f} MiB"


# Name -> (options as source, of SCRIPT's kind; num_heads; head_dim_v) of gradients at seqlen 8192.
GRADIENTS = {
    "plain": ("", 8, 64),
    "causal": ("causal=True", 8, 64),
    "dropout": ("dropout_p=0.1, dropout_seed=1", 2, 64),
    "other values": ("", 2, 80),
    "bias of one row": ("bias=np.zeros((1, seqlen), np.float32)", 2, 64),
    "softcap": ("softcap=20.0", 2, 64),
    "softmax over queries": ("softmax_axis='queries', window=(1000, 1000)", 2, 64),
}

# The calls of 8 heads take as long as the others together.
GRADIENT_PARAMS = [
    pytest.param(name, marks=[pytest.mark.slow] if num_heads == 8 else [])
    for name, (_, num_heads, _) in GRADIENTS.items()
]

GRADIENTS_SCRIPT = """
import sys
import numpy as np
import fastattn as fa

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

seqlen, num_heads, head_dim_v = 8192, int(sys.argv[1]), int(sys.argv[2])
shape = (1, num_heads, seqlen)
q = np.ones((*shape, 64), np.float32)
k, v = np.ones((*shape, 64), np.float32), np.ones((*shape, head_dim_v), np.float32)
options = dict(num_threads=2, {options})
out, lse = fa.attention(q, k, v, return_lse=True, **options)
grad_out = np.ones_like(out)
before = status("VmRSS")
grads = fa.attention_backward(grad_out, q, k, v, out, lse, **options)
made = sum(x.nbytes for x in grads if x is not None)
print(status("VmHWM") - before - made)
"""


@pytest.mark.slow_on_other_sets
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", GRADIENT_PARAMS)
def test_peak_memory_of_gradients(name: str, kernel_set: str) -> None:
    """Three sums of grad_q for num_threads + 1 heads, and what the forward pass may have."""
    if kernel_set == "scalar" and name in ("plain", "causal"):
        pytest.skip("the same memory as other sets, and minutes of time")
    options, num_heads, head_dim_v = GRADIENTS[name]
    script = GRADIENTS_SCRIPT.replace("{options}", options)
    output = output_of("-c", script, str(num_heads), str(head_dim_v), FASTATTN_ISA=kernel_set)
    sums = 3 * min(num_heads, 3) * 8192 * 64 * 4
    added = int(output) - sums
    assert added < LIMIT_MIB * 2**20, f"{added / 2**20:.1f} MiB beside the sums"


# Name -> arguments as source of attention_weights at (1, 4, 8192, 64), whose weights are 1 GiB.
WEIGHTS = {
    "pool": "pool=(64, 64)",
    "causal pool over queries": "pool=(64, 64), causal=True, softmax_axis='queries'",
    "large pool": "pool=(1024, 1024), window=(1000, 1000)",
    "one block for each query": "pool=(8192, 3), window=(1000, 1000)",
    "sums": "reduce='keys', window=(1000, 1000)",
    "sums of chosen queries": "rows=slice(None, None, 5), reduce='keys'",
    "a few queries": "rows=[5, -1], heads=[2]",
    "rows that leave the range": "pool=(64, 64), scale=1e38, window=(100, 100)",
}

WEIGHTS_SCRIPT = """
import numpy as np
import fastattn as fa

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

q, k = np.random.default_rng(0).standard_normal((2, 1, 4, 8192, 64), dtype=np.float32)
fa.attention_weights(q[..., :9, :], k[..., :9, :])
before = status("VmRSS")
weights = fa.attention_weights(q, k, num_threads=2, {options})
print(max(status("VmHWM") - before - weights.nbytes, 0))
"""


@pytest.mark.slow_on_other_sets
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", WEIGHTS)
def test_peak_memory_of_weights(name: str, kernel_set: str) -> None:
    """16 numbers of float64 for each key and head, where sums are shared by tasks."""
    if kernel_set == "scalar" and "window" not in WEIGHTS[name]:
        pytest.skip("the same memory as other sets, and minutes of time")
    script = WEIGHTS_SCRIPT.replace("{options}", WEIGHTS[name])
    added = int(output_of("-c", script, FASTATTN_ISA=kernel_set))
    assert added < LIMIT_MIB * 2**20, f"{added / 2**20:.1f} MiB"


# A little more than 2^32 scores, and rows past 2^16.
HUGE = 65_600


def reserved(dtype: Any, *shape: int) -> np.ndarray:
    """Zeros of which only the touched pages take memory."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, nbytes, flags=flags)
    except OSError as error:
        pytest.skip(f"cannot reserve {nbytes >> 30} GiB of addresses: {error}")
    # Huge pages would fill the memory from few touches.
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def small_qkv(seqlen_q: int, seqlen_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((n, 4)).astype(np.float32) for n in (seqlen_q, seqlen_k, seqlen_k)
    )
    return q, k, v


def test_more_than_2_to_the_32_scores() -> None:
    """A broadcast mask and bias over all of them change nothing when they say nothing."""
    q, k, v = small_qkv(HUGE, HUGE)
    plain = fa.attention(q, k, v, window=(2, 3))
    mask = np.broadcast_to(np.True_, (HUGE, HUGE))
    bias = np.broadcast_to(np.float32(0), (HUGE, HUGE))
    assert np.array_equal(fa.attention(q, k, v, window=(2, 3), mask=mask, bias=bias), plain)
    for i in (0, 46_341, 65_536, HUGE - 1):
        row = fa.attention(q[i : i + 1], k, v, window=(2, 3), q_offset=i)
        assert np.array_equal(row, plain[i : i + 1])


@pytest.mark.parametrize("dtype", [np.bool_, np.float32], ids=["mask", "bias"])
def test_mask_and_bias_past_4_gib(dtype: Any) -> None:
    """Elements of a full (65600, 65600) mask or bias far beyond 2^32 bytes are found."""
    q, k, v = small_qkv(HUGE, HUGE)
    name = "mask" if dtype is np.bool_ else "bias"
    scores = reserved(dtype, HUGE, HUGE)
    rows = np.array([3, 32_767, 46_341, 65_535, 65_536, HUGE - 1])
    kept = rows - 1
    scores[rows, kept] = 1 if dtype is np.bool_ else 200
    for i, j in zip(rows, kept, strict=True):
        # A window that leaves out all but a few keys keeps the call short.
        row = {name: scores[i : i + 1]}
        out = fa.attention(q[i : i + 1], k, v, window=(2, 0), q_offset=int(i), **row)
        assert np.array_equal(out, v[j : j + 1])
    # The same from the middle of one call over all rows: 2^32 scores, few of them computed.
    out = fa.attention(q, k, v, window=(2, 0), q_offset=0, **{name: scores})
    assert np.array_equal(out[rows], v[kept])


def test_keys_and_values_past_4_gib() -> None:
    """Rows 65600 bytes apart over 70000 keys are read where they lie."""
    seqlen_q, seqlen_k = 3, 70_000
    q, k, v = small_qkv(seqlen_q, seqlen_k)
    wide = reserved(np.uint8, seqlen_k, HUGE)
    far = []
    for x, column in ((k, 0), (v, 1024)):
        view = wide[:, column : column + 16].view(np.float32)
        view[...] = x
        far.append(view)
    mask = np.broadcast_to(np.arange(seqlen_k) % 7 != 3, (seqlen_q, seqlen_k))
    near = fa.attention(q, k, v, mask=mask)
    assert np.array_equal(fa.attention(q, *far, mask=mask), near)
    expected = fa.reference.attention(q, k, v, mask=mask)
    np.testing.assert_allclose(near, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_strides_of_8_gib(sign: int) -> None:
    """Rows 2^33 bytes apart, forward and backward, in every operand."""
    memory = reserved(np.uint8, 4, 2**33)
    q, k, v = small_qkv(4, 4)
    far = []
    for x, column in ((q, 0), (k, 64), (v, 128)):
        view = memory[::sign, column : column + 16].view(np.float32)
        view[...] = x
        far.append(view)
    out = memory[::sign, 192:208].view(np.float32)
    mask = memory[::sign, 256:260].view(np.bool_)
    mask[...] = np.tri(4, dtype=bool)
    fa.attention(*far, mask=mask, out=out)
    assert np.array_equal(out, fa.attention(q, k, v, mask=np.tri(4, dtype=bool)))


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_sizes_beyond_any_memory(axis: str) -> None:
    """Zero strides may claim 2^55 rows: an error where the result or the work space would have that
    many, the right answer where a window leaves few keys of them."""
    one = np.ones((1, 8), np.float32)
    huge = np.lib.stride_tricks.as_strided(one, (2**55, 8), (0, 4))
    small = np.ones((3, 8), np.float32)
    with pytest.raises(MemoryError):
        fa.attention(huge, small, small, softmax_axis=axis)
    if axis == "queries":
        with pytest.raises(MemoryError):
            fa.attention(small, huge, huge, softmax_axis=axis)
    else:
        out = fa.attention(small, huge, huge, window=(5, 5), q_offset=2**54)
        assert np.array_equal(out, small)
