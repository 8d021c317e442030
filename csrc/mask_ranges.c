/* The keys that a row of a mask leaves are one range if the row is a run of elements that take
 * keys out, a run of elements that leave them, and a run of the first kind again.  Runs are
 * compared with a pattern of bits, word by word, so that a row is read at the speed of memory.
 *
 * The first row that is no range ends the search in its batch entry, which most often is the first
 * row of all.  Entries and queries that read the same memory are looked at once.  An array that
 * tells heads apart counts where all heads agree: some models repeat a mask for each head. */
#include "mask_ranges.h"

#include <math.h>
#include <stdatomic.h>

#include "schedule.h"
#include "workspace.h"

/* Elements that a task looks at, if more than one row has so many; and elements that pay for one
 * more thread. */
#define TASK_ELEMENTS (64 * 1024)
#define THREAD_ELEMENTS 1e6

/* Words that are compared together. */
#define WORDS 8

/* Elements that have these bits once the bits of `ignored` are set.  Both fill a word. */
struct kind {
    uint64_t ignored, bits;
};

/* An array that may take keys out: mask or bias. */
struct source {
    const struct fa_array *array;
    enum fa_masked_by by;
    /* Bytes of an element. */
    int64_t size;
    struct kind leaves, takes_out;
    /* [entries][queries] */
    struct fa_key_range *keys;
    /* [entries]: whether some row of the entry is no range. */
    atomic_bool *failed;
};

struct search {
    const struct fa_geometry *geometry;
    struct fa_ranges *ranges;
    struct source source[2];
    int64_t sources;
    /* Batch entries and queries that masks or positions tell apart: the others share theirs. */
    int64_t entries, queries;
    /* [entries], each of enum fa_masked_by. */
    uint8_t *replaced;
};

/* A word full of elements of some bytes. */
static uint64_t fill_word(uint64_t bits, int64_t size)
{
    return size == 1   ? bits * UINT64_C(0x0101010101010101)
           : size == 2 ? bits * UINT64_C(0x0001000100010001)
           : size == 4 ? bits * UINT64_C(0x0000000100000001)
                       : bits;
}

static uint64_t read_element(const char *p, int64_t size)
{
    uint8_t x1;
    uint16_t x2;
    uint32_t x4;
    uint64_t x8;
    switch (size) {
    case 1:
        memcpy(&x1, p, sizeof x1);
        return x1;
    case 2:
        memcpy(&x2, p, sizeof x2);
        return x2;
    case 4:
        memcpy(&x4, p, sizeof x4);
        return x4;
    default:
        memcpy(&x8, p, sizeof x8);
        return x8;
    }
}

static bool are_words_of(const char *p, const struct kind *kind)
{
    uint64_t word[WORDS], differing = 0;
    memcpy(word, p, sizeof word);
    for (int i = 0; i < WORDS; i++) {
        differing |= (word[i] | kind->ignored) ^ kind->bits;
    }
    return differing == 0;
}

/* Where the run of elements of a kind ends that begins at `begin`. */
static int64_t find_end(const struct source *source, const char *row, const struct kind *kind,
                        int64_t begin, int64_t end)
{
    const int64_t size = source->size, stride = source->array->col;
    const int64_t together = WORDS * (int64_t)sizeof(uint64_t) / size;
    int64_t j = begin;
    while (stride == size && end - j >= together && are_words_of(row + j * size, kind)) {
        j += together;
    }
    for (; j < end; j++) {
        const uint64_t word = fill_word(read_element(row + j * stride, size), size);
        if (((word | kind->ignored) ^ kind->bits) != 0) {
            return j;
        }
        if (stride == 0) {
            return end;
        }
    }
    return j;
}

/* What a row leaves of some keys.  False: it is no range. */
static bool read_row(const struct source *source, const char *row, struct fa_key_range of,
                     struct fa_key_range *keys)
{
    keys->lo = find_end(source, row, &source->takes_out, of.lo, of.hi);
    keys->hi = find_end(source, row, &source->leaves, keys->lo, of.hi);
    return find_end(source, row, &source->takes_out, keys->hi, of.hi) == of.hi;
}

/* The same of a query, in all heads. */
static bool read_query(const struct source *source, const struct fa_head *head, int64_t query,
                       struct fa_key_range *keys)
{
    const struct fa_array *array = source->array;
    const char *row = (source->by == FA_BY_MASK ? head->mask : head->bias) + query * array->row;
    const int64_t heads = array->head == 0 ? 1 : head->geometry->params->num_heads;
    const struct fa_key_range all = {.lo = 0, .hi = head->kv_length};
    const struct fa_key_range of = array->row == 0 ? all : fa_position_keys(head, query);
    bool same = read_row(source, row, of, keys);
    for (int64_t h = 1; same && h < heads; h++) {
        struct fa_key_range other;
        same = read_row(source, row + h * array->head, of, &other) && other.lo == keys->lo &&
               other.hi == keys->hi;
    }
    return same;
}

/* A batch entry that the index-th of the entries told apart stands for. */
static void init_head(struct fa_head *head, const struct search *search, int64_t index)
{
    const struct fa_geometry *g = search->geometry;
    const struct fa_attention_params *p = g->params;
    int64_t entry = 0, apart = 1;
    for (int64_t i = p->batch_ndim - 1; i >= 0; i--) {
        if (search->ranges->keys.batch[i] != 0) {
            entry += index % p->batch_shape[i] * apart;
            index /= p->batch_shape[i];
        }
        apart *= p->batch_shape[i];
    }
    fa_head_init(head, g, entry * g->heads);
}

static int64_t queries_together(const struct search *search)
{
    return fa_max(1, TASK_ELEMENTS / fa_max(1, search->geometry->params->seqlen_k));
}

/* Some queries of one batch entry, in one source. */
static void run_search(struct fa_job *job, int64_t index, int thread)
{
    const struct search *search = job->context;
    const int64_t together = queries_together(search), queries = search->queries;
    const int64_t blocks = fa_ceil_div(queries, together), place = index / blocks;
    const int64_t entry = place % search->entries, first = index % blocks * together;
    const struct source *source = &search->source[place / search->entries];
    atomic_bool *failed = source->failed + entry;
    struct fa_key_range *to = source->keys + entry * queries;
    struct fa_head head;
    (void)thread;
    init_head(&head, search, entry);
    for (int64_t i = first; i < fa_min(first + together, queries); i++) {
        if (i > first && source->array->row == 0) {
            to[i] = to[first];
        } else if (atomic_load_explicit(failed, memory_order_relaxed) ||
                   !read_query(source, &head, i, &to[i])) {
            atomic_store_explicit(failed, true, memory_order_relaxed);
            return;
        }
    }
}

static bool tells_entries_apart(const struct fa_attention_params *p, int64_t axis)
{
    const struct fa_array *arrays[] = {&p->mask, &p->bias, &p->kv_lengths, &p->q_offset};
    bool apart = false;
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        apart |= arrays[i]->data != NULL && arrays[i]->batch[axis] != 0;
    }
    return apart && p->batch_shape[axis] > 1;
}

static bool tells_queries_apart(const struct fa_attention_params *p)
{
    const bool masked = p->mask.data != NULL && p->mask.row != 0;
    const bool biased = p->bias.data != NULL && p->bias.row != 0;
    const bool placed = p->causal || p->window_left >= 0 || p->window_right >= 0;
    return masked || biased || placed;
}

static void add_source(struct search *search, const struct fa_array *array, enum fa_masked_by by,
                       int64_t size, const struct kind *leaves, uint64_t takes_out)
{
    if (array->data != NULL) {
        search->source[search->sources++] = (struct source){
            .array = array,
            .by = by,
            .size = size,
            .leaves = {.ignored = fill_word(leaves->ignored, size),
                       .bits = fill_word(leaves->bits, size)},
            .takes_out = {.bits = fill_word(takes_out, size)},
        };
    }
}

static uint64_t minus_infinity(enum fa_dtype dtype)
{
    switch (dtype) {
    case FA_F16:
        return UINT64_C(0xFC00);
    case FA_BF16:
        return UINT64_C(0xFF80);
    case FA_F32:
        return UINT64_C(0xFF800000);
    default:
        return UINT64_C(0xFFF0000000000000);
    }
}

/* The arrays to look at, and how many ranges there are to find.  A byte of a mask that is neither
 * 0 nor 1 is of no kind, and zeros have any sign. */
static void init_search(struct search *search, const struct fa_geometry *g)
{
    const struct fa_attention_params *p = g->params;
    const int64_t size = fa_dtype_size(p->bias_dtype);
    const uint64_t sign = UINT64_C(1) << (8 * size - 1);
    *search = (struct search){.geometry = g, .entries = 1, .queries = 1};
    if (p->q_starts != NULL || g->batch * g->heads * g->rows == 0) {
        return;
    }
    add_source(search, &p->mask, FA_BY_MASK, 1, &(struct kind){.bits = 1}, 0);
    add_source(search, &p->bias, FA_BY_BIAS, size, &(struct kind){.ignored = sign, .bits = sign},
               minus_infinity(p->bias_dtype));
    for (int64_t i = 0; i < p->batch_ndim; i++) {
        search->entries *= tells_entries_apart(p, i) ? p->batch_shape[i] : 1;
    }
    search->queries = tells_queries_apart(p) ? p->seqlen_q : 1;
}

/* The memory of a search.  The array of the first source is to hold the ranges in the end. */
static void take_buffers(struct fa_memory *memory, struct search *search)
{
    const int64_t entries = search->entries, size = (int64_t)sizeof(struct fa_key_range);
    for (int64_t i = 0; i < search->sources; i++) {
        struct source *source = &search->source[i];
        source->keys = fa_take(memory, entries, search->queries, size);
        source->failed = fa_take(memory, entries, 1, (int64_t)sizeof(atomic_bool));
    }
    search->replaced = fa_take(memory, search->sources > 0 ? entries : 0, 1, 1);
}

bool fa_ranges_bytes(const struct fa_geometry *geometry, int64_t *bytes)
{
    struct fa_memory memory = {.ok = true};
    struct search search;
    init_search(&search, geometry);
    take_buffers(&memory, &search);
    *bytes = memory.bytes;
    return memory.ok;
}

/* Where the ranges of each batch entry lie, and what they stand for. */
static void place_ranges(struct search *search)
{
    const struct fa_attention_params *p = search->geometry->params;
    struct fa_ranges *ranges = search->ranges;
    const int64_t size = (int64_t)sizeof(struct fa_key_range);
    int64_t apart = 1;
    ranges->keys.data = search->source[0].keys;
    ranges->keys.row = search->queries > 1 ? size : 0;
    ranges->replaced.data = search->replaced;
    for (int64_t i = p->batch_ndim - 1; i >= 0; i--) {
        const bool differs = tells_entries_apart(p, i);
        ranges->keys.batch[i] = differs ? apart * search->queries * size : 0;
        ranges->replaced.batch[i] = differs ? apart : 0;
        apart *= differs ? p->batch_shape[i] : 1;
    }
    ranges->entries = search->entries;
}

static enum fa_status search_all(struct search *search)
{
    const struct fa_geometry *g = search->geometry;
    const int64_t rows = search->sources * search->entries * search->queries;
    const double elements = (double)rows * (double)g->params->seqlen_k;
    struct fa_job job = {
        .num_tasks = search->sources * search->entries *
                     fa_ceil_div(search->queries, queries_together(search)),
        .num_threads = (int)fmin(g->num_threads, 1 + elements / THREAD_ELEMENTS),
        .run = run_search,
        .context = search,
        .poll = g->params->poll,
        .poll_arg = g->params->poll_arg,
    };
    for (int64_t i = 0; i < search->sources; i++) {
        for (int64_t entry = 0; entry < search->entries; entry++) {
            atomic_init(search->source[i].failed + entry, false);
        }
    }
    return fa_job_run(&job);
}

/* Meet the ranges that positions and masks leave to the queries of an entry.  Returns the masks. */
static uint8_t meet_ranges(struct search *search, int64_t entry)
{
    const int64_t first = entry * search->queries;
    uint8_t replaced = 0;
    struct fa_head head;
    init_head(&head, search, entry);
    for (int64_t s = 0; s < search->sources; s++) {
        if (!atomic_load_explicit(search->source[s].failed + entry, memory_order_relaxed)) {
            replaced |= (uint8_t)search->source[s].by;
        }
    }
    for (int64_t i = 0; replaced != 0 && i < search->queries; i++) {
        struct fa_key_range keys = fa_position_keys(&head, i);
        for (int64_t s = 0; s < search->sources; s++) {
            if ((replaced & search->source[s].by) != 0) {
                const struct fa_key_range *of = &search->source[s].keys[first + i];
                keys.lo = fa_max(keys.lo, of->lo);
                keys.hi = fa_max(keys.lo, fa_min(keys.hi, of->hi));
            }
        }
        search->source[0].keys[first + i] = keys;
    }
    return replaced;
}

enum fa_status fa_ranges_find(struct fa_ranges *ranges, struct fa_geometry *geometry)
{
    struct fa_memory memory = {.ok = true};
    struct search search;
    uint8_t any = 0;
    ranges->memory = NULL;
    init_search(&search, geometry);
    if (search.sources == 0) {
        return FA_OK;
    }
    take_buffers(&memory, &search);
    if (!memory.ok) {
        return FA_OVERFLOW;
    }
    ranges->memory = fa_allocate(memory.bytes);
    if (ranges->memory == NULL) {
        return FA_NO_MEMORY;
    }
    memory = (struct fa_memory){.base = ranges->memory};
    take_buffers(&memory, &search);
    search.ranges = ranges;
    place_ranges(&search);
    const enum fa_status status = search_all(&search);
    for (int64_t i = 0; status == FA_OK && i < search.entries; i++) {
        search.replaced[i] = meet_ranges(&search, i);
        any |= search.replaced[i];
    }
    geometry->ranges = any != 0 ? ranges : NULL;
    return status;
}

void fa_ranges_release(struct fa_ranges *ranges) { fa_release(ranges->memory); }

bool fa_ranges_replace(const struct fa_geometry *geometry, enum fa_masked_by by)
{
    const struct fa_ranges *ranges = geometry->ranges;
    const uint8_t *replaced = ranges == NULL ? NULL : ranges->replaced.data;
    bool all = replaced != NULL;
    for (int64_t i = 0; all && i < ranges->entries; i++) {
        all = (replaced[i] & by) != 0;
    }
    return all;
}
