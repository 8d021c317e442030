/* Score tiles: the keys of a block that take part in the scores of tile_q rows, and these scores
 * with every option applied.  All forms of softmax share them. */
#ifndef FA_SCORES_H
#define FA_SCORES_H

#include "geometry.h"
#include "workspace.h"

/* tile_q rows or fewer against a stretch of one key block. */
struct fa_tile {
    const struct fa_head *head;
    /* Rows [first_row, first_row + rows) of the head. */
    int64_t first_row, rows;
    /* Where first_row stands in the workspace's blocks of rows. */
    int64_t row_offset;
    /* The first key of the key block. */
    int64_t block_key;
    /* The first key of the tile within the block: that of a panel. */
    int64_t begin;
    /* Keys that any row may see, from `begin` on. */
    int64_t keys;
    /* These keys in whole panels: the columns that are computed. */
    int64_t columns;
    /* Rows that are multiplied together: all of them, or mr where they see different keys, so that
     * a diagonal costs little more than its useful half. */
    int64_t group;
    /* Some row sees less than all of [0, columns). */
    bool use_range;
    /* The workspace's mask rules out some key. */
    bool use_mask;
};

/* Set up the tile of at most tile_q rows, which stand in the workspace from row_offset on, and
 * the key block at block_key.  Reads mask and segment ids into ws.  False: no key of the block
 * takes part in any of the rows. */
bool fa_tile_init(struct fa_tile *tile, struct fa_workspace *ws, const struct fa_head_rows *rows,
                  int64_t row_offset, int64_t block_key);

/* Keys that rows [r, r + group) of the tile may see, counted from the tile's first; lo begins a
 * panel. */
struct fa_key_range fa_group_keys(const struct fa_tile *tile, int64_t r);

/* Scale rows of q into ws->q, and see whether they are ordinary (engine.h). */
void fa_load_rows(struct fa_workspace *ws, const struct fa_head_rows *rows);

/* Have the products fetch the bias of some rows and the key block at block_key, for the tile
 * after the present one: the bias is read once, in stretches of a row that the hardware does not
 * foresee.  A count of 0 or less wants nothing. */
void fa_want_bias(struct fa_workspace *ws, const struct fa_head_rows *rows, int64_t block_key);

/* Base-2 scores of the tile, -inf where a key takes no part, into ws->scores [rows][columns].
 * ready: ws->scores holds their product already. */
void fa_tile_scores(const struct fa_tile *tile, struct fa_workspace *ws, bool ready);

/* That product into ws->scores_ahead, for a tile of one group of rows: so engine->softmax can
 * compute it beside the weights of the tile before, whose ws->scores are in use. */
struct fa_product fa_tile_product_ahead(const struct fa_tile *tile, const struct fa_workspace *ws);

/* The factor that engine->softmax is to multiply the scores of a head by, because nothing before
 * it needs them multiplied; 1 where they are multiplied. */
float fa_softmax_factor(const struct fa_head *head);

/* Whether a call's scale and softcap, as the scores take them, are numbers of float32 with room
 * on both sides. */
bool fa_has_narrow_options(const struct fa_attention_params *params);

/* The operations of a call's first run: of float64 where its options leave no choice. */
const struct fa_tile_ops *fa_ops_of_call(const struct fa_kernels *kernels,
                                         const struct fa_attention_params *params);

/* Whether so many rows are too few for packing keys: the engine's products for few rows then read
 * keys and values where they lie. */
bool fa_are_few(const struct fa_geometry *geometry, int64_t rows);

/* The scales_scores of a run (geometry.h).  again: it is a second run. */
bool fa_scales_scores(const struct fa_attention_params *params, bool again);

/* Maxima that are doubtful in rows of the head's stacked query head `member`. */
struct fa_doubt fa_head_doubt(const struct fa_head *head, int64_t member);

/* Draw the factors of dropout for the tile, into ws->factors; and multiply the tile's columns of
 * `rows`, which are score_stride elements apart, by them.  Without dropout neither does
 * anything.  multiply: of n elements of a row, in the form that they have. */
void fa_draw_dropout(const struct fa_tile *tile, struct fa_workspace *ws);
void fa_apply_dropout(const struct fa_tile *tile, const struct fa_workspace *ws, char *rows,
                      void (*multiply)(void *row, const void *factors, size_t n));

/* The keys of a block from `key` on. */
static inline struct fa_rows fa_rows_from(const struct fa_rows *keys, int64_t key)
{
    struct fa_rows rest = *keys;
    rest.row += key;
    rest.located -= (size_t)key;
    rest.scale = keys->scale == NULL ? NULL : keys->scale + key;
    rest.into_chain = (size_t)key % FA_CHAIN;
    return rest;
}

/* Address of the tile's first score of row 0. */
static inline char *fa_tile_scores_in(const struct fa_tile *tile, char *scores)
{
    return scores + tile->begin * (int64_t)tile->head->geometry->ops->size;
}

static inline void *fa_tile_score_data(const struct fa_tile *tile, const struct fa_workspace *ws)
{
    return fa_tile_scores_in(tile, ws->scores);
}

#endif
