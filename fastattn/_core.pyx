# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: freethreading_compatible=True
"""The one door to C: arrays to pointers and strides, one call without the GIL, status to exception.

A `Problem` arrives validated, broadcast and allocated.  Arrays are read through the
buffer protocol, so that neither NumPy's headers nor its ABI are needed.

Another thread may have given an array another shape since it was validated.  So each array's shape
and strides are read here once, from the buffer that is held during the call, and compared with the
sizes that the call was planned for.
"""
import os
from _thread import allocate_lock, get_ident

from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_SIMPLE,
    PyBUF_STRIDED,
    PyBUF_STRIDES,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t
from libc.string cimport memset

from fastattn._csrc cimport *


cdef extern from *:
    const char *FA_BUILD_COMPILER
    const char *FA_BUILD_FLAGS
    const char *FA_BUILD_SWITCHES


# Arrays of one call: q k v out lse residual bias alibi_slopes sinks mask kv_lengths q_offset, two
# of segment ids, two scales, page_table, the starts of packed sequences, weighing and exact; and of
# its gradients: grad_out grad_lse grad_q grad_k grad_v grad_bias sink_terms; of weights: rows,
# places, heads and weights.
cdef enum:
    MAX_VIEWS = 28


cdef struct views:
    Py_buffer view[MAX_VIEWS]
    int count


cdef Py_buffer *acquire(views *held, object array, int flags) except NULL:
    if held.count == MAX_VIEWS:
        raise SystemError("a call has more arrays than MAX_VIEWS")
    cdef Py_buffer *view = &held.view[held.count]
    PyObject_GetBuffer(array, view, flags)
    held.count += 1
    return view


cdef void release(views *held) noexcept:
    for i in range(held.count):
        PyBuffer_Release(&held.view[i])


cdef struct axes:
    # The shape that an operand must have; -1 for an axis that it lacks.
    const int64_t *batch
    int64_t batch_ndim, head, row, col


cdef int refuse(const char *name, object found) except -1:
    raise ValueError(
        f"`{(<bytes>name).decode()}` must keep its shape and dtype during the call, "
        f"but has {found} now"
    )


cdef inline int64_t next_stride(
    const char *name, const Py_buffer *view, int *axis, int64_t size
) except? -1:
    if view.shape[axis[0]] != size:
        refuse(name, f"shape {tuple([view.shape[i] for i in range(view.ndim)])}")
    axis[0] += 1
    return view.strides[axis[0] - 1]


cdef Py_buffer *read_array(
    fa_array *to, views *held, const char *name, object array, const axes *has, int64_t itemsize,
    int flags,
) except NULL:
    """Point `to` at an array with the axes (batch..., head, row, col) of `has`, and no others.

    `itemsize` 0 leaves the element's size to the caller.
    """
    cdef Py_buffer *view = acquire(held, array, flags)
    cdef int axis = 0
    if view.ndim != has.batch_ndim + (has.head >= 0) + (has.row >= 0) + (has.col >= 0):
        refuse(name, f"{view.ndim} dimensions")
    if itemsize != 0 and view.itemsize != itemsize:
        refuse(name, f"elements of {view.itemsize} bytes")
    to.data = view.buf
    for i in range(has.batch_ndim):
        to.batch[i] = next_stride(name, view, &axis, has.batch[i])
    to.head = 0 if has.head < 0 else next_stride(name, view, &axis, has.head)
    to.row = 0 if has.row < 0 else next_stride(name, view, &axis, has.row)
    to.col = 0 if has.col < 0 else next_stride(name, view, &axis, has.col)
    return view


cdef int read_input(
    fa_array *to, views *held, const char *name, object array, const axes *has, int64_t itemsize
) except -1:
    if array is not None:
        read_array(to, held, name, array, has, itemsize, PyBUF_STRIDES)
    return 0


cdef int read_typed(
    fa_array *to, fa_dtype *dtype, views *held, const char *name, object array, const axes *has
) except -1:
    """Like `read_input`, of an array whose dtype is its own."""
    cdef Py_buffer *view = read_array(
        to, held, name, array, has, 0, PyBUF_STRIDES | PyBUF_FORMAT
    )
    # What is not aligned has a byte order before its type: "=e".
    cdef char letter = view.format[1] if view.format[0] == b"=" else view.format[0]
    if letter == b"f":
        dtype[0] = FA_F32
    elif letter == b"d":
        dtype[0] = FA_F64
    elif letter == b"e":
        dtype[0] = FA_F16
    elif letter == b"H":  # bfloat16, which the buffer protocol does not know
        dtype[0] = FA_BF16
    elif letter == b"b":
        dtype[0] = FA_I8
    else:
        refuse(name, f"elements of format {(<bytes>view.format).decode()!r}")
    return 0


cdef int read_output(
    fa_array *to, views *held, const char *name, object array, const axes *has, int64_t itemsize
) except -1:
    if array is not None:
        read_array(to, held, name, array, has, itemsize, PyBUF_STRIDED)
    return 0


cdef const int64_t *read_starts(
    views *held, const char *name, object array, int64_t count, int64_t total
) except NULL:
    """Where each of `count` packed sequences begins, a private copy that _problem.py checked."""
    cdef Py_buffer *view = acquire(held, array, PyBUF_SIMPLE)
    cdef const int64_t *starts = <const int64_t *>view.buf
    if view.len != (count + 1) * <int64_t>sizeof(int64_t) or starts[count] != total:
        refuse(name, f"{view.len} bytes")
    return starts


cdef class Problem:
    """What one call computes: its operands, sizes and options, as csrc/fastattn.h describes them.

    A front end of _problem.py makes one, _options.py adds what the caller chose, _results.py where
    results go.  An array that is not given is None.

    Arrays of the core have the axes (batch..., heads, rows, columns).  A caller's have no head axis
    where q, k and v are all 2-D, and heads second where sequences are packed.
    """
    # What the caller's arrays are: the dtype of q, q itself, which results lie in memory like, and
    # whether q, k and v are all 2-D.
    cdef public object dtype, like
    cdef public bint single_head
    # Whether an array of `out_shape` has the core's axes and element types as it is.
    cdef public bint is_plain
    cdef public str isa
    cdef public object q, k, v, k_scale, v_scale, page_table, q_starts, k_starts
    cdef public tuple q_shape
    cdef public int64_t num_kv_heads, seqlen_k, head_dim_v
    cdef public object out, lse, residual, weighing, exact
    cdef public double scale, softcap
    cdef public object bias, alibi_slopes, sinks
    cdef public object mask, kv_lengths, q_offset, q_segment_ids, k_segment_ids
    cdef public bint causal, softmax_over_queries
    cdef public int64_t window_left, window_right
    cdef public double dropout_p
    cdef public object dropout_seed
    cdef public int num_threads

    def __cinit__(
        self, str isa, q, k, v, tuple q_shape, int64_t num_kv_heads, int64_t seqlen_k,
        int64_t head_dim_v, like, bint single_head,
    ):
        self.like, self.dtype, self.single_head = like, like.dtype, single_head
        self.isa = isa
        self.q, self.k, self.v = q, k, v
        self.q_shape = q_shape
        self.num_kv_heads = num_kv_heads
        self.seqlen_k = seqlen_k
        self.head_dim_v = head_dim_v
        self.scale = fa_default_scale(q_shape[len(q_shape) - 1])
        self.window_left = self.window_right = -1

    @property
    def num_heads(self):
        return self.q_shape[len(self.q_shape) - 3]

    @property
    def seqlen_q(self):
        return self.q_shape[len(self.q_shape) - 2]

    @property
    def batch_shape(self):
        return self.q_shape[: len(self.q_shape) - 3]

    @property
    def entries(self):
        """The shape of what each sequence has one of."""
        return self.batch_shape if self.q_starts is None else (len(self.q_starts) - 1,)

    @property
    def out_shape(self):
        """The caller's shape of the result."""
        cdef Py_ssize_t n = len(self.q_shape)
        if self.single_head:
            return self.q_shape[n - 2], self.head_dim_v
        if self.q_starts is not None:
            return self.q_shape[1], self.q_shape[0], self.head_dim_v
        if self.q_shape[n - 1] == self.head_dim_v:
            return self.q_shape
        return *self.q_shape[: n - 1], self.head_dim_v

    @property
    def lse_shape(self):
        """The caller's shape of lse."""
        rows = self.seqlen_k if self.softmax_over_queries else self.seqlen_q
        return (rows,) if self.single_head else (*self.q_shape[: len(self.q_shape) - 2], rows)

    def as_in_core(self, array):
        """A view of an array of `out_shape`, or of more axes, with the core's axes."""
        if self.q_starts is not None:
            return array.swapaxes(0, 1)
        return array[None] if self.single_head else array

    def with_heads(self, array):
        """A view of an array of `lse_shape`, or of that and more axes, with the core's axes."""
        return array[None] if self.single_head else array


def plain_problem(str isa, q, k, v, type array, tuple dtypes):
    """The problem of arrays that can go to C as they are, with nothing to convert or to broadcast;
    else None.

    They are the caller's own arrays, of the class `array` and one of `dtypes`, whose shapes are
    compared with these again while their buffers are held.
    """
    cdef tuple q_shape, k_shape, v_shape
    cdef Py_ssize_t n
    cdef Problem problem
    if not (type(q) is array and type(k) is array and type(v) is array):
        return None
    dtype = q.dtype
    for known in dtypes:
        if dtype is known:
            break
    else:
        return None
    if k.dtype is not dtype or v.dtype is not dtype:
        return None
    # Whole shapes first: comparing those is quicker than taking them apart.
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    n = len(q_shape)
    if n < 3 or len(k_shape) != n or (
        v_shape != k_shape and v_shape[: len(v_shape) - 1] != k_shape[: n - 1]
    ):
        return None
    if q_shape != k_shape and (
        q_shape[: n - 3] != k_shape[: n - 3]
        or q_shape[n - 1] != k_shape[n - 1]
        or (
            q_shape[n - 3] != k_shape[n - 3]
            and (k_shape[n - 3] == 0 or q_shape[n - 3] % k_shape[n - 3] != 0)
        )
    ):
        return None
    problem = Problem(
        isa, q, k, v, q_shape, v_shape[n - 3], v_shape[n - 2], v_shape[n - 1], q, False
    )
    problem.is_plain = True
    return problem


cdef int fill(fa_attention_params *p, views *held, Problem problem) except -1:
    """All of a problem but its results."""
    cdef int64_t nb, itemsize, num_pages, table_pages
    cdef axes rows, keys, has
    cdef const int64_t *batch = p.batch_shape
    cdef fa_dtype v_dtype
    memset(p, 0, sizeof(fa_attention_params))
    held.count = 0

    nb = len(problem.q_shape) - 3
    p.batch_ndim = nb
    for i in range(nb):
        p.batch_shape[i] = problem.q_shape[i]
    p.num_heads = problem.q_shape[nb]
    p.seqlen_q = problem.q_shape[nb + 1]
    p.head_dim = problem.q_shape[nb + 2]
    p.num_kv_heads = problem.num_kv_heads
    p.seqlen_k = problem.seqlen_k
    p.head_dim_v = problem.head_dim_v
    rows = axes(batch, nb, p.num_heads, p.seqlen_q, p.head_dim)
    read_typed(&p.q, &p.dtype, held, b"q", problem.q, &rows)
    itemsize = fa_dtype_size(p.dtype)

    keys = axes(batch, nb, p.num_kv_heads, p.seqlen_k, p.head_dim)
    if problem.page_table is not None:
        # Pages stand where the batch axis would.  A cache's storage keeps its shape.
        num_pages, _, p.page_size, _ = problem.k.shape
        keys = axes(&num_pages, 1, p.num_kv_heads, p.page_size, p.head_dim)
    read_typed(&p.k, &p.kv_dtype, held, b"k", problem.k, &keys)
    keys.col = p.head_dim_v
    read_typed(&p.v, &v_dtype, held, b"v", problem.v, &keys)
    keys.col = -1
    read_input(&p.k_scale, held, b"k", problem.k_scale, &keys, 4)
    read_input(&p.v_scale, held, b"v", problem.v_scale, &keys, 4)
    if v_dtype != p.kv_dtype:
        refuse(b"v", "another dtype than `k`")
    if (p.kv_dtype == FA_F64) != (p.dtype == FA_F64) or (p.kv_dtype == FA_I8) != (
        problem.k_scale is not None and problem.v_scale is not None
    ):
        refuse(b"k", "another dtype than `q`")

    rows.col = p.head_dim_v
    read_input(&p.residual, held, b"residual", problem.residual, &rows, itemsize)
    p.scale = problem.scale
    p.softcap = problem.softcap
    has = axes(batch, nb, p.num_heads, p.seqlen_q, p.seqlen_k)
    if problem.bias is not None:
        read_typed(&p.bias, &p.bias_dtype, held, b"bias", problem.bias, &has)
    read_input(&p.mask, held, b"mask", problem.mask, &has, 1)
    has = axes(batch, nb, p.num_heads, -1, -1)
    read_input(&p.alibi_slopes, held, b"alibi_slopes", problem.alibi_slopes, &has, 8)
    has.batch_ndim = 0
    read_input(&p.sinks, held, b"sinks", problem.sinks, &has, 8)
    has = axes(batch, nb, -1, p.seqlen_q, -1)
    read_input(&p.q_segment_ids, held, b"segment_ids", problem.q_segment_ids, &has, 8)
    has.row = p.seqlen_k
    read_input(&p.k_segment_ids, held, b"segment_ids", problem.k_segment_ids, &has, 8)
    has.row = -1
    read_input(&p.kv_lengths, held, b"kv_lengths", problem.kv_lengths, &has, 8)
    if problem.page_table is not None:
        table_pages = problem.page_table.shape[nb]
        has.row = table_pages
        read_input(&p.page_table, held, b"page_table", problem.page_table, &has, 8)
        if table_pages * p.page_size < p.seqlen_k:
            refuse(b"page_table", f"{table_pages} pages of {p.page_size} keys")
        has.row = -1
    if problem.q_starts is not None:
        # Packed sequences have no batch axis, but a position each.
        p.batch_ndim = has.batch_ndim = 1
        p.batch_shape[0] = len(problem.q_starts) - 1
        p.q_starts = read_starts(
            held, b"cu_seqlens_q", problem.q_starts, p.batch_shape[0], p.seqlen_q
        )
        p.k_starts = read_starts(
            held, b"cu_seqlens_k", problem.k_starts, p.batch_shape[0], p.seqlen_k
        )
    read_input(&p.q_offset, held, b"q_offset", problem.q_offset, &has, 8)
    p.causal = problem.causal
    p.window_left = problem.window_left
    p.window_right = problem.window_right
    p.softmax_axis = FA_SOFTMAX_QUERIES if problem.softmax_over_queries else FA_SOFTMAX_KEYS
    p.num_threads = problem.num_threads
    p.dropout_p = problem.dropout_p
    if problem.dropout_seed is not None:
        p.dropout_seed = problem.dropout_seed
    return 0


cdef axes result_axes(fa_attention_params *p, int64_t row, int64_t col) noexcept:
    """The axes of arrays that have a row for each row of `out`, or of `lse`."""
    # Packed sequences have no batch axis.
    cdef int64_t nb = p.batch_ndim if p.q_starts is NULL else 0
    cdef const int64_t *batch = p.batch_shape
    return axes(batch, nb, p.num_heads, row, col)


cdef int64_t lse_rows(fa_attention_params *p) noexcept:
    return p.seqlen_k if p.softmax_axis == FA_SOFTMAX_QUERIES else p.seqlen_q


cdef int64_t lse_size(fa_attention_params *p) noexcept:
    return 8 if p.dtype == FA_F64 else 4


cdef int fill_results(fa_attention_params *p, views *held, Problem problem) except -1:
    """Where the results go of a problem that `fill` has read."""
    cdef axes has = result_axes(p, p.seqlen_q, p.head_dim_v)
    read_output(&p.out, held, b"out", problem.out, &has, fa_dtype_size(p.dtype))
    read_output(&p.exact, held, b"exact", problem.exact, &has, lse_size(p))
    has = result_axes(p, lse_rows(p), -1)
    read_output(&p.lse, held, b"lse", problem.lse, &has, lse_size(p))
    has.col = 2
    read_output(&p.weighing, held, b"weighing", problem.weighing, &has, lse_size(p))
    return 0


cdef int poll_signals(void *raised) noexcept with gil:
    """Run pending signal handlers; keep what one raises for the caller to raise."""
    try:
        PyErr_CheckSignals()
    except BaseException as error:
        (<list>raised).append(error)
        return 1
    return 0


cdef int check(fa_status status, list raised) except -1:
    if status == FA_OK:
        return 0
    if status == FA_NO_MEMORY:
        raise MemoryError("not enough memory for the workspace of attention")
    if status == FA_INTERRUPTED:
        raise raised[0]
    if status == FA_FORKED:
        raise RuntimeError(
            "the process was forked by a signal handler during this call of attention; the threads "
            "that computed a part of it are the parent's, so in the child it cannot be finished"
        )
    raise OverflowError("the problem is too large: its sizes do not fit in 64 bits")


# The kernel sets that run here, best first, asked for once: CPUID is slow, and slower in a virtual
# machine, where it traps.
cdef enum:
    MAX_KERNEL_SETS = 8
cdef const fa_kernels *kernel_sets[MAX_KERNEL_SETS]
_index_of_isa = {}
for _index in range(MAX_KERNEL_SETS):
    kernel_sets[_index] = fa_kernels_available(_index)
    if kernel_sets[_index] is NULL:
        break
    _index_of_isa[fa_kernels_name(kernel_sets[_index]).decode()] = _index


cdef bint requested[MAX_KERNEL_SETS]


cdef int find_index(str isa) except -1:
    if isa not in _index_of_isa:
        raise ValueError(f"kernel set {isa!r} cannot run here")
    return _index_of_isa[isa]


cdef const fa_kernels *find_kernels(str isa) except NULL:
    cdef int index = find_index(isa)
    if not requested[index]:
        if not fa_kernels_request(kernel_sets[index]):
            raise ValueError(f"the operating system refuses what kernel set {isa!r} needs")
        requested[index] = True
    return kernel_sets[index]


def attention(Problem problem):
    cdef fa_attention_params params
    cdef views held
    cdef fa_status status
    cdef const fa_kernels *kernels = find_kernels(problem.isa)
    cdef list raised = []
    try:
        fill(&params, &held, problem)
        fill_results(&params, &held, problem)
        params.poll = poll_signals
        params.poll_arg = <void *>raised
        with nogil:
            status = fa_attention(&params, kernels)
    finally:
        release(&held)
    check(status, raised)


def attention_backward(
    Problem problem, grad_out, grad_lse=None, grad_q=None, grad_k=None, grad_v=None,
    grad_bias=None, sink_terms=None,
):
    """Gradients of a problem whose `out`, `lse`, `weighing` and `exact` its forward pass made."""
    cdef fa_backward_params params
    cdef fa_attention_params *p = &params.attention
    cdef views held
    cdef fa_status status
    cdef int64_t itemsize
    cdef axes has
    cdef const fa_kernels *kernels = find_kernels(problem.isa)
    cdef list raised = []
    memset(&params, 0, sizeof(params))
    try:
        fill(p, &held, problem)
        itemsize = fa_dtype_size(p.dtype)
        has = result_axes(p, p.seqlen_q, p.head_dim_v)
        read_input(&params.out, &held, b"out", problem.out, &has, itemsize)
        read_input(&params.grad_out, &held, b"grad_out", grad_out, &has, itemsize)
        read_input(&params.exact, &held, b"exact", problem.exact, &has, lse_size(p))
        has = result_axes(p, lse_rows(p), -1)
        read_input(&params.lse, &held, b"lse", problem.lse, &has, lse_size(p))
        read_input(&params.grad_lse, &held, b"grad_lse", grad_lse, &has, lse_size(p))
        read_output(&params.sink_terms, &held, b"sink_terms", sink_terms, &has, 8)
        has.col = 2
        read_input(&params.weighing, &held, b"weighing", problem.weighing, &has, lse_size(p))
        params.grad_dtype = p.dtype
        for array in (grad_q, grad_k, grad_v):
            if array is not None and array.itemsize == 4:
                params.grad_dtype = FA_F32
        itemsize = fa_dtype_size(params.grad_dtype)
        has = result_axes(p, p.seqlen_q, p.head_dim)
        read_output(&params.grad_q, &held, b"q", grad_q, &has, itemsize)
        has.head, has.row = p.num_kv_heads, p.seqlen_k
        read_output(&params.grad_k, &held, b"k", grad_k, &has, itemsize)
        has.col = p.head_dim_v
        read_output(&params.grad_v, &held, b"v", grad_v, &has, itemsize)
        has = result_axes(p, p.seqlen_q, p.seqlen_k)
        itemsize = lse_size(p)
        if grad_bias is not None and grad_bias.itemsize == 8:
            itemsize = 8
        params.grad_bias_dtype = FA_F64 if itemsize == 8 else FA_F32
        read_output(&params.grad_bias, &held, b"bias", grad_bias, &has, itemsize)
        p.poll = poll_signals
        p.poll_arg = <void *>raised
        with nogil:
            status = fa_attention_backward(&params, kernels)
    finally:
        release(&held)
    check(status, raised)


cdef const int64_t *read_indices(
    views *held, object array, int64_t *count, int64_t all_of_them
) except? NULL:
    """Private copies that _weights.py checked; None is all."""
    cdef Py_buffer *view
    count[0] = all_of_them
    if array is None:
        return NULL
    view = acquire(held, array, PyBUF_SIMPLE)
    count[0] = view.len // <int64_t>sizeof(int64_t)
    return <const int64_t *>view.buf


def attention_weights(
    Problem problem, weights, rows=None, places=None, heads=None, pool=None, bint sums=False
):
    cdef fa_weights_params params
    cdef fa_attention_params *p = &params.attention
    cdef views held
    cdef fa_status status
    cdef int64_t count
    cdef const fa_kernels *kernels = find_kernels(problem.isa)
    cdef list raised = []
    memset(&params, 0, sizeof(params))
    try:
        fill(p, &held, problem)
        params.rows = read_indices(&held, rows, &params.num_rows, p.seqlen_q)
        params.places = read_indices(&held, places, &count, 0)
        params.heads = read_indices(&held, heads, &params.num_heads, p.num_heads)
        params.form = FA_WEIGHTS_SUMS if sums else FA_WEIGHTS_EACH
        if pool is not None:
            params.form = FA_WEIGHTS_MEANS
            params.pool_rows, params.pool_cols = pool
        params.weights = acquire(&held, weights, PyBUF_WRITABLE).buf
        p.poll = poll_signals
        p.poll_arg = <void *>raised
        with nogil:
            status = fa_attention_weights(&params, kernels)
    finally:
        release(&held)
    check(status, raised)


def describe(Problem problem):
    cdef fa_attention_params params
    cdef fa_attention_plan plan
    cdef views held
    cdef fa_status status
    cdef const fa_kernels *kernels = find_kernels(problem.isa)
    cdef list raised = []
    try:
        fill(&params, &held, problem)
        fill_results(&params, &held, problem)
        params.poll = poll_signals
        params.poll_arg = <void *>raised
        with nogil:
            status = fa_attention_describe(&params, kernels, &plan)
    finally:
        release(&held)
    check(status, raised)
    return {
        "engine": plan.engine.decode(),
        "block_q": plan.block_q,
        "block_k": plan.block_k,
        "tile_q": plan.tile_q,
        "mr": plan.mr,
        "nr": plan.nr,
        "vl": plan.vl,
        "num_tasks": plan.num_tasks,
        "num_threads": plan.num_threads,
        "workspace_bytes": plan.workspace_bytes,
        "tiles_total": plan.tiles_total,
        "tiles_computed": plan.tiles_computed,
        "key_ranges": ("mask",) * plan.mask_is_ranges + ("bias",) * plan.bias_is_ranges,
    }


def probe_fma(str isa, bint double_precision, int64_t rounds, int num_threads):
    cdef const fa_kernels *kernels = find_kernels(isa)
    cdef fa_dtype dtype = FA_F64 if double_precision else FA_F32
    cdef fa_status status
    cdef double seconds = 0.0, flops = 0.0
    with nogil:
        status = fa_probe_fma(kernels, dtype, rounds, num_threads, &seconds, &flops)
    check(status, [])
    return seconds, flops


def probe_read(array, int num_threads):
    cdef views held
    cdef Py_buffer *view
    cdef fa_status status
    cdef double seconds = 0.0
    held.count = 0
    try:
        view = acquire(&held, array, PyBUF_SIMPLE)
        with nogil:
            status = fa_probe_read(view.buf, view.len, num_threads, &seconds)
    finally:
        release(&held)
    check(status, [])
    return seconds


def available_isas():
    return tuple(_index_of_isa)


def engines(str isa):
    """Names of the engines of a kernel set, best first."""
    cdef const fa_kernels *kernels = kernel_sets[find_index(isa)]
    names = []
    cdef int i = 0
    while fa_engine_name(kernels, i) is not NULL:
        names.append((<bytes>fa_engine_name(kernels, i)).decode())
        i += 1
    return tuple(names)


def known_isas():
    names = []
    cdef int i = 0
    while fa_kernels_known_name(i) is not NULL:
        names.append((<bytes>fa_kernels_known_name(i)).decode())
        i += 1
    return tuple(names)


def has_openmp():
    return bool(fa_has_openmp())


def openmp_max_threads():
    return fa_openmp_max_threads()


def team_limit():
    return fa_team_limit()


def differing(tuple given, tuple defaults):
    """Where options are given: indices at which two tuples of one length differ.

    Objects are compared by identity, since arrays have no other answer; numbers by value, since a
    default of 0.0 is written out in more than one signature.
    """
    cdef Py_ssize_t i
    cdef list found = []
    if len(given) != len(defaults):
        raise SystemError("a call has another number of options than the table")
    for i in range(len(given)):
        value = given[i]
        if value is not defaults[i] and not (type(value) is float and value == defaults[i]):
            found.append(i)
    return found


cdef class DefaultFloatMode:
    """A ``with`` block that NumPy computes in the default floating-point mode, as C does."""
    cdef fa_float_mode found

    def __enter__(self):
        fa_float_mode_enter(&self.found)

    def __exit__(self, *error):
        fa_float_mode_leave(&self.found)


def build_info():
    return {
        "compiler": (<bytes>FA_BUILD_COMPILER).decode(),
        "flags": (<bytes>FA_BUILD_FLAGS).decode(),
        "switches": (<bytes>FA_BUILD_SWITCHES).decode(),
        "openmp": "yes" if fa_has_openmp() else "no",
    }


# Forks that led to this process.  A lock that another thread held at one of them is never released.
cdef int forks = 0


def _count_fork():
    global forks
    forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


cdef class Gate:
    """What the threads that use a cache pass through: changes come one after the other, each whole,
    and it is known which views of the storage are being read.

    Here and not in Python, because no signal handler, and so no KeyboardInterrupt, runs between two
    of its steps.
    """
    cdef object lock
    cdef object owner  # thread that holds the lock, None if none does
    cdef int forks
    cdef dict views  # those being read, by id
    cdef list pending  # assignments that a change has yet to make, the next one last

    def __cinit__(self):
        self.reset()

    def __reduce__(self):
        return Gate, ()  # a copy of a cache is another cache

    cdef int reset(self) except -1:
        try:
            self.lock = allocate_lock()
        except RuntimeError:
            raise MemoryError("not enough memory for a cache's lock") from None
        self.owner = None
        self.forks = forks
        self.views = {}
        if self.pending is None:
            self.pending = []
        return 0

    cdef int enter(self) except -1:
        if self.forks != forks:
            self.reset()
        thread = get_ident()
        if self.owner == thread:
            raise RuntimeError("the cache must not be used while this very thread changes it")
        self.lock.acquire()  # a KeyboardInterrupt comes out of it only if it was not acquired
        self.owner = thread
        return 0

    cdef int leave(self) except -1:
        self.owner = None
        self.lock.release()
        return 0

    cdef int finish(self) except -1:
        # An assignment may be repeated until the next one is begun, so whoever comes after one that
        # failed goes on there.
        while self.pending:
            target, key, value = self.pending[len(self.pending) - 1]
            if value is None:
                (<dict>target).pop(key, None)
            else:
                target[key] = value
            self.pending.pop()
        return 0

    def change(self, prepare, *args):
        """Let ``prepare(*args)``, which changes nothing that is there, return a result and a list
        of assignments ``(target, key, value)`` (value None removes the key of a dict); make these
        one after the other, or none if it raises."""
        self.enter()
        try:
            self.finish()
            result, assignments = prepare(*args)
            assignments.reverse()
            self.pending = assignments
            self.finish()
        finally:
            self.leave()
        return result

    def read(self, look, use, *args):
        """``use(view, *args)`` of ``view = look()``, which no change interrupts.  The view is one
        of `being_read` until `use` is done."""
        self.enter()
        try:
            self.finish()
            view = look()
            self.views[id(view)] = view
        finally:
            self.leave()
        try:
            return use(view, *args)
        finally:
            del self.views[id(view)]

    def being_read(self):
        return list(self.views.values())


def is_granted(str isa):
    """Whether the operating system lets a kernel set have the registers that it needs."""
    try:
        find_kernels(isa)
    except ValueError:
        return False
    return True


def _select_isa():
    """The kernel set of this process: FASTATTN_ISA, else the best that runs here."""
    name = os.environ.get("FASTATTN_ISA")
    available = available_isas()
    if name is None or name == "":
        return next(isa for isa in available if is_granted(isa))
    if name not in known_isas():
        raise ImportError(
            f"FASTATTN_ISA must be one of {', '.join(known_isas())}, got {name!r}"
        )
    if name not in available or not is_granted(name):
        raise ImportError(
            f"FASTATTN_ISA={name} cannot be used here: this CPU, its operating system or this "
            f"build of fastattn does not support it (supported: {', '.join(available)})"
        )
    return name


_selected_isa = _select_isa()

if fa_team_init() != FA_OK:
    raise MemoryError("cannot register fastattn's fork handler")


def selected_isa():
    return _selected_isa
