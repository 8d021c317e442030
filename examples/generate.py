"""A small language model in NumPy and fastattn that writes with and without caches.

The model is the GPT that `train_gpt.py` trained (`gpt.py`), or, without `--weights`, one whose
weights are made here in a few seconds, without training (`ngram.py`).  The same text is written
three times: recomputing everything for each character, with `KVCache`, and with `PagedKVCache`.

    python examples/generate.py --prompt "a function " --tokens 120
    python examples/generate.py --weights gpt.npz --temperature 0.5
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import fastattn as fa
from gpt import Gpt
from ngram import corpus, make_model

Attend = Callable[..., Any]  # (q, k, v, **options) -> attention over everything so far

ORDER, HIDDEN = 9, 8192  # of the model that is made here


class Layer(Protocol):
    """What a cache needs to know of an attention."""

    num_kv_heads: int
    head_dim: int
    head_dim_v: int


class Model(Protocol):
    @property
    def characters(self) -> str: ...
    @property
    def layers(self) -> Sequence[Layer]: ...
    def encode(self, text: str) -> np.ndarray: ...
    def __call__(self, tokens: np.ndarray, start: int, attends: list[Attend]) -> np.ndarray: ...


def no_cache(layer: Layer, capacity: int) -> Attend:
    def attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
        return fa.attention(q, k, v, causal=True, **options)

    return attend


def kv_cache(layer: Layer, capacity: int) -> Attend:
    cache = fa.KVCache(1, layer.num_kv_heads, capacity, layer.head_dim, head_dim_v=layer.head_dim_v)

    def attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
        cache.append(k, v)
        return cache.attention(q, **options)

    return attend


def paged_cache(layer: Layer, capacity: int) -> Attend:
    page_size = 16
    cache = fa.PagedKVCache(
        -(-capacity // page_size), page_size, layer.num_kv_heads, layer.head_dim,
        head_dim_v=layer.head_dim_v,
    )  # fmt: skip
    sequence = cache.add()

    def attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
        cache.append(k, v, [sequence])
        return cache.attention(q, [sequence], **options)

    return attend


def generate(
    model: Model,
    prompt: np.ndarray,
    num_tokens: int,
    memory: Callable[..., Attend],
    temperature: float,
    seed: int,
) -> Iterator[int]:
    """The most likely next token again and again, or, with a temperature, one drawn at random."""
    capacity = len(prompt) + num_tokens
    attends = [memory(layer, capacity) for layer in model.layers]
    rng = np.random.default_rng(seed)
    tokens = prompt
    done = 0  # tokens that the caches hold
    for _ in range(num_tokens):
        logits = model(tokens[done:], done, attends)
        if memory is not no_cache:
            done = len(tokens)
        if temperature > 0:
            # The largest of logits with Gumbel noise is distributed as their softmax.
            logits = logits / temperature + rng.gumbel(size=logits.shape)
        tokens = np.append(tokens, np.argmax(logits))
        yield int(tokens[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write text with and without caches.")
    parser.add_argument("--weights", type=Path, metavar="NPZ", help="as saved by train_gpt.py")
    parser.add_argument("--prompt", default="a function ", help="how the text begins")
    parser.add_argument("--tokens", type=int, default=120, help="characters to write")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: the most likely character (default)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what a temperature draws")
    made = parser.add_argument_group("without --weights")
    made.add_argument("--order", type=int, help=f"characters that it looks back ({ORDER})")
    made.add_argument("--hidden", type=int, help=f"units of its MLP ({HIDDEN})")
    args = parser.parse_args(argv)
    if args.weights is not None and (args.order is not None or args.hidden is not None):
        parser.error("--order and --hidden are of the model that is made without --weights")
    order = ORDER if args.order is None else args.order
    hidden = HIDDEN if args.hidden is None else args.hidden
    if min(args.tokens, hidden) < 1 or order < 2:
        parser.error("--tokens and --hidden must be at least 1, --order at least 2")
    if not (0 <= args.temperature < np.inf) or args.seed < 0:
        parser.error("--temperature must be finite and, like --seed, not below 0")

    model: Model
    try:
        if args.weights is not None:
            model = Gpt.load(args.weights)
            print(f"weights read from {args.weights}\n")
        else:
            start = time.perf_counter()
            text = corpus()
            model = make_model(text, order, hidden)
            seconds = time.perf_counter() - start
            print(f"weights made from {len(text):,} characters in {seconds:.1f} s\n")
        prompt = model.encode(args.prompt)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    memories = {"no cache": no_cache, "KVCache": kv_cache, "PagedKVCache": paged_cache}
    written = {}
    for name, memory in memories.items():
        start = time.perf_counter()
        tokens = list(generate(model, prompt, args.tokens, memory, args.temperature, args.seed))
        speed = args.tokens / (time.perf_counter() - start)
        written[name] = "".join(model.characters[token] for token in tokens)
        if name == "no cache":
            print(f"{args.prompt}{written[name]}\n")
        print(f"{name:<14}{speed:>8,.0f} tokens per second")
    same = len(set(written.values())) == 1
    print("the same text each time" if same else "the texts differ")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
