/* The engines of vectors, which serve every call: operands are packed as they are, in the type that
 * computes.  Needs all of ops_template.h; see names.h. */

static bool FN(takes_all)(const struct fa_attention_params *params, enum fa_pass pass)
{
    (void)params;
    (void)pass;
    return true;
}

static size_t FN(as_many)(size_t elements) { return elements; }

/* Vector registers are always there. */
static void FN(nothing)(void) {}

static void FN(scores)(const struct fa_product *product, float factor, struct fa_wanted *wanted)
{
    FA_ASSERT(factor == 1); /* rows have it */
    (void)factor;
    FN(matmul)(product, wanted);
}

static void FN(values_careful)(const struct fa_product *product)
{
    FN(matmul_skip_zeros)(product, false);
}

static size_t FN(few_rows)(size_t head_dim)
{
    (void)head_dim;
    return FEW_ROWS;
}

static void FN(softmax)(const struct fa_softmax *x)
{
    FA_ASSERT(x->factor == 1 && x->beside == NULL);
    FN(softmax_update)(x->scores, x->ld, x->rows, x->cols, x->state, x->ldacc);
}

_Static_assert(FA_MIN_TILE_Q % MR == 0, "a score tile is a whole number of register tiles");

static const struct fa_engine FN(engine) = {
    .name = "vector_" FA_STRING(DT),
    .ops = &FN(ops),
    .takes = FN(takes_all),
    .tile_q = FA_MIN_TILE_Q,
    .mr = MR,
    .nr = NR,
    .row_step = 1,
    .scale_at = FA_SCALE_ROWS,
    .multiplies_beside = false,
    .row_elements = FN(as_many),
    .value_elements = FN(as_many),
    .enter = FN(nothing),
    .leave = FN(nothing),
    .load_rows = FN(load_rows),
    .pack_keys = FN(pack_keys),
    .scores = FN(scores),
    .pack_values = FN(pack_values),
    .values = FN(matmul),
    .values_careful = FN(values_careful),
    .few_rows = FN(few_rows),
    .few_scores = FN(few_scores),
    .few_values = FN(few_values),
    .softmax = FN(softmax),
    .weigh_columns = FN(column_weights),
    .drop_weights = FN(apply_dropout),
    .scale_weights = FN(scale_weights),
};

static void FN(multiply)(const struct fa_product *product)
{
    struct fa_wanted nothing = {0};
    FN(matmul)(product, &nothing);
}

static const struct fa_gradient_engine FN(gradients) = {
    .ops = &FN(ops),
    .nr = NR,
    .load_rows = FN(load_rows),
    .pack_transposed = FN(pack_keys),
    .pack = FN(pack_values),
    .multiply = FN(multiply),
    .multiply_transposed = FN(matmul_transposed),
    .multiply_careful = FN(matmul_skip_zeros),
};
