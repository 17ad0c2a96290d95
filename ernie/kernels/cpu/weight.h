// Weights in the order in which the fused operations read them.
//
// A block holds 16 output rows. The rows are read four bytes (a word) at a time: one float32 column, two
// of bfloat16, four of int8 or eight of int4. A unit is the same word of the 16 rows, 64 bytes, and the
// units of a block lie one behind the other, so that a product streams through memory. Every lane of a
// vector is an output row: x is broadcast, and nothing is summed across lanes.
//
//   float32, bfloat16   [units]
//   int8                [16 channel scales, float32] [units]
//   int6                [16 channel scales, float32] [[4 x 16 scales of 8 bits] [units of 4 x 32 columns]] ...
//                       of integers plus 32: three units for 16 columns, four columns in each; the last four lie above
//                       these, bits 4 and 5 in the first unit, 2 and 3 in the second, 0 and 1 in the third
//   int4                [16 channel scales, float32] [[4 x 16 scales of 8 bits] [units of 4 x 32 columns]] ...
//   coded               bfloat16 in 12 bits: see coded.h
//
// Widths are padded to GROUP columns, outputs to whole blocks of each part; the blocks of two parts
// alternate.
#pragma once

#include "lanes.h"

enum Format {
    FORMAT_FLOAT32 = FLOAT32,
    FORMAT_BFLOAT16 = BFLOAT16,
    FORMAT_INT8 = 3,
    FORMAT_INT4 = 4,
    FORMAT_CODED = 5,
    FORMAT_INT6 = 6
};
constexpr long GROUP = 32;    // columns that share a scale: of x when it is rounded, of int4 weights
constexpr long UNIT = 64;     // bytes
constexpr int MOST_ROWS = 8;  // of one call of a product

struct Weight {  // also in fused.py
    const uint8_t *blocks;
    int64_t format, experts, parts, outputs, width;  // outputs: of one part

    bool rounds() const { return format == FORMAT_INT8 || format == FORMAT_INT6 || format == FORMAT_INT4; }
    bool has_groups() const { return format == FORMAT_INT6 || format == FORMAT_INT4; }
    long groups() const { return (width + GROUP - 1) / GROUP; }
    long blocks_of_part() const { return (outputs + LANES - 1) / LANES; }
    long word_columns() const {
        return format == FORMAT_FLOAT32 ? 1 : format == FORMAT_BFLOAT16 ? 2 : format == FORMAT_INT8 ? 4 : 8;
    }
    long units() const {
        if (format == FORMAT_CODED) return groups() * GROUP / 8 * 3;
        return format == FORMAT_INT6 ? groups() * GROUP / 16 * 3 : groups() * GROUP / word_columns();
    }
    // Where in a block unit u begins: behind the scales of its columns, or the table of codes.
    long unit_at(long u) const {
        const long together = format == FORMAT_INT4 ? 16 : 24;  // units whose scales fill a unit
        const long scales = has_groups() ? u / together + 1 : 0;
        return (rounds() || format == FORMAT_CODED ? UNIT : 0) + (u + scales) * UNIT;
    }
    long block_bytes() const { return unit_at(units() - 1) + UNIT; }
    const uint8_t *block(long expert, long index, long part) const {
        return blocks + ((expert * blocks_of_part() + index) * parts + part) * block_bytes();
    }
};

constexpr long AHEAD = 8192;  // bytes between what is multiplied and what is asked of memory: what is on its way

// What to ask for while a block is read, or several at once, each with its share of what is on its way: behind the
// end of the first one that of `after` comes next.
struct Ahead {
    const uint8_t *end;
    long bytes, jump;
    Ahead(const uint8_t *end, const uint8_t *after, int blocks)
        : end(end), bytes(AHEAD / blocks), jump(after - end) {}
    ERNIE_MEMBER const uint8_t *of(const uint8_t *at) const {
        at += bytes;
        return at < end ? at : at + jump;
    }
};
