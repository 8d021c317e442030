"""``python -m fastattn bench``: what is computed, by whom, and that results are checked."""

import itertools

import numpy as np
import pytest
from process import output_of

import fastattn as fa
from fastattn import reference
from fastattn._bench import contenders, forms, models, ours, plain, program, workloads
from fastattn._bench.check import TOLERANCES, check
from fastattn._bench.grid import (
    DECODE_DTYPES,
    DECODE_GROWTH,
    GRID,
    GROWTH,
    KINDS,
    QUICK,
    SCALING,
    chosen,
)
from fastattn._bench.workloads import OPTIONS, decode, prefill

pytestmark = pytest.mark.any_kernel_set

# Long enough for the window to leave keys out.
SMALL = prefill("small", 1, 4, 320, 16)
LENGTHS = (3, 40, 100, 7)
PACKED = prefill("packed", 4, 4, 100, 16, num_kv_heads=2, lengths=LENGTHS)
DECODE = decode("decode", 2, 4, 2, 300)
RAGGED = decode("ragged", 4, 4, 2, 100, lengths=LENGTHS, cache="KVCache")
BOTH = prefill("both", 2, 4, 96, 16, num_kv_heads=2, gradients=True)
LAYER = prefill("layer", 2, 4, 96, 16, layer=True)
PROGRAM = prefill("program", 2, 4, 96, 16, kind="program", product_of="numpy")
MODEL = prefill("model", 2, 4, 24, 16, kind="models", model="BERT-base", num_layers=2)

# Every form of a call.
FORMS = {
    "prefill": SMALL,
    "packed": PACKED,
    "packed causal": PACKED._replace(causal=True),
    "decode": DECODE,
    "cache": RAGGED,
    "pages": RAGGED._replace(cache="PagedKVCache"),
    "backward": BOTH,
    "backward causal": BOTH._replace(causal=True),
}


def need_dtype(dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")


# --- the grid ---------------------------------------------------------------------------------


def test_workloads_are_told_apart():
    names = [workload.name for workload in GRID]
    assert len(set(names)) == len(names)
    # The same calls are also made on one thread.
    labels = [workload.label for workload in GRID if workload not in SCALING]
    assert len(set(labels)) == len(labels)
    assert set(QUICK) <= set(names)
    assert {workload.option for workload in GRID} == set(OPTIONS)


def test_labels():
    assert SMALL._replace(causal=True).label == "(1,4,320,16) causal"
    assert BOTH._replace(dtype="bfloat16").label == "(2,4/2,96,16) bf16 forward+backward"
    assert LAYER.label == "(2,4,96,16) MultiHeadAttention"
    assert PROGRAM.label == "(2,4,96,16) and a product of numpy"
    assert MODEL.label == "(2,4,24,16) 2 layers of BERT-base"
    assert PACKED.label == "(4,4/2,3..100,16)"
    paged = RAGGED._replace(cache="PagedKVCache", cache_dtype="int8")
    assert paged.label == "(4,4/2,1x3..100,128) int8 PagedKVCache"


def test_the_grid_has_what_was_asked_for():
    kinds = "prefill options decode varlen backward layer program models scaling growth"
    assert kinds.split() == list(KINDS)
    decoded = {
        (w.batch, w.num_heads, w.num_kv_heads, w.seqlen_k, w.cache_dtype or w.dtype)
        for w in chosen("decode")
    }
    assert {
        (1, 32, 8, 8192, "float32"), (1, 32, 32, 4096, "float32"), (1, 32, 32, 8192, "bfloat16"),
        (1, 32, 32, 8192, "float16"), (1, 32, 32, 8192, "int8"),
    } <= decoded  # fmt: skip
    assert {w.group_size for w in chosen("decode")} == {1, 4, 8}
    assert {w.batch for w in chosen("decode")} == {1, 8}
    assert {w.seqlen_k for w in chosen("decode")} == {1024, 4096, 8192, 65536}
    dtypes = {"float32", "float16", "bfloat16"}
    for causal in (False, True):
        both = {w.dtype for w in chosen("backward") if w.seqlen_q == 2048 and w.causal == causal}
        assert both == dtypes
        for seqlen in (2048, 4096):
            forward = [w for w in chosen("prefill") if (w.seqlen_q, w.causal) == (seqlen, causal)]
            assert {w.dtype for w in forward} >= dtypes
    shapes = {w.shape for w in chosen("prefill")}
    assert {"(32,12,32,32)", "(32,2,64,16)", "(8,12,197,64)", "(512,4,49,32)"} <= shapes
    turns = {(w.shape, w.product_of) for w in chosen("program")}
    turning = ("(32,12,32,32)", "(8,12,128,64)", "(1,12,2048,64)")
    assert turns == set(itertools.product(turning, ("numpy", "torch")))
    assert {w.model for w in chosen("models")} == set(models.MODELS)
    for name in ("bert-base", "minilm-l6"):
        batches = {(w.batch, w.seqlen_k) for w in chosen(name) if not w.lengths}
        assert batches == set(itertools.product((1, 8, 32), (16, 128, 512)))
    [padded] = (w for w in chosen("models") if w.lengths)
    assert 2 * sum(padded.lengths) == padded.batch * padded.seqlen_k
    for w in chosen("models"):
        whole = models.MODELS[w.model].num_layers
        assert (w.num_layers == whole) != w.name.endswith(f"-{w.num_layers}-layers")
    assert {w.cache for w in chosen("varlen")} == {"", "KVCache", "PagedKVCache"}
    assert [w.baseline.num_threads for w in chosen("scaling")] == [1] * len(SCALING)


def test_a_kind_or_a_part_of_names_is_chosen():
    assert {w.kind for w in chosen("decode")} == {"decode"}
    assert {w.kind for w in chosen("varlen")} == {"varlen"}
    assert [w.name for w in chosen("prefill-512")] == ["prefill-512", "prefill-512-causal"]
    assert chosen("absent") == []


def test_baselines():
    for shorter, longer in itertools.pairwise(GROWTH):
        assert longer.baseline.label == shorter.label
        assert longer.flops == 4 * longer.baseline.flops
    for workload in GRID:
        if workload.option:
            assert workload.baseline.label == workload.shape
        if workload.kind in ("decode", "prefill") and workload.baseline:
            assert workload.baseline.dtype == "float32"
            assert workload.baseline.flops == workload.flops
    assert [w.dtype for w in DECODE_DTYPES] == ["float32", "float16", "bfloat16", "float32"]
    assert [w.seqlen_k for w in DECODE_GROWTH] == sorted(w.seqlen_k for w in DECODE_GROWTH)


def test_useful_operations():
    full = prefill("", 2, 4, 512, 16)
    assert full.flops == 4 * 2 * 4 * 512 * 512 * 16
    assert full.output_bytes == contenders.CONTENDERS["fastattn"].make(full, 1).run().nbytes
    assert full._replace(causal=True).flops == full.flops / 2
    assert full._replace(gradients=True).flops == 3.5 * full.flops
    # Four projections of 64 features to 64, two of them to half as many with grouped heads.
    layer = full._replace(layer=True)
    assert layer.flops == full.flops + 2 * (2 * 512) * 4 * 64**2
    assert layer._replace(num_kv_heads=2).flops == full.flops + 2 * (2 * 512) * 3 * 64**2
    for option in ("window", "segments"):
        workload = full._replace(option=option)
        keep = forms.takes_part(workload)
        assert workload.flops == pytest.approx(full.flops * keep.mean())
    assert PACKED.num_scores == 4 * (3**2 + 40**2 + 100**2 + 7**2)
    assert RAGGED.flops == 4 * 4 * 150 * 128


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_bytes_read(dtype):
    need_dtype(dtype)
    storage = {"cache_dtype": "int8"} if dtype == "int8" else {"dtype": dtype}
    workload = decode("", 1, 4, 2, 16, cache="KVCache", **storage)
    assert workload.reads and RAGGED.reads
    assert not (SMALL.reads or PACKED.reads or prefill("", 1, 1, 1, 64).reads)
    itemsize = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
    cache = fa.KVCache(1, 2, 16, 128, dtype=workloads.real_dtype(dtype))
    assert workload.kv_bytes == cache.nbytes == 2 * 2 * 16 * (128 * itemsize + 4 * (itemsize == 1))
    assert RAGGED.kv_bytes == 2 * 2 * sum(LENGTHS) * 128 * 4


def test_shortened():
    workload = PACKED._replace(causal=True, option="sinks")
    shorter = workload.shortened(32)
    assert (shorter.seqlen_q, shorter.seqlen_k, shorter.lengths) == (32, 32, (3, 32, 32, 7))
    assert (shorter.causal, shorter.option, shorter.batch) == (True, "sinks", 4)
    assert workload.shortened(100) == workload
    small = workload.small(32)
    assert small == shorter._replace(causal=False, option="")
    assert DECODE.shortened(32).seqlen_q == 1


def test_bfloat16_needs_its_library(monkeypatch):
    monkeypatch.setattr(workloads.importlib.util, "find_spec", lambda name: None)
    assert workloads.lacks(DECODE) is None
    narrow = DECODE._replace(dtype="bfloat16")
    for workload in (narrow, SMALL._replace(cache_dtype="bfloat16")):
        assert workloads.lacks(workload) == "bfloat16 needs ml_dtypes installed"
    assert workloads.lacks(DECODE._replace(baseline=narrow)) is not None


# --- contenders -------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_numpy_is_attention(option, causal):
    workload = SMALL._replace(option=option, causal=causal, dtype="float64", num_kv_heads=2)
    call = contenders.CONTENDERS["numpy"].make(workload, 1)
    result = call.run()
    expected = reference.attention(*workload.arrays(), **workload.options())
    np.testing.assert_allclose(call.read(result), expected, rtol=1e-10, atol=1e-12)
    check(call, result, workload)


@pytest.mark.parametrize("causal", [False, True])
def test_numpy_has_the_gradients(causal):
    workload = BOTH._replace(causal=causal, dtype="float64")
    call = contenders.CONTENDERS["numpy"].make(workload, 1)
    expected = reference.attention_backward(workload.grad_out(), *workload.arrays(), causal=causal)
    for found, wanted in zip(call.read(call.run()), expected, strict=False):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["fastattn", "numpy"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_dtype(form, dtype, name):
    need_dtype(dtype)
    workload = FORMS[form]._replace(dtype=dtype)
    call = contenders.CONTENDERS[name].make(workload, 2)
    result = call.run()
    check(call, result, workload)
    parts = call.read(result)
    assert {part.dtype for part in parts} == {workloads.real_dtype(dtype)}
    assert contenders.CONTENDERS[name].make(workload.small(8), 1).run() is not None


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_called_in_every_form(form):
    workload = FORMS[form]._replace(dtype="float64")
    call = plain.reference(workload, 1)
    result = call.run()
    check(call, result, workload)
    expected = ours.make(workload, 1)
    parts = zip(call.read(result), expected.read(expected.run()), strict=True)
    for found, wanted in parts:
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [ours.make, plain.numpy, plain.reference])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_layers(num_kv_heads, dtype, make):
    workload = LAYER._replace(num_kv_heads=num_kv_heads, dtype=dtype)
    call = make(workload, 1)
    result = call.run()
    check(call, result, workload)
    # By hand: projections, heads side by side, the last projection.
    x = workload.layer_input().astype(np.float64)
    w_q, w_k, w_v, w_o = workload.layer_weights()
    q, k, v = ((x @ w).reshape(2, 96, -1, 16).swapaxes(1, 2) for w in (w_q, w_k, w_v))
    heads = reference.attention(q, k, v).swapaxes(1, 2).reshape(2, 96, 64)
    np.testing.assert_allclose(result, heads @ w_o, atol=1e-5)


def test_a_program_is_attention_and_a_product(monkeypatch):
    monkeypatch.setattr(program, "AFTER_SECONDS", 0.001)
    monkeypatch.setattr(program, "CALLERS_SECONDS", 0.001)
    call = contenders.CONTENDERS["fastattn"].make(PROGRAM, 1)
    check(call, call.run(), PROGRAM)
    attend, multiply = call.parts
    np.testing.assert_array_equal(attend(), call.run())
    x, w = PROGRAM.product_input()
    np.testing.assert_array_equal(multiply(), x @ w)
    assert PROGRAM.flops == PROGRAM._replace(product_of="").flops + 2 * 1024 * 384 * 1536
    seconds = {attend: 1.0, multiply: 2.0, call.run: 4.0}
    figures = program.turn(call, seconds.__getitem__)
    assert (figures["alone"], figures["seconds"]) == (3.0, 4.0)
    assert figures["after"] >= 0 and figures["callers"] > 0
    assert figures["threads"] is None or figures["threads"] >= 1


def test_what_is_no_attention_alone_is_left_to_who_does_it():
    does = {name: contender.does for name, contender in contenders.CONTENDERS.items()}
    assert [name for name in does if "program" in does[name]] == ["fastattn", "torch"]
    assert [name for name in does if "model" in does[name]] == ["fastattn", "torch", "eager"]
    assert [w.what for w in (SMALL, LAYER, PROGRAM, MODEL)] == [
        "attention", "attention", "program", "model"
    ]  # fmt: skip
    if "torch" in contenders.installed():
        with pytest.raises(forms.Unsupported, match="no product of NumPy"):
            contenders.CONTENDERS["torch"].make(PROGRAM, 1)


@pytest.mark.parametrize("cache", ["KVCache", "PagedKVCache"])
@pytest.mark.parametrize("lengths", [(), LENGTHS])
def test_int8_caches(cache, lengths):
    workload = RAGGED._replace(lengths=lengths, cache=cache, cache_dtype="int8")
    call = contenders.CONTENDERS["fastattn"].make(workload, 1)
    result = call.run()
    check(call, result, workload)
    exact = reference.attention(*workload.arrays(), kv_lengths=np.array(workload.key_lengths))
    assert not np.allclose(result, exact, rtol=0, atol=1e-4)  # it is stored in int8
    for name in ("numpy", "blas"):
        with pytest.raises(forms.Unsupported, match="no int8 cache"):
            contenders.CONTENDERS[name].make(workload, 1)


def test_pages_of_sequences_lie_scattered(monkeypatch):
    caches = []

    class Spy(fa.PagedKVCache):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            caches.append(self)

    monkeypatch.setattr(ours, "PagedKVCache", Spy)
    contenders.CONTENDERS["fastattn"].make(FORMS["pages"], 1)
    [cache] = caches
    assert cache.lengths(cache.seq_ids).tolist() == list(LENGTHS)
    assert (np.diff(cache.page_table(cache.seq_ids[2:3])[0])[:2] > 1).all()
    assert cache.num_free_pages == 0


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *itertools.product(FORMS, ["float32", "bfloat16"]),
        ("layer", "float32"),
        # The arrays of options are float32.
        *itertools.product([*OPTIONS][1:], ["float32"]),
    ],
)
def test_check_finds_a_wrong_result(form, dtype):
    need_dtype(dtype)
    others = {option: SMALL._replace(option=option) for option in OPTIONS} | {"layer": LAYER}
    workload = (FORMS | others)[form]
    workload = workload._replace(dtype=dtype)
    call = contenders.CONTENDERS["fastattn"].make(workload, 1)
    result = call.run()
    check(call, result, workload)

    def spoilt(at):
        parts = [np.array(part, np.float64) for part in call.read(result)]
        size = np.abs(parts[at][..., -1, :]).max()
        parts[at][..., -1, 3] += 3 * TOLERANCES[dtype] * max(size, 0.1)
        return parts

    places = range(3) if workload.gradients else [-1]
    for at in places:
        with pytest.raises(AssertionError, match="instead of"):
            check(call._replace(read=lambda _, at=at: spoilt(at)), result, workload)
    nan = [np.full_like(part, np.nan) for part in spoilt(0)]
    with pytest.raises(AssertionError, match="nan instead of"):
        check(call._replace(read=lambda _: nan), result, workload)


@pytest.mark.parametrize("workload", [SMALL, PACKED, DECODE], ids=["prefill", "packed", "decode"])
def test_blas_is_the_products(workload):
    call = contenders.CONTENDERS["blas"].make(workload, 1)
    result = call.run()
    check(call, result, workload)
    result[-1][...] += 1
    with pytest.raises(AssertionError):
        check(call, result, workload)


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (SMALL._replace(option="mask"), "no mask"),
        (SMALL._replace(dtype="float16"), "no float16"),
        (BOTH, "no gradients"),
        (LAYER, "no layer"),
    ],
)
def test_blas_is_the_products_only(workload, message):
    with pytest.raises(forms.Unsupported, match=message):
        contenders.CONTENDERS["blas"].make(workload, 1)


def test_the_fastest_way_is_measured():
    seconds = itertools.count()
    calls = [forms.Call(lambda name=name: runs.append(name), print) for name in "abc"]
    runs = []
    times = {"a": 3, "b": 1, "c": 2}
    now = 0

    def clock():
        nonlocal now
        # Even readings start a run, odd ones end it.
        if next(seconds) % 2:
            now += times[runs[-1]]
        return now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms.time, "perf_counter", clock)
        assert forms.fastest(calls) is calls[1]
    assert {name: runs.count(name) for name in "abc"} == dict.fromkeys("abc", forms.TRIALS + 1)


# In a process of its own: the libraries set the threads of the whole process.
CHECK_PEER = """
import sys
from fastattn._bench import contenders
from fastattn._bench.check import check
from fastattn._bench.forms import Unsupported
from test_bench_workloads import FORMS, LAYER, OPTIONS, prefill
from fastattn._bench.workloads import lacks

found = {}
for option in OPTIONS:
    for causal, num_kv_heads in ((False, 4), (True, 2)):
        found[f"{option or 'plain'} {causal}"] = prefill(
            "", 2, 4, 320, 16, num_kv_heads=num_kv_heads, causal=causal, option=option
        )
for dtype in ("float32", "float16", "bfloat16"):
    for form, workload in FORMS.items():
        found[f"{form} {dtype}"] = workload._replace(dtype=dtype)
found["layer"], found["layer causal"] = LAYER, LAYER._replace(causal=True)
make = contenders.CONTENDERS[sys.argv[1]].make
for name, workload in found.items():
    if lacks(workload):
        continue
    try:
        call = make(workload, 1)
    except Unsupported:
        continue
    check(call, call.run(), workload)
    print(name)
"""

# Its arguments are names of contenders.  A short call of each model, with one layer.
CHECK_MODELS = """
import sys
import pytest
from fastattn._bench import contenders, grid
from fastattn._bench.check import check
from fastattn._bench.models import MODELS
from test_bench_workloads import MODEL, PROGRAM

program = PROGRAM._replace(product_of="torch")
some = {(MODELS[w.model].config, w.seqlen_q == 1): w for w in grid.chosen("models")}
some = [
    w.shortened(17)._replace(batch=2, num_heads=4, num_kv_heads=2, num_layers=1, lengths=())
    for w in some.values()
]
some.append(MODEL._replace(lengths=(3, 24)))
for name in sys.argv[1:]:
    make = contenders.CONTENDERS[name].make
    for workload in some if name == "eager" else [program, *some]:
        call = make(workload, 1)
        for _ in range(2):
            check(call, call.run(), workload)
    wrong = call._replace(run=lambda: call.run() + 0.1)
    with pytest.raises(AssertionError, match="instead of"):
        check(wrong, wrong.run(), workload)
    print(name, len(some))
"""


@pytest.mark.slow
def test_models_and_programs_of_torch(request):
    names = ("eager", "torch", "fastattn")
    if not set(names) <= contenders.installed().keys():
        pytest.skip("PyTorch or transformers is not installed")
    paths = {"PYTHONPATH": str(request.path.parent)}
    checked = output_of("-c", CHECK_MODELS, *names, **contenders.environment(1), **paths)
    assert checked.splitlines() == [f"{name} 6" for name in names]


SIXTEEN_BITS = ("float32", "float16", "bfloat16")
# Forms in float32, forms in other dtypes.
PEERS = {
    "torch": [
        *(f"{form} {dtype}" for form in FORMS for dtype in SIXTEEN_BITS),
        "layer",
        "layer causal",
    ],
    "onnxruntime": [
        f"{form} {dtype}"
        for form in ("prefill", "decode", "cache", "pages")
        for dtype in SIXTEEN_BITS[:2]
    ],
    "openvino": [
        f"{form} {dtype}"
        for form in ("prefill", "decode", "cache", "pages")
        for dtype in SIXTEEN_BITS
    ],
    "jax": [f"{form} {dtype}" for form in FORMS for dtype in ("float32", "bfloat16")],
}


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_attention(name, request):
    if name not in contenders.installed():
        pytest.skip(f"{name} is not installed")
    paths = {"PYTHONPATH": str(request.path.parent)}
    checked = output_of("-c", CHECK_PEER, name, **contenders.environment(1), **paths).splitlines()
    options = {"plain True", "plain False"}
    options |= {f"{x} False" for x in ("mask", "bias", "alibi", "window", "segments")}
    lacking = {x for x in SIXTEEN_BITS if workloads.lacks(SMALL._replace(dtype=x))}
    expected = {x for x in PEERS[name] if x.split()[-1] not in lacking}
    assert options | expected <= set(checked)
