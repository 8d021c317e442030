# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: freethreading_compatible=True
"""The one door to C: arrays to pointers and strides, one call without the GIL, status to exception.

Arguments arrive validated, broadcast and allocated (attention.py).  Arrays are read through the
buffer protocol, so that neither NumPy's headers nor its ABI are needed.
"""
import os

from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_SIMPLE,
    PyBUF_STRIDED,
    PyBUF_STRIDES,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

from fastattn._csrc cimport *


cdef extern from *:
    const char *FA_BUILD_COMPILER
    const char *FA_BUILD_FLAGS
    const char *FA_BUILD_SWITCHES


# Arrays of one call: q k v out lse residual bias alibi_slopes sinks mask kv_lengths q_offset, two
# of segment ids, two scales, page_table, and the starts of packed sequences; and of its gradients:
# grad_out grad_lse grad_q grad_k grad_v grad_bias delta.
cdef enum:
    MAX_VIEWS = 26


cdef struct views:
    Py_buffer view[MAX_VIEWS]
    int count


cdef Py_buffer *acquire(views *held, object array, int flags) except NULL:
    cdef Py_buffer *view = &held.view[held.count]
    PyObject_GetBuffer(array, view, flags)
    held.count += 1
    return view


cdef void release(views *held) noexcept:
    for i in range(held.count):
        PyBuffer_Release(&held.view[i])


cdef inline int64_t next_stride(const Py_buffer *view, int *axis) noexcept:
    axis[0] += 1
    return view.strides[axis[0] - 1]


cdef int read_input(
    fa_input *to, views *held, object array, int64_t batch_ndim, bint head, bint row, bint col
) except -1:
    """Point `to` at an array with axes (batch..., head, row, col), those of the last three that it
    has."""
    cdef Py_buffer *view
    cdef int axis = 0
    if array is None:
        return 0
    view = acquire(held, array, PyBUF_STRIDES | PyBUF_FORMAT)
    to.data = view.buf
    for i in range(batch_ndim):
        to.batch[i] = next_stride(view, &axis)
    to.head = next_stride(view, &axis) if head else 0
    to.row = next_stride(view, &axis) if row else 0
    to.col = next_stride(view, &axis) if col else 0
    return 0


cdef int read_output(
    fa_output *to, views *held, object array, int64_t batch_ndim, bint col
) except -1:
    cdef Py_buffer *view
    cdef int axis = 0
    if array is None:
        return 0
    view = acquire(held, array, PyBUF_STRIDED)
    to.data = view.buf
    for i in range(batch_ndim):
        to.batch[i] = next_stride(view, &axis)
    to.head = next_stride(view, &axis)
    to.row = next_stride(view, &axis)
    to.col = next_stride(view, &axis) if col else 0
    return 0


cdef const int64_t *read_starts(views *held, object array) except? NULL:
    if array is None:
        return NULL
    return <const int64_t *>acquire(held, array, PyBUF_SIMPLE).buf


cdef inline fa_dtype dtype_of(const Py_buffer *view) noexcept:
    """bfloat16, which the buffer protocol does not know, comes as uint16."""
    if view.itemsize == 4:
        return FA_F32
    if view.itemsize == 8:
        return FA_F64
    if view.itemsize == 1:
        return FA_I8
    # What is not aligned has a byte order before its type: "=e".
    return FA_F16 if view.format[0] == b"e" or view.format[1] == b"e" else FA_BF16


cdef int fill(
    fa_attention_params *p, views *held, object q, object k, object v, object out, object lse,
    object residual, double scale, double softcap, object bias, object alibi_slopes, object sinks,
    object mask, object kv_lengths, object q_offset, object q_segment_ids, object k_segment_ids,
    bint causal, int64_t window_left, int64_t window_right, bint softmax_over_queries,
    int num_threads, double dropout_p, uint64_t dropout_seed, object k_scale, object v_scale,
    object page_table, object q_starts, object k_starts, int64_t paged_seqlen_k,
) except -1:
    cdef Py_buffer *view
    cdef int64_t nb, kv_nb
    memset(p, 0, sizeof(fa_attention_params))
    held.count = 0

    view = acquire(held, q, PyBUF_STRIDES | PyBUF_FORMAT)
    nb = view.ndim - 3
    p.dtype = dtype_of(view)
    p.batch_ndim = nb
    for i in range(nb):
        p.batch_shape[i] = view.shape[i]
        p.q.batch[i] = view.strides[i]
    p.num_heads = view.shape[nb]
    p.seqlen_q = view.shape[nb + 1]
    p.head_dim = view.shape[nb + 2]
    p.q.data = view.buf
    p.q.head = view.strides[nb]
    p.q.row = view.strides[nb + 1]
    p.q.col = view.strides[nb + 2]

    # Pages stand where the batch axis would.
    kv_nb = nb if page_table is None else 1
    read_input(&p.k, held, k, kv_nb, True, True, True)
    view = &held.view[1]
    p.kv_dtype = dtype_of(view)
    p.num_kv_heads = view.shape[kv_nb]
    p.seqlen_k = view.shape[kv_nb + 1]
    read_input(&p.v, held, v, kv_nb, True, True, True)
    p.head_dim_v = held.view[2].shape[kv_nb + 2]
    read_output(&p.out, held, out, nb, True)
    read_output(&p.lse, held, lse, nb, False)
    read_input(&p.residual, held, residual, nb, True, True, True)

    p.scale = scale
    p.softcap = softcap
    if bias is not None:
        read_input(&p.bias, held, bias, nb, True, True, True)
        p.bias_dtype = dtype_of(&held.view[held.count - 1])
    read_input(&p.alibi_slopes, held, alibi_slopes, nb, True, False, False)
    read_input(&p.sinks, held, sinks, 0, True, False, False)
    read_input(&p.mask, held, mask, nb, True, True, True)
    read_input(&p.kv_lengths, held, kv_lengths, nb, False, False, False)
    # Packed sequences have no batch axis, but a position each.
    read_input(&p.q_offset, held, q_offset, nb if q_starts is None else 1, False, False, False)
    read_input(&p.q_segment_ids, held, q_segment_ids, nb, False, True, False)
    read_input(&p.k_segment_ids, held, k_segment_ids, nb, False, True, False)
    p.causal = causal
    p.window_left = window_left
    p.window_right = window_right
    p.softmax_axis = FA_SOFTMAX_QUERIES if softmax_over_queries else FA_SOFTMAX_KEYS
    p.num_threads = num_threads
    p.dropout_p = dropout_p
    p.dropout_seed = dropout_seed

    read_input(&p.k_scale, held, k_scale, kv_nb, True, True, False)
    read_input(&p.v_scale, held, v_scale, kv_nb, True, True, False)
    if page_table is not None:
        read_input(&p.page_table, held, page_table, nb, False, True, False)
        p.page_size = p.seqlen_k
        p.seqlen_k = paged_seqlen_k
    if q_starts is not None:
        p.batch_ndim = 1
        p.batch_shape[0] = len(q_starts) - 1
        p.q_starts = read_starts(held, q_starts)
        p.k_starts = read_starts(held, k_starts)
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


cdef const fa_kernels *find_kernels(str isa) except NULL:
    if isa not in _index_of_isa:
        raise ValueError(f"kernel set {isa!r} cannot run here")
    return kernel_sets[<int>_index_of_isa[isa]]


def attention(
    str isa, q, k, v, out, lse, residual, double scale, double softcap, bias, alibi_slopes, sinks,
    mask, kv_lengths, q_offset, q_segment_ids, k_segment_ids, bint causal, int64_t window_left,
    int64_t window_right, bint softmax_over_queries, int num_threads, double dropout_p,
    uint64_t dropout_seed, k_scale=None, v_scale=None, page_table=None, q_starts=None,
    k_starts=None, int64_t paged_seqlen_k=0,
):
    cdef fa_attention_params params
    cdef views held
    cdef fa_status status
    cdef const fa_kernels *kernels = find_kernels(isa)
    cdef list raised = []
    try:
        fill(
            &params, &held, q, k, v, out, lse, residual, scale, softcap, bias, alibi_slopes, sinks,
            mask, kv_lengths, q_offset, q_segment_ids, k_segment_ids, causal, window_left,
            window_right, softmax_over_queries, num_threads, dropout_p, dropout_seed, k_scale,
            v_scale, page_table, q_starts, k_starts, paged_seqlen_k,
        )
        params.poll = poll_signals
        params.poll_arg = <void *>raised
        with nogil:
            status = fa_attention(&params, kernels)
    finally:
        release(&held)
    check(status, raised)


def attention_backward(
    str isa, q, k, v, out, lse, residual, double scale, double softcap, bias, alibi_slopes, sinks,
    mask, kv_lengths, q_offset, q_segment_ids, k_segment_ids, bint causal, int64_t window_left,
    int64_t window_right, bint softmax_over_queries, int num_threads, double dropout_p,
    uint64_t dropout_seed, grad_out, grad_lse=None, grad_q=None, grad_k=None, grad_v=None,
    grad_bias=None, delta=None, q_starts=None, k_starts=None,
):
    cdef fa_backward_params params
    cdef views held
    cdef fa_status status
    cdef int64_t nb
    cdef const fa_kernels *kernels = find_kernels(isa)
    cdef list raised = []
    memset(&params, 0, sizeof(params))
    try:
        fill(
            &params.attention, &held, q, k, v, None, None, residual, scale, softcap, bias,
            alibi_slopes, sinks, mask, kv_lengths, q_offset, q_segment_ids, k_segment_ids, causal,
            window_left, window_right, softmax_over_queries, num_threads, dropout_p, dropout_seed,
            None, None, None, q_starts, k_starts, 0,
        )
        nb = params.attention.batch_ndim if q_starts is None else 0
        read_input(&params.out, &held, out, nb, True, True, True)
        read_input(&params.lse, &held, lse, nb, True, True, False)
        read_input(&params.grad_out, &held, grad_out, nb, True, True, True)
        read_input(&params.grad_lse, &held, grad_lse, nb, True, True, False)
        params.grad_dtype = params.attention.dtype
        for array in (grad_q, grad_k, grad_v):
            if array is not None and array.itemsize == 4:
                params.grad_dtype = FA_F32
        read_output(&params.grad_q, &held, grad_q, nb, True)
        read_output(&params.grad_k, &held, grad_k, nb, True)
        read_output(&params.grad_v, &held, grad_v, nb, True)
        read_output(&params.grad_bias, &held, grad_bias, nb, True)
        read_output(&params.delta, &held, delta, nb, False)
        params.attention.poll = poll_signals
        params.attention.poll_arg = <void *>raised
        with nogil:
            status = fa_attention_backward(&params, kernels)
    finally:
        release(&held)
    check(status, raised)


def describe(
    str isa, q, k, v, out, lse, residual, double scale, double softcap, bias, alibi_slopes, sinks,
    mask, kv_lengths, q_offset, q_segment_ids, k_segment_ids, bint causal, int64_t window_left,
    int64_t window_right, bint softmax_over_queries, int num_threads, double dropout_p,
    uint64_t dropout_seed, k_scale=None, v_scale=None, page_table=None, q_starts=None,
    k_starts=None, int64_t paged_seqlen_k=0,
):
    cdef fa_attention_params params
    cdef fa_attention_plan plan
    cdef views held
    cdef fa_status status
    cdef const fa_kernels *kernels = find_kernels(isa)
    cdef list raised = []
    try:
        fill(
            &params, &held, q, k, v, out, lse, residual, scale, softcap, bias, alibi_slopes, sinks,
            mask, kv_lengths, q_offset, q_segment_ids, k_segment_ids, causal, window_left,
            window_right, softmax_over_queries, num_threads, dropout_p, dropout_seed, k_scale,
            v_scale, page_table, q_starts, k_starts, paged_seqlen_k,
        )
        params.poll = poll_signals
        params.poll_arg = <void *>raised
        with nogil:
            status = fa_attention_describe(&params, kernels, &plan)
    finally:
        release(&held)
    check(status, raised)
    return {
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


def default_scale(int64_t head_dim):
    return fa_default_scale(head_dim)


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


def _select_isa():
    """The kernel set of this process: FASTATTN_ISA, else the best that runs here."""
    name = os.environ.get("FASTATTN_ISA")
    available = available_isas()
    if name is None or name == "":
        return available[0]
    if name not in known_isas():
        raise ImportError(
            f"FASTATTN_ISA must be one of {', '.join(known_isas())}, got {name!r}"
        )
    if name not in available:
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
