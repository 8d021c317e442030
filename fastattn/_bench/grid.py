"""Which workloads are measured, by name and kind."""

from typing import Any

from fastattn._bench.models import MODELS
from fastattn._bench.workloads import OPTIONS, Workload, decode, prefill

SHORT_DTYPES = {"float16": "f16", "bfloat16": "bf16"}

#: Sequences of a batch, very unequal, as requests are: decoded from a cache.
RAGGED_LENGTHS = (10, 100, 500, 1000, 2000, 4000, 6000, 8000)
#: Sequences of a batch that is padded, to twice their number of tokens.
PADDED_LENGTHS = (32, 96, 160, 224, 288, 352, 384, 512)
#: Sequences packed one after another.
PACKED_LENGTHS = (33, 70, 256, 512, 900, 1024, 1500, 1800)


def _both_masks(workload: Workload) -> list[Workload]:
    """A workload, and the same causal."""
    return [workload, workload._replace(name=f"{workload.name}-causal", causal=True)]


def _in_16_bits(workload: Workload) -> list[Workload]:
    """The same in both 16-bit types, beside float32."""
    return [
        workload._replace(name=f"{workload.name}-{short}", dtype=dtype, baseline=workload)
        for dtype, short in SHORT_DTYPES.items()
    ]


def _in_int8(workload: Workload, cache: str) -> Workload:
    """The same from a cache of int8, beside float32."""
    return workload._replace(
        name=f"{workload.name}-int8", cache=cache, cache_dtype="int8", baseline=workload
    )


def _growth(seqlen: int, **rest: Any) -> Workload:
    return prefill(f"growth-{seqlen}", 1, 1, seqlen, 64, kind="growth", **rest)


#: Doubling lengths, each beside its half: time is to grow with the square, memory with the length.
GROWTH = (
    _growth(1024),
    *(_growth(2 * n, baseline=_growth(n)) for n in (1024, 2048, 4096, 8192, 16384)),
)

_PLAIN, _PLAIN_CAUSAL = _both_masks(prefill("prefill-2k", 1, 12, 2048, 64))
_WIDE, _WIDE_CAUSAL = _both_masks(prefill("prefill-4k-wide", 1, 8, 4096, 128))
_MANY_SHORT = prefill("many-short", 8, 12, 128, 64)
_SHORTEST = prefill("short-32", 32, 12, 32, 32)
_SHORT = (
    _MANY_SHORT,
    _SHORTEST,
    prefill("short-64", 32, 2, 64, 16),
    prefill("short-image", 8, 12, 197, 64),  # a class and 14 x 14 patches
    prefill("short-windows", 512, 4, 49, 32),  # of 7 x 7 patches
)

_PREFILL = (
    *_both_masks(prefill("prefill-512", 1, 12, 512, 64)),
    _PLAIN,
    _PLAIN_CAUSAL,
    _WIDE,
    _WIDE_CAUSAL,
    prefill("grouped-1k-causal", 1, 32, 1024, 128, num_kv_heads=8, causal=True),
    *_SHORT,
    prefill("head-dim-32", 1, 12, 2048, 32),
    prefill("head-dim-80", 1, 12, 2048, 80),
    prefill("head-dim-256", 1, 4, 2048, 256),
    prefill("double-2k", 1, 12, 2048, 64, dtype="float64"),
    *(half for w in (_PLAIN, _PLAIN_CAUSAL, _WIDE, _WIDE_CAUSAL) for half in _in_16_bits(w)),
    prefill("one-query", 1, 1, 1, 64, num_threads=1),
)

_OPTIONS = (
    *(
        _PLAIN._replace(name=f"{option}-2k", kind="options", option=option, baseline=_PLAIN)
        for option in OPTIONS
        if option not in ("", "window")
    ),
    prefill(
        "window-8k", 1, 4, 8192, 64, kind="options", option="window",
        baseline=prefill("prefill-8k", 1, 4, 8192, 64),
    ),
)  # fmt: skip

_DECODE_4K = decode("decode-4k", 1, 32, 32, 4096)
_DECODE_8K = decode("decode-8k", 1, 32, 32, 8192)
_DECODE_8K_G4 = decode("decode-8k-g4", 1, 32, 8, 8192)
_DECODE_64K_G4 = decode("decode-64k-g4", 1, 32, 8, 65536)
_DECODE_BATCH = decode("decode-4k-g4-batch8", 8, 32, 8, 4096)

#: One key head for four query heads, growing: the lines of a picture.
DECODE_GROWTH = (
    decode("decode-1k-g4", 1, 32, 8, 1024),
    decode("decode-4k-g4", 1, 32, 8, 4096),
    _DECODE_8K_G4,
    _DECODE_64K_G4,
)
#: One key head for each query head in every storage: the bars of a picture.
DECODE_DTYPES = (_DECODE_8K, *_in_16_bits(_DECODE_8K), _in_int8(_DECODE_8K, "KVCache"))

_DECODE = (
    _DECODE_4K,
    *DECODE_GROWTH,
    decode("decode-8k-g8", 1, 32, 4, 8192),
    decode("decode-1k-batch8", 8, 32, 32, 1024),
    _DECODE_BATCH,
    *DECODE_DTYPES,
    *_in_16_bits(_DECODE_8K_G4),
    _in_int8(_DECODE_8K_G4, "KVCache"),
    _in_int8(_DECODE_64K_G4, "KVCache"),
    _in_16_bits(_DECODE_BATCH)[1],
    _in_int8(_DECODE_BATCH, "KVCache"),
)

_PACKED = prefill(
    "varlen-packed", len(PACKED_LENGTHS), 12, max(PACKED_LENGTHS), 64, kind="varlen",
    lengths=PACKED_LENGTHS,
)  # fmt: skip
_RAGGED = decode(
    "varlen-decode", len(RAGGED_LENGTHS), 32, 8, max(RAGGED_LENGTHS), kind="varlen",
    lengths=RAGGED_LENGTHS, cache="KVCache",
)  # fmt: skip
_VARLEN = (
    *_both_masks(_PACKED),
    _RAGGED,
    _RAGGED._replace(name="varlen-decode-paged", cache="PagedKVCache", baseline=_RAGGED),
    _in_16_bits(_RAGGED)[1],
    _in_int8(_RAGGED, "KVCache"),
    _in_int8(_RAGGED, "PagedKVCache")._replace(name="varlen-decode-paged-int8"),
)

_TRAINING = [
    w._replace(name=w.name.replace("prefill", "backward"), kind="backward", gradients=True)
    for w in (_PLAIN, _PLAIN_CAUSAL, _WIDE)
]
_BACKWARD = (*_TRAINING, *(half for w in _TRAINING[:2] for half in _in_16_bits(w)))


def _beside_one_thread(workload: Workload, name: str) -> Workload:
    return workload._replace(
        name=name, kind="scaling", alone=True, baseline=workload._replace(num_threads=1)
    )


#: The threads of the run beside one thread.
SCALING = (
    _beside_one_thread(_PLAIN, "scaling-2k"),
    _beside_one_thread(_PLAIN_CAUSAL, "scaling-2k-causal"),
    _beside_one_thread(_MANY_SHORT, "scaling-many-short"),
    _beside_one_thread(_DECODE_4K, "scaling-decode-4k"),
    _beside_one_thread(_DECODE_8K_G4, "scaling-decode-8k-g4"),
)

_LAYER = tuple(
    prefill(f"layer-{seqlen}", batch, 12, seqlen, 64, kind="layer", layer=True)
    for batch, seqlen in ((32, 32), (8, 128), (1, 512))
)

_PROGRAM = tuple(
    w._replace(name=f"program-{library}-{w.batch}x{w.seqlen_k}", kind="program", product_of=library)
    for library in ("numpy", "torch")
    for w in (_SHORTEST, _MANY_SHORT, _PLAIN)
)


# Tokens of a call above which a model has few layers, and so do models that read much memory.
MOST_TOKENS, FEW_LAYERS = 1024, 2


def _model(name: str, batch: int, seqlen: int, *, few: bool = False, **rest: Any) -> Workload:
    """A call of a model; fewer layers than it has are part of the workload's name."""
    model = MODELS[name]
    few = few or batch * seqlen > MOST_TOKENS
    title = [name.lower(), rest.pop("form", ""), f"{batch}x{seqlen}", "2-layers" if few else ""]
    workload = prefill(
        "-".join(filter(None, title)), batch, model.num_heads, seqlen, model.head_dim,
        num_kv_heads=model.num_kv_heads, kind="models", model=name,
        num_layers=FEW_LAYERS if few else model.num_layers,
    )  # fmt: skip
    return workload._replace(**rest)


_MODELS = (
    *(
        _model(name, batch, seqlen)
        for name in ("BERT-base", "MiniLM-L6")
        for batch in (1, 8, 32)
        for seqlen in (16, 128, 512)
    ),
    # Half of the tokens are padding.
    _model("BERT-base", 8, 512, form="padded", lengths=PADDED_LENGTHS),
    *(_model("ViT-B", batch, 197) for batch in (1, 8)),
    _model("Whisper-base", 1, 1500),
    *(_model("SmolLM-135M", 1, seqlen, form="prefill") for seqlen in (2048, 4096)),
    _model("Llama-1B", 1, 2048, form="prefill"),
    *(_model("SmolLM-135M", 1, seqlen, form="decode", seqlen_q=1) for seqlen in (2048, 8192)),
    *(_model("Llama-1B", batch, 2048, form="decode", seqlen_q=1) for batch in (1, 8)),
)

#: Everything that is measured unless less is asked for, kind by kind.
GRID = (
    *_PREFILL, *_OPTIONS, *_DECODE, *_VARLEN, *_BACKWARD, *_LAYER, *_PROGRAM, *_MODELS, *SCALING,
    *GROWTH,
)  # fmt: skip

KINDS = tuple(dict.fromkeys(workload.kind for workload in GRID))

#: A minute's look at the machine.
QUICK = (
    "prefill-512", "prefill-2k", "prefill-2k-causal", "many-short", "one-query", "decode-4k-g4",
    "varlen-packed", "backward-2k",
)  # fmt: skip


def chosen(text: str) -> list[Workload]:
    """Workloads of a kind, or else those whose name contains a text.

    Parameters
    ----------
    text : str
        One of `KINDS`, or any part of names.

    Returns
    -------
    list of Workload
        In the order of `GRID`.

    Examples
    --------
    >>> from fastattn._bench.grid import chosen
    >>> [workload.name for workload in chosen("scaling-2k")]
    ['scaling-2k', 'scaling-2k-causal']
    """
    return [w for w in GRID if w.kind == text] or [w for w in GRID if text in w.name]
