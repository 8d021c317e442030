"""Multi-head attention as a layer on NumPy arrays.

The projections are matrix products by NumPy's BLAS; the attention between them is
`fastattn.attention` on strided views of their results.  Weights come from arrays, from a PyTorch
state dict or from Keras weights; neither library is imported.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any, Literal, Self, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn._attention import attention, merge_attention
from fastattn._options import LayerOptions
from fastattn._results import check_out
from fastattn._validate import as_array, count, float_array

Array = NDArray[Any]


class _InputWeight:
    """A projection of an input as an attribute of the layer: a view of its columns in the array
    that holds its neighbours too.  What is assigned is copied there."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, layer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, layer: "MultiHeadAttention", owner: type) -> Array: ...
    def __get__(self, layer: "MultiHeadAttention | None", owner: type) -> Self | Array:
        if layer is None:
            return self
        array, columns = layer._places[self._name]
        return array[:, columns]

    def __set__(self, layer: "MultiHeadAttention", value: ArrayLike) -> None:
        held = self.__get__(layer, type(layer))
        weight = _weight(self._name, value, ndim=2)
        if weight.dtype != held.dtype:
            raise TypeError(
                f"`{self._name}` must have dtype {held.dtype} like the layer, got {weight.dtype}"
            )
        if weight.shape != held.shape:
            raise ValueError(f"`{self._name}` must have shape {held.shape}, got {weight.shape}")
        held[...] = weight


class MultiHeadAttention:
    """Multi-head attention with its projections: ``attention(q @ w_q, k @ w_k, v @ w_v) @ w_o``.

    The operands of the attention are ``q @ w_q + w_q_bias``, ``k @ w_k + w_k_bias`` and
    ``v @ w_v + w_v_bias``, each split into heads along its last axis.  The result is that of the
    heads, side by side, times ``w_o`` plus ``w_o_bias``.

    Parameters
    ----------
    w_q : array_like, (embed_dim, num_heads * head_dim)
        Projection of `q`; float32 or float64.  Every other weight has this dtype.
    w_k : array_like, (key_dim, num_kv_heads * head_dim)
        Projection of `k`.
    w_v : array_like, (value_dim, num_kv_heads * head_dim_v)
        Projection of `v`.
    w_o : array_like, (num_heads * head_dim_v, out_dim), optional
        Output projection.  None: the heads' results side by side are the result, and out_dim is
        ``num_heads * head_dim_v``.
    num_heads : int
        Heads of the queries.
    num_kv_heads : int, optional
        Heads of the keys and values, a divisor of `num_heads`.  Default: read from the shape of
        `w_k` (``num_heads`` where head_dim is 0).
    w_q_bias, w_k_bias, w_v_bias, w_o_bias : array_like, optional
        Biases of the four projections, one number for each of their columns.
    learned_k : array_like, (num_kv_heads * head_dim,), optional
        One more key, learned, that every query sees whatever the options say, with `learned_v` as
        its value.  `scale` and `softcap` apply to its score, no other option does.
    learned_v : array_like, (num_kv_heads * head_dim_v,), optional
        The value of that key.

    Raises
    ------
    TypeError
        A weight is not float32 or float64, or not of the dtype of `w_q`.
    ValueError
        The shapes of the weights do not fit each other or the numbers of heads.

    Notes
    -----
    The layer copies `w_q`, `w_k` and `w_v` side by side into an array of its own, so that one
    product computes the projections that share an input.  The attributes of these names are views
    of that array: what is written into them, or assigned to them in the same shape, counts from the
    next call on.  The layer keeps the other arrays that it is given, without copying or writing
    them.  It holds no other state: calls from several threads are safe.

    With ``num_kv_heads < num_heads`` consecutive query heads share a key head (grouped-query
    attention); keys and values are not repeated.

    PyTorch's ``add_zero_attn=True`` has no weights: a key and a value of zeros are what
    ``sinks=np.zeros(num_heads)`` adds.

    References
    ----------
    A. Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762,
    section 3.2.2.  Grouped heads: J. Ainslie et al., 2023, https://arxiv.org/abs/2305.13245.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> rng = np.random.default_rng(0)
    >>> w_q, w_k, w_v, w_o = rng.standard_normal((4, 8, 8), dtype=np.float32)
    >>> layer = fa.MultiHeadAttention(w_q, w_k, w_v, w_o, num_heads=2)
    >>> layer.head_dim
    4
    >>> x = rng.standard_normal((3, 5, 8), dtype=np.float32)
    >>> y = layer(x, causal=True, residual=True)
    >>> y.shape
    (3, 5, 8)
    >>> np.allclose(y, x + layer(x, causal=True), atol=1e-4)
    True
    """

    w_q, w_k, w_v = _InputWeight(), _InputWeight(), _InputWeight()

    def __init__(
        self,
        w_q: ArrayLike,
        w_k: ArrayLike,
        w_v: ArrayLike,
        w_o: ArrayLike | None = None,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        w_q_bias: ArrayLike | None = None,
        w_k_bias: ArrayLike | None = None,
        w_v_bias: ArrayLike | None = None,
        w_o_bias: ArrayLike | None = None,
        learned_k: ArrayLike | None = None,
        learned_v: ArrayLike | None = None,
    ) -> None:
        weights = {"w_q": _weight("w_q", w_q, ndim=2)}
        dtype = weights["w_q"].dtype
        weights["w_k"] = _weight("w_k", w_k, ndim=2, dtype=dtype)
        weights["w_v"] = _weight("w_v", w_v, ndim=2, dtype=dtype)
        self._places = _side_by_side(weights)
        self.w_o = None if w_o is None else _weight("w_o", w_o, ndim=2, dtype=dtype)

        self.num_heads = count("num_heads", num_heads)
        self.head_dim = _divide("w_q", self.w_q.shape[1], "num_heads", self.num_heads)
        if num_kv_heads is None:
            num_kv_heads = self._infer_num_kv_heads()
        self.num_kv_heads = count("num_kv_heads", num_kv_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"`num_kv_heads` must be a divisor of num_heads {self.num_heads}, "
                f"got {self.num_kv_heads}"
            )
        if self.w_k.shape[1] != self.num_kv_heads * self.head_dim:
            raise ValueError(
                f"`w_k` must have {self.num_kv_heads * self.head_dim} columns "
                f"(num_kv_heads {self.num_kv_heads} times head_dim {self.head_dim} of `w_q`), "
                f"got {self.w_k.shape[1]}"
            )
        self.head_dim_v = _divide("w_v", self.w_v.shape[1], "num_kv_heads", self.num_kv_heads)
        context_dim = self.num_heads * self.head_dim_v
        if self.w_o is not None and self.w_o.shape[0] != context_dim:
            raise ValueError(
                f"`w_o` must have {context_dim} rows (num_heads {self.num_heads} times head_dim_v "
                f"{self.head_dim_v}), got {self.w_o.shape[0]}"
            )
        self.embed_dim: int = self.w_q.shape[0]
        self.out_dim: int = context_dim if self.w_o is None else self.w_o.shape[1]

        self.w_q_bias = _bias("w_q_bias", w_q_bias, self.w_q.shape[1], dtype)
        self.w_k_bias = _bias("w_k_bias", w_k_bias, self.w_k.shape[1], dtype)
        self.w_v_bias = _bias("w_v_bias", w_v_bias, self.w_v.shape[1], dtype)
        if w_o_bias is not None and self.w_o is None:
            raise ValueError("`w_o_bias` must be None where `w_o` is None, got an array")
        self.w_o_bias = _bias("w_o_bias", w_o_bias, self.out_dim, dtype)
        if (learned_k is None) != (learned_v is None):
            given = "learned_v" if learned_k is None else "learned_k"
            raise ValueError(
                f"`learned_k` and `learned_v` must be given together, got only `{given}`"
            )
        self.learned_k = _bias("learned_k", learned_k, self.w_k.shape[1], dtype)
        self.learned_v = _bias("learned_v", learned_v, self.w_v.shape[1], dtype)

    def _infer_num_kv_heads(self) -> int:
        if self.head_dim == 0:
            return self.num_heads
        return _divide("w_k", self.w_k.shape[1], "head_dim", self.head_dim)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the weights, of every input and of the result."""
        return self.w_q.dtype

    def __repr__(self) -> str:
        names = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "head_dim_v", "out_dim")
        return f"MultiHeadAttention({', '.join(f'{n}={getattr(self, n)}' for n in names)})"

    @classmethod
    def from_torch_state_dict(
        cls, state_dict: Mapping[str, Any], num_heads: int, prefix: str = ""
    ) -> Self:
        """Build the layer from the state dict of a ``torch.nn.MultiheadAttention``.

        Parameters
        ----------
        state_dict : mapping of str to array_like
            NumPy arrays or torch tensors (which must be float32 or float64).  torch itself is not
            imported.  Keys: ``in_proj_weight``, or ``q_proj_weight``, ``k_proj_weight`` and
            ``v_proj_weight``; ``out_proj.weight``; and, where the module has them,
            ``in_proj_bias``, ``out_proj.bias``, ``bias_k`` and ``bias_v``.
        num_heads : int
            The module's ``num_heads``; a state dict does not hold it.
        prefix : str, optional
            Where the module lies in a larger model, for example ``"layers.0.self_attn"``.  Keys
            elsewhere are left alone.

        Returns
        -------
        MultiHeadAttention
            On inputs of shape (..., seqlen, embed_dim): the module with ``batch_first=True``.

        Raises
        ------
        TypeError
            A value is not float32 or float64.
        ValueError
            A key is missing, or one under `prefix` is unexpected; it is named.

        Notes
        -----
        PyTorch's masks are True where a key is left out; `mask` here is True where it takes part:
        pass ``mask=~attn_mask`` and ``mask=~key_padding_mask[:, None, None, :]``.  A float
        ``attn_mask`` is `bias`.  Dropout does not apply: the layer computes what the module does
        after ``eval()``.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> state_dict = {
        ...     "attn.in_proj_weight": np.ones((12, 4), np.float32),
        ...     "attn.out_proj.weight": np.eye(4, dtype=np.float32),
        ... }
        >>> layer = fa.MultiHeadAttention.from_torch_state_dict(state_dict, 2, prefix="attn")
        >>> layer(np.eye(4, dtype=np.float32)[:2])
        array([[1., 1., 1., 1.],
               [1., 1., 1., 1.]], dtype=float32)
        """
        if prefix and not prefix.endswith("."):
            prefix += "."
        weights = {
            name.removeprefix(prefix): _to_numpy(name, value)
            for name, value in state_dict.items()
            if name.startswith(prefix)
        }

        def take(name: str) -> Array:
            if name not in weights:
                raise ValueError(
                    f"`state_dict` must hold {prefix + name!r}, got keys {_listed(state_dict)}"
                )
            return weights.pop(name)

        def take_row(name: str) -> Array | None:
            return take(name).reshape(-1) if name in weights else None

        if "q_proj_weight" in weights:
            parts = [take(f"{letter}_proj_weight") for letter in "qkv"]
        else:
            parts = _thirds(prefix + "in_proj_weight", take("in_proj_weight"))
        w_q, w_k, w_v = (part.T for part in parts)
        in_bias = take_row("in_proj_bias")
        w_q_bias, w_k_bias, w_v_bias = (
            (None, None, None) if in_bias is None else _thirds(prefix + "in_proj_bias", in_bias)
        )
        w_o = take("out_proj.weight").T
        w_o_bias = take_row("out_proj.bias")
        learned_k = learned_v = None
        if "bias_k" in weights or "bias_v" in weights:
            learned_k, learned_v = (take(name).reshape(-1) for name in ("bias_k", "bias_v"))
        if weights:
            unexpected = _listed(prefix + name for name in weights)
            raise ValueError(
                "`state_dict` must hold the keys of one torch.nn.MultiheadAttention, "
                f"got also {unexpected}"
            )
        return cls(
            w_q, w_k, w_v, w_o, num_heads=num_heads, num_kv_heads=num_heads,
            w_q_bias=w_q_bias, w_k_bias=w_k_bias, w_v_bias=w_v_bias, w_o_bias=w_o_bias,
            learned_k=learned_k, learned_v=learned_v,
        )  # fmt: skip

    @classmethod
    def from_keras_weights(cls, weights: Sequence[Any] | Mapping[str, Any]) -> Self:
        """Build the layer from the weights of a Keras 3 attention layer.

        Parameters
        ----------
        weights : sequence or mapping of str to array_like
            Of a ``MultiHeadAttention`` or ``GroupQueryAttention``: the list that
            ``layer.get_weights()`` returns (kernel and bias, or kernel alone, of query, key, value
            and attention_output, in this order), or a mapping from their paths, as in
            ``{w.path: w for w in layer.weights}``; of a path the last two names count
            (``"query/kernel"``).  Kernels are (embed_dim, num_heads, head_dim) and, for
            attention_output, (num_heads, head_dim_v, out_dim); the numbers of heads are read from
            them.

        Returns
        -------
        MultiHeadAttention
            On inputs of shape (batch, seqlen, embed_dim): the Keras layer.

        Raises
        ------
        TypeError
            A value is not float32 or float64.
        ValueError
            A weight is missing, unexpected (it is named) or has another shape than these.

        Notes
        -----
        Keras calls its layer as ``layer(query, value, key)``, this one is called as
        ``layer(q, k, v)``.  Keras masks of shape (batch, seqlen_q, seqlen_k) are
        ``mask[:, None]`` here.  Dropout does not apply: the layer computes what the Keras layer
        computes with ``training=False``.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> kernel = np.ones((6, 3, 2), np.float32)
        >>> layer = fa.MultiHeadAttention.from_keras_weights(
        ...     [kernel, kernel, kernel, np.ones((3, 2, 6), np.float32)]
        ... )
        >>> layer.num_heads, layer.head_dim
        (3, 2)
        """
        named = weights if isinstance(weights, Mapping) else _keras_names(weights)
        arrays: dict[str, Array] = {}
        for path, value in named.items():
            name = "/".join(path.split("/")[-2:]).removesuffix(":0")
            if name not in _KERAS_NDIM:
                raise ValueError(
                    f"`weights` must hold only {_listed(_KERAS_NDIM)}, got also {path!r}"
                )
            if name in arrays:
                raise ValueError(f"`weights` must hold one layer, got a second {name} at {path!r}")
            array = arrays[name] = _to_numpy(path, value)
            if array.ndim != _KERAS_NDIM[name]:
                raise ValueError(
                    f"`{path}` must have {_KERAS_NDIM[name]} dimensions, got shape {array.shape}"
                )
        for layer in _KERAS_LAYERS:
            if f"{layer}/kernel" not in arrays:
                raise ValueError(f"`weights` must hold '{layer}/kernel', got {_listed(named)}")

        def kernel(layer: str) -> Array:
            array = arrays[f"{layer}/kernel"]
            return array.reshape(array.shape[0], array.shape[1] * array.shape[2])

        def bias(layer: str) -> Array | None:
            array = arrays.get(f"{layer}/bias")
            return None if array is None else array.reshape(-1)

        w_o = arrays["attention_output/kernel"]
        return cls(
            kernel("query"),
            kernel("key"),
            kernel("value"),
            w_o.reshape(w_o.shape[0] * w_o.shape[1], w_o.shape[2]),
            num_heads=arrays["query/kernel"].shape[1],
            num_kv_heads=arrays["key/kernel"].shape[1],
            w_q_bias=bias("query"),
            w_k_bias=bias("key"),
            w_v_bias=bias("value"),
            w_o_bias=bias("attention_output"),
        )

    @overload
    def __call__(
        self,
        q: ArrayLike,
        k: ArrayLike | None = ...,
        v: ArrayLike | None = ...,
        *,
        residual: bool | ArrayLike | None = ...,
        return_lse: Literal[False] = ...,
        **options: Unpack[LayerOptions],
    ) -> Array: ...
    @overload
    def __call__(
        self,
        q: ArrayLike,
        k: ArrayLike | None = ...,
        v: ArrayLike | None = ...,
        *,
        residual: bool | ArrayLike | None = ...,
        return_lse: Literal[True],
        **options: Unpack[LayerOptions],
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self,
        q: ArrayLike,
        k: ArrayLike | None = ...,
        v: ArrayLike | None = ...,
        *,
        residual: bool | ArrayLike | None = ...,
        return_lse: bool,
        **options: Unpack[LayerOptions],
    ) -> Array | tuple[Array, Array]: ...
    def __call__(
        self,
        q: ArrayLike,
        k: ArrayLike | None = None,
        v: ArrayLike | None = None,
        *,
        residual: bool | ArrayLike | None = None,
        return_lse: bool = False,
        out: Array | None = None,
        **options: Any,
    ) -> Array | tuple[Array, Array]:
        """Attention of `q` over `k` and `v`, projections included.

        Parameters
        ----------
        q : array_like, (..., seqlen_q, embed_dim)
            What queries are projected from, of the dtype of the weights, as are `k` and `v`.
        k : array_like, (..., seqlen_k, key_dim), optional
            What keys are projected from.  Default: `q` (self-attention).  Leading dimensions
            broadcast.
        v : array_like, (..., seqlen_k, value_dim), optional
            What values are projected from.  Default: `k`.
        residual : bool or array_like, (..., seqlen_q, out_dim), optional
            What to add to the result; True: `q` itself.  See the notes for where it is added.
        return_lse : bool, optional
            Whether to return the log-sum-exp of the scores too.
        out : ndarray, (..., seqlen_q, out_dim), optional
            Where to write the result, in the dtype of the weights.  It may overlap the inputs; with
            the residual it may be the very same array.
        **options
            Every other option of `fastattn.attention`, with its meaning and shape there: `causal`,
            `window`, `mask`, `kv_lengths`, `bias`, `num_threads` and so on.  Padding at the end of
            the keys is ``kv_lengths=lengths``; any other padding ``mask=keep[:, None, None, :]``.

        Returns
        -------
        out : ndarray, (..., seqlen_q, out_dim)
            In the dtype of the weights.
        lse : ndarray, (..., num_heads, seqlen_q)
            Only with ``return_lse=True``.

        Raises
        ------
        TypeError
            A wrong dtype, or an option that does not exist.
        ValueError
            A wrong shape or value.

        Notes
        -----
        Without `w_o` and `learned_k` the kernel itself adds the residual as it writes each block of
        the result, without a further pass over memory.  With `w_o` the residual belongs behind the
        output projection, which is NumPy's: it is added in place to the projection's result.  With
        `learned_k` alone it is added in place too.

        `num_threads` governs the attention; the projections run on the threads of NumPy's BLAS.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> eye = np.eye(2)
        >>> layer = fa.MultiHeadAttention(eye, eye, eye, num_heads=1)
        >>> memory = np.array([[0.0, 0.0], [0.0, 2.0]])
        >>> layer(np.zeros((1, 2)), memory)
        array([[0., 1.]])
        >>> layer(np.zeros((1, 2)), memory, kv_lengths=1, residual=np.ones((1, 2)))
        array([[1., 1.]])
        """
        if k is None and v is not None:
            raise ValueError("`v` must come with `k`, got `v` alone")
        q, k, v = self._inputs(q, k, v)
        if v.shape[-2] != k.shape[-2]:
            raise ValueError(f"`v` must have seqlen_k {k.shape[-2]} like `k`, got {v.shape[-2]}")
        try:
            batch_shape = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        except ValueError:
            raise ValueError(
                "`q`, `k` and `v` must have leading dimensions that broadcast, got "
                f"shapes {q.shape}, {k.shape} and {v.shape}"
            ) from None
        rows_shape = (*batch_shape, q.shape[-2])
        shape = (*rows_shape, self.out_dim)
        given_out = out
        if out is not None:
            out = check_out(out, shape, self.dtype, "w_q")
        added = self._residual(residual, q, shape)

        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q_heads, k_heads, v_heads = map(_split_heads, self._project_inputs((q, k, v)), heads)

        fused = self.w_o is None and self.learned_k is None
        context = out if out is not None and fused else None
        if context is None:
            context = np.empty((*rows_shape, self.num_heads * self.head_dim_v), self.dtype)
        options["out"] = _split_heads(context, self.num_heads)
        if fused and added is not None:
            options["residual"] = _split_heads(added, self.num_heads)
        if self.learned_k is None:
            attended = self.attend(q_heads, k_heads, v_heads, return_lse=return_lse, **options)
            lse = attended[1] if return_lse else None
        else:
            lse = self._attend_with_learned_key(q_heads, k_heads, v_heads, options)

        if fused:
            result = context
        else:
            result = self._finish(context, added, out)
        if given_out is not None:
            result = given_out
        if return_lse:
            assert lse is not None
            return result, lse
        return result

    def attend(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        """The attention between the projections: `fastattn.attention`.

        A subclass may compute it in another way, for example to compare.

        Parameters
        ----------
        q, k, v : ndarray, (..., num_heads or num_kv_heads, seqlen, head_dim or head_dim_v)
            Strided views of the projected inputs.
        **options
            Of `fastattn.attention`, always with `out`, where the result must be written.

        Returns
        -------
        ndarray or tuple of ndarray
            What `fastattn.attention` returns.

        Examples
        --------
        >>> import fastattn as fa
        >>> class Causal(fa.MultiHeadAttention):
        ...     def attend(self, q, k, v, **options):
        ...         return super().attend(q, k, v, causal=True, **options)
        """
        return attention(q, k, v, **options)

    def _attend_with_learned_key(
        self, q: Array, k: Array, v: Array, options: dict[str, Any]
    ) -> Array:
        """Attention over the keys and `learned_k`, written to ``options["out"]``; returns the lse.

        The learned key is a part of its own, merged in exactly by log-sum-exp, so that no mask,
        bias or window needs a column for it and k and v are not copied to make room.  The sinks go
        with this part, which never lacks a key.
        """
        softmax_axis = options.pop("softmax_axis", "keys")
        if softmax_axis != "keys":
            raise ValueError(
                "`softmax_axis` must be 'keys' in a layer with learned_k and learned_v, "
                f"got {softmax_axis!r}"
            )
        assert self.learned_k is not None and self.learned_v is not None
        learned_k = self.learned_k.reshape(self.num_kv_heads, 1, self.head_dim)
        learned_v = self.learned_v.reshape(self.num_kv_heads, 1, self.head_dim_v)
        shared = {name: options[name] for name in _LEARNED_KEY_OPTIONS if name in options}
        sinks = options.pop("sinks", None)
        out = options["out"]
        outs = [out, np.empty((*q.shape[:-1], self.head_dim_v), self.dtype)]
        lses = [
            self.attend(q, k, v, return_lse=True, **options)[1],
            self.attend(
                q, learned_k, learned_v, sinks=sinks, return_lse=True, out=outs[1], **shared
            )[1],
        ]
        merged, lse = merge_attention(
            [np.broadcast_to(part, out.shape) for part in outs],
            [np.broadcast_to(part, out.shape[:-1]) for part in lses],
        )
        out[...] = merged
        return lse

    def _project_inputs(self, inputs: tuple[Array, Array, Array]) -> list[Array]:
        """The projections of q, k and v, (..., seqlen, columns); neighbours whose input is the same
        array by one product, of which they are views."""
        projected = []
        for _, run in groupby(zip(self._places, inputs, strict=True), lambda pair: id(pair[1])):
            names, (x, *_) = zip(*run, strict=True)
            array, first = self._places[names[0]]
            last = self._places[names[-1]][1]
            product = _project(x, array[:, first.start : last.stop])
            for name in names:
                columns = self._places[name][1]
                part = product[..., columns.start - first.start : columns.stop - first.start]
                bias = getattr(self, f"{name}_bias")
                if bias is not None:
                    part += bias
                projected.append(part)
        return projected

    def _finish(self, context: Array, added: Array | None, out: Array | None) -> Array:
        """Output projection, its bias and the residual."""
        # The projection may be written straight to `out` unless that destroys the residual first.
        target = out
        if out is not None and added is not None and np.may_share_memory(out, added):
            target = None
        if self.w_o is None:
            result = context
        else:
            result = _project(context, self.w_o, target)
            if self.w_o_bias is not None:
                result += self.w_o_bias
        if added is not None:
            result = np.add(result, added, out=result if out is None else out)
        elif out is not None and result is not out:
            out[...] = result
            result = out
        return result

    def _inputs(
        self, q: ArrayLike, k: ArrayLike | None, v: ArrayLike | None
    ) -> tuple[Array, Array, Array]:
        """The inputs as arrays; an input given twice is one array."""
        given_k = q if k is None else k
        given_v = given_k if v is None else v
        q_array = as_array("q", q)
        k_array = q_array if given_k is q else as_array("k", given_k)
        v_array = k_array if given_v is given_k else as_array("v", given_v)
        arrays = (q_array, k_array, v_array)
        for name, array, (held, _) in zip("qkv", arrays, self._places.values(), strict=True):
            if array.dtype != held.dtype:
                raise TypeError(
                    f"`{name}` must have dtype {held.dtype} like the weights, got {array.dtype}"
                )
            if array.ndim < 2 or array.shape[-1] != held.shape[0]:
                raise ValueError(
                    f"`{name}` must have shape (..., seqlen, {held.shape[0]}), got {array.shape}"
                )
        return arrays

    def _residual(
        self, residual: bool | ArrayLike | None, q: Array, shape: tuple[int, ...]
    ) -> Array | None:
        if residual is None or residual is False:
            return None
        if residual is True:
            if self.out_dim != self.embed_dim:
                raise ValueError(
                    f"`residual` must be an array where out_dim {self.out_dim} is not embed_dim "
                    f"{self.embed_dim}, got True"
                )
            return np.broadcast_to(q, shape) if q.shape != shape else q
        array = as_array("residual", residual)
        if array.dtype != self.dtype:
            raise TypeError(
                f"`residual` must have dtype {self.dtype} like the weights, got {array.dtype}"
            )
        if array.shape != shape:
            raise ValueError(f"`residual` must have the result's shape {shape}, got {array.shape}")
        return array


# The options that the learned key shares with the others; `sinks` are counted with it.
_LEARNED_KEY_OPTIONS = ("scale", "softcap", "num_threads")

_KERAS_LAYERS = ("query", "key", "value", "attention_output")
_KERAS_NDIM = {
    **{f"{layer}/kernel": 3 for layer in _KERAS_LAYERS},
    **{f"{layer}/bias": 2 for layer in _KERAS_LAYERS[:3]},
    "attention_output/bias": 1,
}


def _keras_names(weights: Sequence[Any]) -> dict[str, Any]:
    kinds = {8: ("kernel", "bias"), 4: ("kernel",)}.get(len(weights))
    if kinds is None:
        raise ValueError(
            "`weights` must hold 8 arrays (kernel and bias of query, key, value and "
            f"attention_output) or 4 (kernels alone), got {len(weights)}"
        )
    names = [f"{layer}/{kind}" for layer in _KERAS_LAYERS for kind in kinds]
    return dict(zip(names, weights, strict=True))


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _thirds(name: str, array: Array) -> list[Array]:
    if array.shape[0] % 3:
        raise ValueError(f"`{name}` must have a multiple of 3 rows, got shape {array.shape}")
    return np.split(array, 3)


def _to_numpy(name: str, value: Any) -> Array:
    """A NumPy array of an array, a torch tensor or a Keras variable, without their libraries."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) not in ("torch.float32", "torch.float64"):
            raise TypeError(f"`{name}` must be float32 or float64, got {value.dtype}")
    return _weight(name, value)


def _weight(
    name: str, value: ArrayLike, ndim: int | None = None, dtype: np.dtype[Any] | None = None
) -> Array:
    array = float_array(name, value, ("float32", "float64"))
    if dtype is not None and array.dtype != dtype:
        raise TypeError(f"`{name}` must have dtype {dtype} like `w_q`, got {array.dtype}")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"`{name}` must have {ndim} dimensions, got shape {array.shape}")
    return array


def _bias(name: str, value: ArrayLike | None, features: int, dtype: np.dtype[Any]) -> Array | None:
    if value is None:
        return None
    array = _weight(name, value, dtype=dtype)
    if array.shape != (features,):
        raise ValueError(f"`{name}` must have shape ({features},), got {array.shape}")
    return array


def _divide(name: str, columns: int, divisor_name: str, divisor: int) -> int:
    if columns % divisor:
        raise ValueError(
            f"`{name}` must have a multiple of {divisor_name} {divisor} columns, got {columns}"
        )
    return columns // divisor


def _side_by_side(weights: dict[str, Array]) -> dict[str, tuple[Array, slice]]:
    """Copies, each as an array and the columns in it: neighbours of as many rows share an array.

    The array is in C order, so that a product of a few rows reads it from beginning to end.
    """
    places: dict[str, tuple[Array, slice]] = {}
    for rows, run in groupby(weights.items(), lambda item: item[1].shape[0]):
        names, parts = zip(*run, strict=True)
        ends = list(accumulate(part.shape[1] for part in parts))
        array = np.empty((rows, ends[-1]), parts[0].dtype)
        np.concatenate(parts, axis=1, out=array)
        places |= {
            name: (array, slice(end - part.shape[1], end))
            for name, part, end in zip(names, parts, ends, strict=True)
        }
    return places


def _project(x: Array, w: Array, out: Array | None = None) -> Array:
    """``x @ w`` as one matrix product over all rows, with the same bits wherever it goes; the
    result is C-contiguous or `out`."""
    rows, shape = math.prod(x.shape[:-1]), (*x.shape[:-1], w.shape[1])
    in_place = out is not None and out.flags.c_contiguous
    place = out.reshape(rows, w.shape[1]) if out is not None and in_place else None
    product: Array = np.matmul(x.reshape(rows, x.shape[-1]), w, out=place)
    if out is None:
        return product.reshape(shape)
    if not in_place:
        out[...] = product.reshape(shape)
    return out


def _split_heads(x: Array, num_heads: int) -> Array:
    """(..., seqlen, num_heads * head_dim) as (..., num_heads, seqlen, head_dim), a view."""
    head_dim = x.shape[-1] // num_heads
    return x.reshape(*x.shape[:-1], num_heads, head_dim).swapaxes(-3, -2)
