"""Whole models of ``transformers`` with made weights, whose attention is one of PyTorch's."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastattn._bench.forms import Call
from fastattn._bench.workloads import Array, Workload

VOCABULARY = 1000  # tokens, of which no attention knows the number


class Model(NamedTuple):
    """An architecture, and where its sizes are not what follows from the heads."""

    config: str  # class of transformers
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_share: float = 4.0  # features within the layers' perceptrons, over those between layers


MODELS = {
    "BERT-base": Model("BertConfig", 12, 12, 12, 64),
    "MiniLM-L6": Model("BertConfig", 6, 12, 12, 32),
    "ViT-B": Model("ViTConfig", 12, 12, 12, 64),
    "Whisper-base": Model("WhisperConfig", 6, 8, 8, 64),
    "SmolLM-135M": Model("LlamaConfig", 30, 9, 3, 64, 8 / 3),
    "Llama-1B": Model("LlamaConfig", 16, 32, 8, 64),
}


def make(workload: Workload, num_threads: int, attention: str) -> Call:
    """A call of a model with one of the attentions that ``transformers`` knows by name."""
    import torch

    torch.set_num_threads(num_threads)
    model = _model(workload, attention)
    inputs = _inputs(workload, model.config)

    def call() -> Any:
        with torch.inference_mode():
            return model(**inputs()).last_hidden_state

    return Call(call, np.asarray)


def eager(workload: Workload, num_threads: int) -> Call:
    """Attention as ``transformers`` writes it out: products, and a softmax of whole scores."""
    return make(workload, num_threads, "eager")


def _model(workload: Workload, attention: str) -> Any:
    import torch
    import transformers

    features = workload.num_heads * workload.head_dim
    wide = round(MODELS[workload.model].mlp_share * features)
    name = MODELS[workload.model].config
    sizes: dict[str, Any] = {
        "hidden_size": features,
        "intermediate_size": wide,
        "num_attention_heads": workload.num_heads,
        "num_hidden_layers": workload.num_layers,
        "vocab_size": VOCABULARY,
    }
    if name == "WhisperConfig":
        sizes = {
            "d_model": features,
            "encoder_ffn_dim": wide,
            "encoder_attention_heads": workload.num_heads,
            "encoder_layers": workload.num_layers,
            "max_source_positions": workload.seqlen_k,
        }
        kind: Any = transformers.models.whisper.modeling_whisper.WhisperEncoder
    elif name == "ViTConfig":
        # A class and squares of 16 x 16 pixels.
        sizes["image_size"] = 16 * math.isqrt(workload.seqlen_k - 1)
        kind = transformers.ViTModel
    elif name == "LlamaConfig":
        sizes["num_key_value_heads"] = workload.num_kv_heads
        sizes["head_dim"] = workload.head_dim
        kind = transformers.LlamaModel
    else:
        kind = transformers.BertModel
    torch.manual_seed(0)
    config = getattr(transformers, name)(**sizes, attn_implementation=attention)
    return kind(config).eval()


def _inputs(workload: Workload, config: Any) -> Callable[[], dict[str, Any]]:
    """The arguments of a call: the same on every call, but that a cache grows in each."""
    import torch

    rng = np.random.default_rng(5)

    def normal(*shape: int) -> Any:
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    fixed: dict[str, Any] = {}
    name = MODELS[workload.model].config
    if name == "WhisperConfig":
        fixed["input_features"] = normal(workload.batch, config.num_mel_bins, 2 * workload.seqlen_k)
    elif name == "ViTConfig":
        fixed["pixel_values"] = normal(workload.batch, 3, config.image_size, config.image_size)
    else:
        ids = rng.integers(VOCABULARY, size=(workload.batch, workload.seqlen_q))
        fixed["input_ids"] = torch.from_numpy(ids)
    if name == "BertConfig":
        ends = np.array(workload.key_lengths)[:, None]
        fixed["attention_mask"] = torch.from_numpy((np.arange(workload.seqlen_k) < ends) * 1)
    if workload.seqlen_q == workload.seqlen_k:
        return lambda: fixed

    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    past = workload.seqlen_k - workload.seqlen_q
    shape = (workload.batch, workload.num_kv_heads, past, workload.head_dim)
    for layer in range(workload.num_layers):
        cache.update(normal(*shape), normal(*shape), layer)

    def inputs() -> dict[str, Any]:
        grown = cache.get_seq_length() - past
        if grown:
            cache.crop(-grown)
        return {**fixed, "cache": cache}

    return inputs


def expected(workload: Workload) -> Array:
    """What attention that is written out makes of the same inputs and weights."""
    import torch

    made: Array = np.asarray(eager(workload, torch.get_num_threads()).run())
    return made
