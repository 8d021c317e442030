"""fastattn for Keras 3: its attention layers and its attention function, on every backend.

`MultiHeadAttention` and `GroupedQueryAttention` are Keras's own layers, with their arguments and
their weights, whose attention is computed by fastattn, in linear memory.  `dot_product_attention`
is ``keras.ops.dot_product_attention``.  `enable` routes Keras's own attention, and what is built on
it, to fastattn.  All of it trains on TensorFlow, JAX and PyTorch, and runs on NumPy.

>>> import keras
>>> import fastattn.keras
>>> layer = fastattn.keras.MultiHeadAttention(num_heads=4, key_dim=16)
>>> x = keras.random.normal((2, 100, 64))
>>> tuple(layer(x, x, use_causal_mask=True).shape)
(2, 100, 64)
"""

from fastattn._enabled import Enabled
from fastattn.keras._layers import GroupedQueryAttention, MultiHeadAttention
from fastattn.keras._ops import dot_product_attention
from fastattn.keras._routing import disable, enable, is_enabled

GroupQueryAttention = GroupedQueryAttention  # as ``keras.layers`` spells it

__all__ = [
    "Enabled",
    "GroupQueryAttention",
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "disable",
    "dot_product_attention",
    "enable",
    "is_enabled",
]
