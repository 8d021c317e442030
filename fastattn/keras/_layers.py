"""Keras's attention layers, with their attention by fastattn.

Keras's layers project, and leave two methods to those who compute attention another way: one that
merges masks, and one that attends.  Here the first keeps the masks apart, so that no array of
(seqlen_q, seqlen_k) has to exist, and the second hands them over.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import keras
from keras import ops

from fastattn.keras._ops import attend


class _Masks(NamedTuple):
    """What Keras would merge: the arguments of its ``_compute_attention_mask``."""

    query: Any
    value: Any
    given: dict[str, Any]

    def options(self) -> dict[str, Any]:
        """The same as options of `attend`."""
        query, value, key, mask, causal = (
            self.given.get(name)
            for name in (
                *("query_mask", "value_mask", "key_mask", "attention_mask"),
                "use_causal_mask",
            )
        )
        options: dict[str, Any] = {"causal": bool(causal)}
        if mask is not None:
            mask = ops.cast(mask, "bool")
            while len(mask.shape) < 4:  # Keras adds axes before the last two
                mask = ops.expand_dims(mask, -3)
            options["mask"] = mask
        # Padding is a segment of its own among the queries, and another among the keys.
        padded_keys = [_padding(x) for x in (value, key) if x is not None]
        if query is not None or padded_keys:
            zeros = ops.zeros((1, 1), "int32")
            options["q_ids"] = zeros if query is None else _padding(query)
            options["k_ids"] = 2 * functools.reduce(ops.maximum, padded_keys, zeros)
        return options


def _padding(mask: Any) -> Any:
    """1 where a mask of Keras is False, else 0."""
    return ops.cast(ops.logical_not(ops.cast(mask, "bool")), "int32")


class _Attention:
    """What both layers have in place of the methods of Keras's."""

    def _compute_attention_mask(self, query: Any, value: Any, **given: Any) -> _Masks:
        return _Masks(query, value, given)

    def _merged(self, masks: Any) -> Any:
        """The one mask that Keras's own attention takes."""
        if not isinstance(masks, _Masks):
            return masks
        merge = super()._compute_attention_mask  # type: ignore[misc]
        return merge(masks.query, masks.value, **masks.given)

    def _attend(
        self, query: Any, key: Any, value: Any, masks: Any, training: Any, window: int | None
    ) -> tuple[Any, None]:
        if not isinstance(masks, _Masks):
            masks = _Masks(query, value, {"attention_mask": masks})
        options = masks.options()
        if window is not None:
            options["window"] = window - 1, window - 1
        dropout = self._dropout_layer  # type: ignore[attr-defined]
        if training and dropout.rate > 0:
            options |= {"dropout_p": dropout.rate, "seed": dropout.seed_generator.next()}
        return attend(query, key, value, scale=None, **options), None

    @property
    def supports_jit(self) -> bool:
        """Whether Keras may compile a model with this layer by XLA."""
        return self._supports_jit and keras.backend.backend() != "tensorflow"

    @supports_jit.setter
    def supports_jit(self, value: bool) -> None:
        self._supports_jit = value


@keras.saving.register_keras_serializable(package="fastattn")
class MultiHeadAttention(_Attention, keras.layers.MultiHeadAttention):  # type: ignore[misc]
    """``keras.layers.MultiHeadAttention``, its attention computed by fastattn, in linear memory.

    The arguments, the call, the masks, the weights and their order are those of Keras's layer:
    ``set_weights`` and ``load_weights`` work both ways.

    Parameters
    ----------
    num_heads, key_dim, value_dim, dropout, use_bias, output_shape, attention_axes, ... : optional
        As in ``keras.layers.MultiHeadAttention``.

    Notes
    -----
    Masks of the inputs, `attention_mask`, `use_causal_mask` and the sliding window apply together,
    without an array of (seqlen_q, seqlen_k) that the caller did not make.

    Dropout in training drops weights as Keras's layer does, but not the same ones: which, the state
    of the layer's own ``keras.random.SeedGenerator`` (argument `seed`) decides.

    Calls that ask for the weights (``return_attention_scores=True``), and inputs of more than three
    dimensions or with `attention_axes` other than (1,), are computed by Keras.

    On TensorFlow, ``model.compile`` leaves XLA out for a model with this layer, and a
    ``tf.function(jit_compile=True)`` around it raises NotImplementedError.

    Examples
    --------
    >>> import keras
    >>> import numpy as np
    >>> import fastattn.keras
    >>> ours = fastattn.keras.MultiHeadAttention(num_heads=4, key_dim=16)
    >>> kerass = keras.layers.MultiHeadAttention(num_heads=4, key_dim=16)
    >>> x = keras.random.normal((2, 10, 32))
    >>> for layer in (ours, kerass):
    ...     layer.build(x.shape, x.shape)
    >>> kerass.set_weights(ours.get_weights())
    >>> bool(np.allclose(ours(x, x), kerass(x, x), atol=1e-5))
    True
    """

    def _compute_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        training: Any = None,
        return_attention_scores: bool = False,
    ) -> Any:
        if return_attention_scores or len(query.shape) != 4 or self._attention_axes != (1,):
            mask = self._merged(attention_mask)
            return super()._compute_attention(
                query, key, value, mask, training, return_attention_scores
            )
        window = getattr(self, "_sliding_window", None)  # of Keras since 3.15
        return self._attend(query, key, value, attention_mask, training, window)


@keras.saving.register_keras_serializable(package="fastattn")
class GroupedQueryAttention(_Attention, keras.layers.GroupQueryAttention):  # type: ignore[misc]
    """``keras.layers.GroupQueryAttention``, its attention computed by fastattn, in linear memory.

    The arguments, the call, the masks, the weights and their order are those of Keras's layer:
    ``set_weights`` and ``load_weights`` work both ways.

    Parameters
    ----------
    head_dim, num_query_heads, num_key_value_heads, dropout, use_bias, ... : optional
        As in ``keras.layers.GroupQueryAttention``.

    Notes
    -----
    Those of `MultiHeadAttention`.  Heads of keys and values are not repeated in memory, and the
    layer's `num_repeats` is 1 for that.

    Examples
    --------
    >>> import keras
    >>> import fastattn.keras
    >>> layer = fastattn.keras.GroupedQueryAttention(
    ...     head_dim=16, num_query_heads=8, num_key_value_heads=2
    ... )
    >>> x = keras.random.normal((2, 10, 32))
    >>> tuple(layer(x, x, use_causal_mask=True).shape)
    (2, 10, 32)
    """

    @property
    def num_repeats(self) -> int:
        """How often Keras's ``call`` repeats the heads of keys and values before it attends."""
        return 1

    @num_repeats.setter
    def num_repeats(self, value: int) -> None:
        """Keras's own number is that of query heads for each; the shapes have it."""

    def _compute_attention(
        self, query: Any, key: Any, value: Any, attention_mask: Any = None, training: Any = None
    ) -> Any:
        if self._return_attention_scores:
            repeats = self.num_query_heads // key.shape[2]
            key, value = (ops.repeat(x, repeats, axis=2) for x in (key, value))
            mask = self._merged(attention_mask)
            return super()._compute_attention(query, key, value, mask, training)
        window = getattr(self, "sliding_window", None)  # of Keras since 3.15
        return self._attend(query, key, value, attention_mask, training, window)
