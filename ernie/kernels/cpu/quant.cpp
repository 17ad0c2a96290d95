// Making weights of 8 and 4 bits, and putting weights in the order of blocks.h.
//
// The formats are those of ernie/kernels/weights.py, the integers those of `quantize` in
// ernie/kernels/reference.py: divisions and roundings are done as there.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>

#include "rows.h"

namespace {

constexpr long SCALED = 32;  // columns that share a scale of 8 bits

struct RowSlot;

long padded(long width) { return (width + GROUP - 1) / GROUP * GROUP; }
float nonzero(float v) { return v == 0 ? 1.0f : v; }
ERNIE_INLINE vf rounded(vf v) { return __builtin_convertvector(nearest(v), vf); }

template <class T>
void load_row(const T *row, long width, float *out) {  // zeros behind the last, to whole groups
    long k = 0;
    for (; k + VL <= width; k += VL) store(out + k, load(row + k));
    for (; k < padded(width); k++) out[k] = k < width ? load_one(row + k) : 0.0f;
}

float largest_magnitude(const float *x, long count) {
    vf most = {};
    for (long k = 0; k < count; k += VL) most = vmax(most, vmax(load(x + k), -load(x + k)));
    return largest(most);
}

// --- 8 bits ----------------------------------------------------------------------------------------------

void quantize8(const float *row, long width, int8_t *data, float *scale) {
    *scale = largest_magnitude(row, padded(width)) / 127;
    const vf divisor = splat(nonzero(*scale));
    for (long k = 0; k < width; k += VL) {
        int32_t integers[VL];
        const vi q = nearest(load(row + k) / divisor);
        memcpy(integers, &q, sizeof q);
        for (long i = 0; i < std::min<long>(VL, width - k); i++) data[k + i] = (int8_t)integers[i];
    }
}

// --- 4 bits ----------------------------------------------------------------------------------------------

ERNIE_INLINE vf nearest_nibble(const float *w, vf scale) {
    return vmin(vmax(rounded(load(w) / scale), splat(-8.0f)), splat(7.0f));
}

// The scale of 32 columns with the least squared error, of the candidates tried (see the reference).
float group_scale(const float *w) {
    const float top = largest_magnitude(w, SCALED);
    float extreme = 0;
    for (long k = 0; k < SCALED; k++)
        if (std::fabs(w[k]) == top) {
            extreme = w[k];
            break;
        }
    float best = 0, gain = 0;
    for (const float target : {-7.0f, -7.5f, -8.0f, -8.5f, -9.0f, -9.5f, 7.0f, 7.5f}) {
        const vf scale = splat(nonzero(extreme / target));
        vf products = {}, squares = {};
        for (long k = 0; k < SCALED; k += VL) {
            const vf q = nearest_nibble(w + k, scale);
            products = fma(load(w + k), q, products);
            squares = fma(q, q, squares);
        }
        const float wq = sum(products), qq = nonzero(sum(squares)), explained = wq * wq / qq;
        if (explained > gain) best = wq / qq, gain = explained;
    }
    return best;
}

void quantize4(const float *row, long width, float *best, uint8_t *data, float *channel, int8_t *scales) {
    const long groups = (width + SCALED - 1) / SCALED;
    float most = 0;
    for (long g = 0; g < groups; g++) {
        best[g] = group_scale(row + g * SCALED);
        most = std::max(most, std::fabs(best[g]));
    }
    *channel = most / 127;
    for (long g = 0; g < groups; g++) {
        scales[g] = (int8_t)std::nearbyint(best[g] / nonzero(*channel));
        const vf scale = splat(nonzero(scales[g] * *channel));
        uint8_t nibbles[SCALED];
        for (long k = 0; k < SCALED; k += VL) {
            int32_t integers[VL];
            const vi q = nearest(nearest_nibble(row + g * SCALED + k, scale));
            memcpy(integers, &q, sizeof q);
            for (int i = 0; i < VL; i++) nibbles[k + i] = (uint8_t)(integers[i] + 8);
        }
        for (long k = 0; k < SCALED && g * SCALED + k < width; k += 2)
            data[(g * SCALED + k) / 2] = (uint8_t)(nibbles[k] | nibbles[k + 1] << 4);
    }
}

template <class T>
void quantize(const T *weight, long rows, long width, int bits, uint8_t *data, float *channel, int8_t *scales,
              int threads) {
    const long groups = (width + SCALED - 1) / SCALED, row_size = bits == 8 ? width : (width + 1) / 2;
    constexpr long CHUNK = 16;
    parallel_for(threads, (rows + CHUNK - 1) / CHUNK, [&](long task) {
        float *row = scratch<RowSlot>(padded(width) + groups);
        for (long i = task * CHUNK; i < std::min(rows, (task + 1) * CHUNK); i++) {
            load_row(weight + i * width, width, row);
            if (bits == 8)
                quantize8(row, width, reinterpret_cast<int8_t *>(data) + i * row_size, channel + i);
            else
                quantize4(row, width, row + padded(width), data + i * row_size, channel + i, scales + i * groups);
        }
    });
}

// --- blocks ----------------------------------------------------------------------------------------------

struct Source {
    const uint8_t *data;
    const float *channel;
    const int8_t *scales;
};

// Sixteen rows of words, of which `kept` exist, become units.
void interleave(const uint8_t *rows, long row_size, long kept, long units, uint8_t *out) {
    const long whole = row_size / 4;
    memset(out + whole * UNIT, 0, (units - whole) * UNIT);
    for (long j = 0; j < LANES; j++) {
        if (j >= kept) {
            for (long u = 0; u < whole; u++) memset(out + u * UNIT + j * 4, 0, 4);
            continue;
        }
        const uint8_t *row = rows + j * row_size;
        for (long u = 0; u < whole; u++) memcpy(out + u * UNIT + j * 4, row + u * 4, 4);
        memcpy(out + whole * UNIT + j * 4, row + whole * 4, row_size % 4);
    }
}

void pack_block(const Weight &w, const Source &from, long first, long kept, uint8_t *out) {
    const long columns = w.word_columns(), row_size = (w.width * 4 + columns - 1) / columns;
    const long units = w.groups() * GROUP / columns;
    interleave(from.data + first * row_size, row_size, kept, units, out + w.scale_bytes());
    if (!w.rounds()) return;
    memset(out, 0, w.scale_bytes());
    memcpy(out, from.channel + first, kept * sizeof(float));
    if (w.format != FORMAT_INT4) return;
    const long groups = (w.width + SCALED - 1) / SCALED;
    for (long j = 0; j < kept; j++)
        for (long g = 0; g < groups; g++)
            out[LANES * 4 + g * LANES + j] = (uint8_t)from.scales[(first + j) * groups + g];
}

// Pages of 2 MiB where the system has them: a product walks through all of a weight.
void ask_for_large_pages(void *memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 4096;
    const uintptr_t begin = ((uintptr_t)memory + PAGE - 1) / PAGE * PAGE, end = ((uintptr_t)memory + bytes) / PAGE * PAGE;
    if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

extern "C" long ernie_packed_bytes(const Weight *w) {
    return w->experts * w->parts * w->blocks_of_part() * w->block_bytes();
}

// weight (rows, width) float32 or bfloat16; data, channel scales and group scales as in weights.py.
extern "C" void ernie_quantize(const void *weight, int dtype, long rows, long width, int bits, void *data,
                               float *channel, int8_t *scales, int threads) {
    if (dtype == BFLOAT16)
        quantize(static_cast<const bf16 *>(weight), rows, width, bits, static_cast<uint8_t *>(data), channel, scales,
                 threads);
    else
        quantize(static_cast<const float *>(weight), rows, width, bits, static_cast<uint8_t *>(data), channel, scales,
                 threads);
}

// Fills w->blocks from a weight in the order of files.
extern "C" void ernie_pack(const void *data, const float *channel, const int8_t *scales, const Weight *w, int threads) {
    const Source from{static_cast<const uint8_t *>(data), channel, scales};
    ask_for_large_pages(const_cast<uint8_t *>(w->blocks), ernie_packed_bytes(w));
    const long blocks = w->blocks_of_part();
    parallel_for(threads, w->experts * w->parts * blocks, [&](long i) {
        const long b = i / w->parts % blocks, part = i % w->parts, expert = i / w->parts / blocks;
        const long first = (expert * w->parts + part) * w->outputs + b * LANES;
        pack_block(*w, from, first, std::min<long>(LANES, w->outputs - b * LANES),
                   const_cast<uint8_t *>(w->block(expert, b, part)));
    });
}
