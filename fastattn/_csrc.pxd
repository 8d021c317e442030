"""Mirror of csrc/fastattn.h, where every field and function is described."""
from libc.stdint cimport int64_t, uint64_t


cdef extern from "fastattn.h" nogil:
    enum:
        FA_MAX_BATCH_DIMS

    enum fa_status:
        FA_OK
        FA_NO_MEMORY
        FA_OVERFLOW
        FA_INTERRUPTED
        FA_FORKED

    enum fa_dtype:
        FA_F32
        FA_F64
        FA_F16
        FA_BF16
        FA_I8

    int64_t fa_dtype_size(fa_dtype dtype) noexcept

    enum fa_softmax_axis:
        FA_SOFTMAX_KEYS
        FA_SOFTMAX_QUERIES

    struct fa_array:
        void *data
        int64_t batch[FA_MAX_BATCH_DIMS]
        int64_t head, row, col

    struct fa_attention_params:
        fa_dtype dtype
        fa_dtype kv_dtype
        fa_dtype bias_dtype
        fa_softmax_axis softmax_axis
        int64_t batch_ndim
        int64_t batch_shape[FA_MAX_BATCH_DIMS]
        int64_t num_heads, num_kv_heads
        int64_t seqlen_q, seqlen_k
        int64_t head_dim, head_dim_v
        fa_array q, k, v, k_scale, v_scale
        fa_array out, lse
        fa_array residual
        fa_array weighing, exact
        fa_array page_table
        int64_t page_size
        const int64_t *q_starts
        const int64_t *k_starts
        double scale, softcap
        fa_array bias, alibi_slopes, sinks
        fa_array mask, kv_lengths, q_offset, q_segment_ids, k_segment_ids
        bint causal
        int64_t window_left, window_right
        double dropout_p
        uint64_t dropout_seed
        int num_threads
        int (*poll)(void *) noexcept
        void *poll_arg

    struct fa_backward_params:
        fa_attention_params attention
        fa_array out, lse, grad_out, grad_lse
        fa_array weighing, exact
        fa_array grad_q, grad_k, grad_v
        fa_dtype grad_dtype
        fa_array grad_bias
        fa_dtype grad_bias_dtype
        fa_array sink_terms

    enum fa_weights_form:
        FA_WEIGHTS_EACH
        FA_WEIGHTS_MEANS
        FA_WEIGHTS_SUMS

    struct fa_weights_params:
        fa_attention_params attention
        fa_weights_form form
        const int64_t *rows
        const int64_t *places
        int64_t num_rows
        const int64_t *heads
        int64_t num_heads
        int64_t pool_rows, pool_cols
        void *weights

    struct fa_attention_plan:
        const char *engine
        int64_t block_q, block_k, tile_q
        int64_t mr, nr, vl
        int64_t num_tasks, num_threads
        int64_t workspace_bytes
        int64_t tiles_total, tiles_computed
        bint mask_is_ranges, bias_is_ranges

    struct fa_kernels:
        pass

    const fa_kernels *fa_kernels_available(int index) noexcept
    bint fa_kernels_request(const fa_kernels *kernels) noexcept
    const char *fa_kernels_known_name(int index) noexcept
    const char *fa_kernels_name(const fa_kernels *kernels) noexcept
    const char *fa_engine_name(const fa_kernels *kernels, int index) noexcept

    fa_status fa_attention(const fa_attention_params *params, const fa_kernels *kernels) noexcept
    fa_status fa_attention_backward(
        const fa_backward_params *params, const fa_kernels *kernels
    ) noexcept
    fa_status fa_attention_weights(
        const fa_weights_params *params, const fa_kernels *kernels
    ) noexcept
    fa_status fa_attention_describe(
        const fa_attention_params *params, const fa_kernels *kernels, fa_attention_plan *plan
    ) noexcept

    double fa_default_scale(int64_t head_dim) noexcept
    fa_status fa_team_init() noexcept
    int fa_team_limit() noexcept
    bint fa_has_openmp() noexcept
    int fa_openmp_max_threads() noexcept

    fa_status fa_probe_fma(
        const fa_kernels *kernels, fa_dtype dtype, int64_t rounds, int num_threads, double *seconds,
        double *flops
    ) noexcept
    fa_status fa_probe_read(
        const void *data, int64_t bytes, int num_threads, double *seconds
    ) noexcept


cdef extern from "float_mode.h" nogil:
    struct fa_float_mode:
        pass

    void fa_float_mode_enter(fa_float_mode *found) noexcept
    void fa_float_mode_leave(const fa_float_mode *found) noexcept
