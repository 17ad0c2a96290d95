// Making weights of 8, 6 and 4 bits, and putting weights in the order of blocks.h.
//
// The formats are those of ernie/kernels/weights.py, the integers those of `quantize` in
// ernie/kernels/reference.py: divisions and roundings are done as there.
#include <algorithm>
#include <cmath>

#include "packing.h"
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

ERNIE_INLINE void store_integers(int32_t *to, vf v) {
    const vi integers = nearest(v);
    memcpy(to, &integers, sizeof integers);
}

// --- 8 bits ----------------------------------------------------------------------------------------------

void quantize8(const float *row, long width, int8_t *data, float *scale) {
    *scale = largest_magnitude(row, padded(width)) / 127;
    const vf divisor = splat(nonzero(*scale));
    for (long k = 0; k < width; k += GROUP) {
        alignas(64) int32_t integers[GROUP];
        alignas(64) int8_t bytes[GROUP];
        for (long i = 0; i < GROUP; i += VL) store_integers(integers + i, load(row + k + i) / divisor);
        for (long i = 0; i < GROUP; i++) bytes[i] = (int8_t)integers[i];
        memcpy(data + k, bytes, std::min(GROUP, width - k));
    }
}

// --- groups of columns that share a scale ----------------------------------------------------------------

// What is tried as the integer of the value of largest magnitude (EXTREMES of the reference).
constexpr float EXTREMES4[] = {-7.0f, -7.5f, -8.0f, -8.5f, -9.0f, -9.5f, 7.0f, 7.5f};
constexpr float EXTREMES6[] = {-31.0f, -32.0f, -33.0f};

// The nearest integers of 4 or 6 bits.
template <int BITS>
ERNIE_INLINE vf integers_of(const float *w, vf scale) {
    constexpr float zero = 1 << (BITS - 1);
    return vmin(vmax(rounded(load(w) / scale), splat(-zero)), splat(zero - 1));
}

// The value of largest magnitude, the first one among equals.
float extreme_of(const float *w) {
    vf above = {}, below = {};
    for (long k = 0; k < SCALED; k += VL) above = vmax(above, load(w + k)), below = vmax(below, -load(w + k));
    const float positive = largest(above), negative = largest(below);
    if (positive != negative) return positive > negative ? positive : -negative;
    const float *first = std::find_if(w, w + SCALED - 1, [&](float v) { return std::fabs(v) == positive; });
    return *first;
}

// The scale of 32 columns with the least squared error, of the candidates tried (see the reference).
template <int BITS>
float group_scale(const float *w) {
    const float extreme = extreme_of(w);
    float best = 0, gain = 0;
    const auto attempt = [&](float target) {
        const vf scale = splat(nonzero(extreme / target));
        vf products = {}, squares = {};
        for (long k = 0; k < SCALED; k += VL) {
            const vf q = integers_of<BITS>(w + k, scale);
            products = fma(load(w + k), q, products);
            squares = fma(q, q, squares);
        }
        const float wq = sum(products), qq = nonzero(sum(squares)), explained = wq * wq / qq;
        if (explained > gain) best = wq / qq, gain = explained;
    };
    if (BITS == 4)
        for (const float target : EXTREMES4) attempt(target);
    else
        for (const float target : EXTREMES6) attempt(target);
    return best;
}

// 4 bits: two integers, plus 8, in a byte; 6 bits: an integer in a byte.
template <int BITS>
void quantize_groups(const float *row, long width, float *best, uint8_t *data, float *channel, int8_t *scales) {
    const long groups = (width + SCALED - 1) / SCALED;
    float most = 0;
    for (long g = 0; g < groups; g++) {
        best[g] = group_scale<BITS>(row + g * SCALED);
        most = std::max(most, std::fabs(best[g]));
    }
    *channel = most / 127;
    for (long g = 0; g < groups; g++) {
        scales[g] = (int8_t)std::nearbyint(best[g] / nonzero(*channel));
        const vf scale = splat(nonzero(scales[g] * *channel));
        alignas(64) int32_t integers[SCALED];
        uint8_t bytes[SCALED];
        for (long k = 0; k < SCALED; k += VL) store_integers(integers + k, integers_of<BITS>(row + g * SCALED + k, scale));
        const long kept = std::min(SCALED, width - g * SCALED);
        if (BITS == 4) {
            for (long i = 0; i < SCALED / 2; i++)
                bytes[i] = (uint8_t)((integers[2 * i] + 8) | (integers[2 * i + 1] + 8) << 4);
            memcpy(data + g * SCALED / 2, bytes, (kept + 1) / 2);
        } else {
            for (long i = 0; i < SCALED; i++) bytes[i] = (uint8_t)integers[i];
            memcpy(data + g * SCALED, bytes, kept);
        }
    }
}

template <class T>
void quantize(const T *weight, long rows, long width, int bits, uint8_t *data, float *channel, int8_t *scales,
              int threads) {
    const long groups = (width + SCALED - 1) / SCALED, row_size = bits == 4 ? (width + 1) / 2 : width;
    constexpr long CHUNK = 16;
    parallel_for(threads, (rows + CHUNK - 1) / CHUNK, [&](long task) {
        float *row = scratch<RowSlot>(padded(width) + groups);
        for (long i = task * CHUNK; i < std::min(rows, (task + 1) * CHUNK); i++) {
            load_row(weight + i * width, width, row);
            uint8_t *to = data + i * row_size;
            if (bits == 8)
                quantize8(row, width, reinterpret_cast<int8_t *>(to), channel + i);
            else
                (bits == 4 ? quantize_groups<4> : quantize_groups<6>)(row, width, row + padded(width), to, channel + i,
                                                                      scales + i * groups);
        }
    });
}

// --- and back --------------------------------------------------------------------------------------------

// A row of nibbles: of each group, the sixteen values times its scale and the row's, then a look-up.
void dequantize4(const uint8_t *row, long width, const float *levels, const float *groups, long group_size,
                 float channel, float *out) {
    for (long first = 0; first < width; first += group_size) {
        float values[16];
        for (int i = 0; i < 16; i++) values[i] = levels[i] * groups[first / group_size] * channel;
        const long end = std::min(width, first + group_size);
        long k = first;
        for (; k + 1 < end; k += 2) {
            out[k] = values[row[k / 2] & 15];
            out[k + 1] = values[row[k / 2] >> 4];
        }
        if (k < end) out[k] = values[row[k / 2] & 15];
    }
}

// --- blocks ----------------------------------------------------------------------------------------------

struct Source {
    const uint8_t *data;
    const float *channel;
    const int8_t *scales;
};

// Four words of four rows.
ERNIE_INLINE void transpose(const uint8_t *rows, long row_size, uint8_t *out) {
#if defined(__SSE2__)
    const auto row = [&](int j) { return _mm_loadu_ps(reinterpret_cast<const float *>(rows + j * row_size)); };
    __m128 a = row(0), b = row(1), c = row(2), d = row(3);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    const auto put = [&](int u, __m128 v) { _mm_storeu_ps(reinterpret_cast<float *>(out + u * UNIT), v); };
    put(0, a), put(1, b), put(2, c), put(3, d);
#else
    for (int j = 0; j < 4; j++)
        for (int u = 0; u < 4; u++) memcpy(out + u * UNIT + j * 4, rows + j * row_size + u * 4, 4);
#endif
}

// Sixteen rows of words, of which `kept` exist, become the units of a block.
void interleave(const Weight &w, const uint8_t *rows, long row_size, long kept, uint8_t *block) {
    const long fours = kept == LANES ? row_size / 16 * 4 : 0;
    for (long u = 0; u < fours; u += 4)
        for (long j = 0; j < LANES; j += 4)
            transpose(rows + j * row_size + u * 4, row_size, block + w.unit_at(u) + j * 4);
    for (long u = fours; u < w.units(); u++) memset(block + w.unit_at(u), 0, UNIT);
    for (long j = 0; j < kept; j++)
        for (long byte = fours * 4; byte < row_size; byte += 4)
            memcpy(block + w.unit_at(byte / 4) + j * 4, rows + j * row_size + byte, std::min(4L, row_size - byte));
}

// Sixteen rows of bytes become the units of a block of int6.
void interleave6(const Weight &w, const uint8_t *rows, long kept, uint8_t *block) {
    memset(block + UNIT, 0, w.block_bytes() - UNIT);
    for (long j = 0; j < kept; j++)
        for (long k = 0; k < w.width; k++) {
            const int integer = (int8_t)rows[j * w.width + k] + 32;
            uint8_t *at = block + w.unit_at(k / 16 * 3) + j * 4 + k % 4;
            if (const long unit = k / 4 % 4; unit < 3)
                at[unit * UNIT] |= integer;
            else
                for (int n = 0; n < 3; n++) at[n * UNIT] |= (integer >> (4 - 2 * n) & 3) << 6;
        }
}

void pack_block(const Weight &w, const Source &from, long first, long kept, uint8_t *out) {
    if (w.format == FORMAT_INT6) {
        interleave6(w, from.data + first * w.width, kept, out);
    } else {
        const long columns = w.word_columns(), row_size = (w.width * 4 + columns - 1) / columns;
        interleave(w, from.data + first * row_size, row_size, kept, out);
    }
    if (!w.rounds()) return;
    memset(out, 0, LANES * 4);
    memcpy(out, from.channel + first, kept * sizeof(float));
    if (!w.has_groups()) return;
    constexpr long together = UNIT / LANES;  // groups whose scales share a unit
    const long groups = w.groups(), units = w.units() / groups;
    for (long g = 0; g < groups; g++) {
        uint8_t *unit = out + w.unit_at(g / together * together * units) - UNIT;
        if (g % together == 0) memset(unit, 0, UNIT);
        for (long j = 0; j < kept; j++)
            unit[g % together * LANES + j] = (uint8_t)from.scales[(first + j) * groups + g];
    }
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

// Rows of a quantised weight as float32, multiplied in the order of `QuantTensor.dequantized`. With 4 bits `levels`
// are the sixteen values of a nibble, and `groups` the scales of groups of `group_size` columns, as floats.
extern "C" void ernie_dequantize(const void *data, const float *channel, const float *groups, const float *levels,
                                 int bits, long group_size, long rows, long width, float *out, int threads) {
    constexpr long CHUNK = 16;
    parallel_for(threads, (rows + CHUNK - 1) / CHUNK, [&](long task) {
        for (long i = task * CHUNK; i < std::min(rows, (task + 1) * CHUNK); i++) {
            float *to = out + i * width;
            const long num_groups = (width + group_size - 1) / group_size;
            if (bits != 4) {
                const int8_t *row = static_cast<const int8_t *>(data) + i * width;
                const float *scales = bits == 6 ? groups + i * num_groups : nullptr;
                for (long k = 0; k < width; k++)
                    to[k] = (scales ? row[k] * scales[k / group_size] : row[k]) * channel[i];
            } else {
                const long row_size = (width + 1) / 2;
                dequantize4(static_cast<const uint8_t *>(data) + i * row_size, width, levels, groups + i * num_groups,
                            group_size, channel[i], to);
            }
        }
    });
}

// Fills w->blocks from a weight in the order of files.
extern "C" void ernie_pack(const void *data, const float *channel, const int8_t *scales, const Weight *w, int threads) {
    const Source from{static_cast<const uint8_t *>(data), channel, scales};
    pack_blocks(*w, threads, [&](uint8_t *block, long first, long kept) {
        pack_block(*w, from, first, kept, block);
    });
}
