/* Caller memory: one element of any alignment, and lines asked for ahead of their use. */
#ifndef FA_MEMORY_H
#define FA_MEMORY_H

#include <string.h>

#include "engine.h"

static inline float read_f32(const void *p)
{
    float x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline double read_f64(const void *p)
{
    double x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* The 16-bit types in integer arithmetic, for single elements and for the scalar set; vectors have
 * instructions that do the same, NaN included. */

static inline float float_from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t bits_from_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float read_bf16(const void *p)
{
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    return float_from_bits((uint32_t)bits << 16);
}

/* Halves hold 5 bits of exponent, biased by 15, and 10 of mantissa; a float's exponent is biased by
 * 127. */
static inline float read_f16(const void *p)
{
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) {
        uint32_t quiet = magnitude > 0x7c00 ? 0x400000 : 0;
        return float_from_bits(sign | 0x7f800000 | quiet | (magnitude & 0x3ff) << 13);
    }
    if (magnitude >= 0x400) {
        return float_from_bits(sign | ((magnitude << 13) + ((127 - 15) << 23)));
    }
    return float_from_bits(sign | bits_from_float((float)magnitude * 0x1p-24f));
}

static inline float read_i8(const void *p)
{
    int8_t x;
    memcpy(&x, p, sizeof x);
    return (float)x;
}

/* To nearest, ties to even; a NaN keeps its sign and the top of its payload, and is made quiet. */
static inline void write_bf16(void *p, float x)
{
    const uint32_t bits = bits_from_float(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const uint16_t y = (uint16_t)(x != x ? bits >> 16 | 0x40 : rounded);
    memcpy(p, &y, sizeof y);
}

static inline void write_f16(void *p, float x)
{
    const uint32_t bits = bits_from_float(x), magnitude = bits & 0x7fffffff;
    uint32_t y;
    if (magnitude > 0x7f800000) {
        y = 0x7e00 | (magnitude >> 13 & 0x3ff);
    } else if (magnitude >= bits_from_float(65520.0f)) {
        /* What lies half-way to the first power of two that does not fit rounds up to it. */
        y = 0x7c00;
    } else if (magnitude < bits_from_float(0x1p-14f)) {
        /* Subnormal: multiples of 2^-24, the distance of floats between 0.5 and 1. */
        y = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
    } else {
        y = (magnitude + 0xfff + (magnitude >> 13 & 1) - ((127 - 15) << 23)) >> 13;
    }
    const uint16_t half = (uint16_t)((bits >> 16 & 0x8000) | y);
    memcpy(p, &half, sizeof half);
}

static inline void write_f32(void *p, float x) { memcpy(p, &x, sizeof x); }

static inline void write_f64(void *p, double x) { memcpy(p, &x, sizeof x); }

/* Lines asked for at a time: a core keeps a few dozen misses in flight, drops further requests, and
 * the products' own loads need some. */
#define FETCH_LINES 16

static inline void fetch_some(struct fa_wanted *wanted)
{
    for (int i = 0; i < FETCH_LINES && wanted->next_row < wanted->rows; i++) {
        if (wanted->next_byte < wanted->bytes) {
            __builtin_prefetch(wanted->row[wanted->next_row] + wanted->next_byte);
        }
        wanted->next_byte += FA_LINE;
        if (wanted->next_byte >= wanted->bytes) {
            wanted->next_byte = 0;
            wanted->next_row++;
        }
    }
}

/* Ask for a line that is wanted soon in L1, and for one that is wanted later in L2. */
static inline void fetch_near(const char *p) { __builtin_prefetch(p, 0, 3); }
static inline void fetch_far(const char *p) { __builtin_prefetch(p, 0, 1); }

/* The keys of a block, or its values, where their caller has them. */
struct key_block {
    const struct fa_rows *from;
    /* The keys that are there, and the elements of each. */
    size_t keys, cols;
};

/* Keys that are there from `key` on. */
static inline size_t keys_left(const struct key_block *block, size_t key)
{
    return key < block->keys ? block->keys - key : 0;
}

/* Few rows and a block that is not packed: rows of q and its keys, or weights and its values. */
struct few_product {
    /* The rows that are not done yet: a and c are those of the first.  b is not read. */
    struct fa_product product;
    struct key_block block;
};

/* Rows of caller memory that are wanted soon, and rows that are wanted later, to be asked for line
 * by line. */
struct fa_stretch {
    const char *const *row, *const *far_row;
    /* Of each row.  0: nothing is wanted soon. */
    size_t bytes;
    /* 0, or the same: of the rows that are wanted later. */
    size_t far_bytes;
    /* The next byte of the present row. */
    size_t at;
    /* Bytes that may be asked for by now. */
    size_t due;
};

/* Ask for `bytes` more, in whole lines. */
static inline void fetch_stretch(struct fa_stretch *stretch, size_t bytes)
{
    if (stretch->bytes == 0) {
        return;
    }
    for (stretch->due += bytes; stretch->due >= FA_LINE; stretch->due -= FA_LINE) {
        fetch_near(*stretch->row + stretch->at);
        if (stretch->far_bytes > 0) {
            fetch_far(*stretch->far_row + stretch->at);
        }
        stretch->at += FA_LINE;
        if (stretch->at >= stretch->bytes) {
            stretch->at = 0;
            stretch->row++;
            stretch->far_row++;
        }
    }
}

#endif
