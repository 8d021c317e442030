"""Pictures of attention weights, drawn with matplotlib, which only this module imports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

__all__ = ["attention_map"]

# Points.  Tokens are written where each has room for letters of this size, up to the larger one.
SMALLEST_TEXT, LARGEST_TEXT = 5.0, 10.0


def attention_map(
    weights: ArrayLike,
    *,
    tokens_q: Sequence[str] | None = None,
    tokens_k: Sequence[str] | None = None,
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
    ax: Axes | None = None,
    colorbar: bool = True,
    **image_options: Any,
) -> Axes:
    """Draw the attention weights of one head, queries downwards and keys to the right.

    Parameters
    ----------
    weights : array_like, (queries, keys)
        What `fastattn.attention_weights` gives for a head: weights, or means of blocks of them.
        NaN is left blank.
    tokens_q, tokens_k : sequence of str, optional
        The token of each row and of each column.  They are written beside the map if it has room
        for all of them; if not, positions are.
    seqlen_q, seqlen_k : int, optional
        How many queries and keys the map stands for, if it is pooled: its axes then count these.
        Default: the shape of `weights`.
    ax : matplotlib.axes.Axes, optional
        Where to draw.  Default: a new figure of pyplot's.
    colorbar : bool, optional
        Whether to draw a scale of the colours.
    **image_options
        For ``matplotlib.axes.Axes.imshow``: `cmap`, `vmax` and others.  ``norm="log"`` shows small
        weights beside large ones; those of exactly 0 are then blank.

    Returns
    -------
    matplotlib.axes.Axes
        `ax`, or that of the new figure.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong kind, shape or value; the message names it.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("agg")  # no window
    >>> import numpy as np
    >>> import fastattn as fa
    >>> from fastattn.plot import attention_map
    >>> words = "the cat sat on the mat".split()
    >>> q = k = np.random.default_rng(0).standard_normal((6, 16), dtype=np.float32)
    >>> ax = attention_map(fa.attention_weights(q, k), tokens_q=words, tokens_k=words)
    >>> ax.figure.savefig("map.png")  # doctest: +SKIP
    """
    array = np.asarray(weights)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"`weights` must be real numbers, got {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"`weights` must be one map, (queries, keys), got shape {array.shape}")
    rows, cols = array.shape
    for name, tokens, length in (("tokens_q", tokens_q, rows), ("tokens_k", tokens_k, cols)):
        if tokens is not None and len(tokens) != length:
            raise ValueError(f"`{name}` must have {length} tokens, got {len(tokens)}")
    for name, seqlen, length in (("seqlen_q", seqlen_q, rows), ("seqlen_k", seqlen_k, cols)):
        if seqlen is not None and seqlen < length:
            raise ValueError(f"`{name}` must be at least {length}, got {seqlen}")
    bottom, right = seqlen_q or rows, seqlen_k or cols
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    shown = {"extent": (-0.5, right - 0.5, bottom - 0.5, -0.5), "interpolation": "nearest"}
    image = ax.imshow(array, **(shown | image_options))
    ax.set(xlabel="key", ylabel="query")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    if colorbar:
        pooled = (bottom, right) != (rows, cols)
        ax.figure.colorbar(image, ax=ax, label="mean weight" if pooled else "weight")
    ax.figure.draw_without_rendering()  # which decides how large the map is
    box = ax.get_window_extent()
    points = 72 / ax.figure.dpi
    if tokens_q is not None and (size := _text_size(box.height * points / rows)):
        ax.set_yticks(_centres(rows, bottom), tokens_q, fontsize=size)
    if tokens_k is not None and (size := _text_size(box.width * points / cols)):
        ax.set_xticks(_centres(cols, right), tokens_k, fontsize=size, rotation=90)
    return ax


def _text_size(room: float) -> float:
    """Points of letters that lines `room` points apart may have; 0: none."""
    size = min(room / 1.1, LARGEST_TEXT)
    return size if size >= SMALLEST_TEXT else 0.0


def _centres(count: int, length: int) -> Any:
    """Of `count` equal cells over positions 0 to length - 1."""
    return (np.arange(count) + 0.5) * (length / count) - 0.5
