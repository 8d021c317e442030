"""One picture of a billion attention weights: where a long text repeats itself.

The text is the language reference that ships with Python.  Each word is a random vector, rare ones
longer; the vector of a place is the mean over the words around it.  Queries and keys are these
vectors, so that a place attends to earlier ones that are written in the same words, and no model is
needed.  `fastattn.attention_weights` pools the weights of all places while it computes them, and
sums them to say which passages are looked at most.

    python examples/attention_map.py --plot docs/pictures/attention_map.png
"""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

import fastattn as fa

HEAD_DIM = 64
CONTEXT = 24  # words around a place that its vector is made of
APART = 100  # words: nearer ones are no repetition
SHARPNESS = 60.0  # a place of the same words scores as much more than one of others
BLOCKS = 256  # of the picture, each way


def read_words(count: int) -> list[str]:
    text = " ".join(topics[name] for name in sorted(topics))
    words = re.findall(r"[a-z_]+|[0-9]+|[^\sa-z0-9]", text.lower())
    if not CONTEXT < count <= len(words):
        raise SystemExit(f"--words must be {CONTEXT + 1} to {len(words)}, got {count}")
    return words[:count]


def vectors_of_places(words: Sequence[str]) -> np.ndarray:
    """(len(words), HEAD_DIM), of length 1."""
    rng = np.random.default_rng(0)
    counts = Counter(words)
    of_word = {
        word: rng.standard_normal(HEAD_DIM) * np.log(len(words) / n) for word, n in counts.items()
    }
    sums = np.cumsum([np.zeros(HEAD_DIM), *(of_word[word] for word in words)], axis=0)
    first = np.clip(np.arange(len(words)) - CONTEXT // 2, 0, len(words) - CONTEXT)
    places = sums[first + CONTEXT] - sums[first]
    return (places / np.linalg.norm(places, axis=-1, keepdims=True)).astype(np.float32)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--words", type=int, default=32768)
    parser.add_argument("--plot", type=Path, help="write the picture to this file")
    args = parser.parse_args(argv)
    words = read_words(args.words)
    x = vectors_of_places(words)
    options = {"scale": SHARPNESS, "causal": True, "q_offset": -APART}
    blocks = min(BLOCKS, len(words))

    start = time.perf_counter()
    pooled = fa.attention_weights(x, x, pool=(blocks, blocks), **options)
    seconds = time.perf_counter() - start
    looks = fa.attention_weights(x, x, reduce="keys", **options)
    print(
        f"{len(words) ** 2:,} weights of {len(words):,} words in {blocks} x {blocks} blocks: "
        f"{seconds:.1f} s; all of them would be {len(words) ** 2 * 4 / 2**30:.1f} GiB"
    )
    print("looked at most:")
    left = looks.copy()
    for _ in range(3):
        most = int(np.argmax(left))
        first = max(most - CONTEXT // 2, 0)
        print(f"{looks[most]:8.1f}  word {most:6}: {' '.join(words[first : first + CONTEXT])}")
        left[max(most - APART, 0) : most + APART] = 0
    if args.plot is not None:
        draw(pooled, len(words), args.plot)
    # Each place has weights that sum to one, but for the first ones, which see nothing.
    expected = len(words) - APART
    total = float(looks.sum(dtype=np.float64))
    right = abs(total - expected) < 1e-6 * expected
    print(f"{'ok   ' if right else 'WRONG'} the weights sum to {total:.3f}, of {expected} places")
    return 0 if right else 1


def draw(pooled: np.ndarray, seqlen: int, path: Path) -> None:
    from matplotlib.figure import Figure

    from fastattn.plot import attention_map

    figure = Figure(figsize=(7, 5.6), layout="constrained")
    attention_map(
        pooled,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        ax=figure.add_subplot(),
        norm="log",
        vmin=float(np.quantile(pooled[pooled > 0], 0.3)),
    ).set_title("Where Python's language reference repeats itself")
    figure.savefig(path, dpi=110)
    print(f"drawn to {path}")


if __name__ == "__main__":
    sys.exit(main())
