// The two inner products of all kernels, on register tiles.
//
//   dot_tile    out[m][r] = sum_k x[m][k] * w[r][k]     both operands run along k: x @ w.T unpacked
//   outer_gemm  C[m][n] (+)= sum_k A[m][k] * B[k][n]    A broadcast, B and C run along n
//
// Each element of dot_tile is summed in one fixed order, whatever the tile around it: a row's result does
// not depend on the rows it is computed with.
#pragma once

#include "vec.h"

constexpr long SERIAL_PRODUCTS = 64 * 1024;  // below this a second thread costs more than it brings

// --- x @ w.T ------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int DOT_ROWS = 6;  // 4 * 6 accumulators + 6 of x + 1 of w in 32 registers
#else
constexpr int DOT_ROWS = 3;  // 4 * 3 + 3 + 1 in 16
#endif

// How a weight type is read: `width` weights a step, as `parts` vectors.
template <class W>
struct Steps {
    static constexpr int width = VL, parts = 1;
    ERNIE_INLINE vf get(const W *w, int) { return load(w); }
};
// Two bfloat16 lie in each 32-bit lane; a shift or a mask makes a float of either. The order of the sum
// is then even elements, odd elements, and x is packed to match (pack_rows).
template <>
struct Steps<bf16> {
    static constexpr int width = 2 * VL, parts = 2;
    ERNIE_INLINE vf get(const bf16 *w, int part) {
        return as_float(part ? load_raw(w) & 0xffff0000u : load_raw(w) << 16);
    }
};

template <class W>
static long padded_width(long width) {
    return (width + Steps<W>::width - 1) / Steps<W>::width * Steps<W>::width;
}

// One row of x in the order of Steps<W>, zero-padded to padded_width.
template <class W>
static void pack_row(const float *x, long width, float *out) {
    constexpr int step = Steps<W>::width, parts = Steps<W>::parts;
    for (long k = 0; k < width; k += step)
        for (int i = 0; i < step; i++) {
            const long from = k + i % VL * parts + i / VL;
            out[k + i] = from < width ? x[from] : 0.0f;
        }
}

// out[m][r] for M rows of x and four rows of w, whose successors lie `ahead` weights further. The last
// `width % Steps::width` weights are read through a padded copy.
template <class W, int M>
static inline void dot_tile(
    const W *const w[4], long ahead, const float *x, long ldx, long width, float (*out)[4]) {
    constexpr int step = Steps<W>::width, parts = Steps<W>::parts;
    vf acc[4][M] = {};
    const long whole = width / step * step;
    const W *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
    const auto add = [&](const W *const rows[4], const float *xk) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int part = 0; part < parts; part++) {
            vf xs[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) xs[m] = load(xk + m * ldx + part * VL);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                const vf wr = Steps<W>::get(rows[r], part);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) acc[r][m] = fma(wr, xs[m], acc[r][m]);
            }
        }
    };
    for (long k = 0; k < whole; k += step) {
        const W *const rows[4] = {w0 + k, w1 + k, w2 + k, w3 + k};
        // Half as many bytes leave the hardware's prefetcher behind the arithmetic: ask for the next block.
        if (parts > 1 && (M > 1 || VL < 16))
            for (int r = 0; r < 4; r++) __builtin_prefetch(rows[r] + ahead);
        add(rows, x + k);
    }
    if (whole < width) {
        W tails[4][step] = {};
        for (int r = 0; r < 4; r++) memcpy(tails[r], w[r] + whole, (width - whole) * sizeof(W));
        const W *const rows[4] = {tails[0], tails[1], tails[2], tails[3]};
        add(rows, x + whole);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sum4(acc[0][m], acc[1][m], acc[2][m], acc[3][m], out[m]);
}

template <class W>
static void dot_tile(
    int rows, const W *const w[4], long ahead, const float *x, long ldx, long width, float (*out)[4]) {
    switch (rows) {
        case 1: return dot_tile<W, 1>(w, ahead, x, ldx, width, out);
        case 2: return dot_tile<W, 2>(w, ahead, x, ldx, width, out);
        case 3: return dot_tile<W, 3>(w, ahead, x, ldx, width, out);
#if defined(__AVX512F__)
        case 4: return dot_tile<W, 4>(w, ahead, x, ldx, width, out);
        case 5: return dot_tile<W, 5>(w, ahead, x, ldx, width, out);
        case 6: return dot_tile<W, 6>(w, ahead, x, ldx, width, out);
#endif
    }
}

// Rows in tiles of at most `most`, as equal as they can be: 7 is 4 + 3, not 6 + 1.
template <class Body>
ERNIE_INLINE void balanced(long count, long most, const Body &body) {
    const long tiles = (count + most - 1) / most;
    for (long t = 0; t < tiles; t++) {
        const long begin = count * t / tiles;
        body(begin, count * (t + 1) / tiles - begin);
    }
}

// --- A @ B --------------------------------------------------------------------------------------------

constexpr int OUTER_ROWS = 6;
#if defined(__AVX512F__)
constexpr int OUTER_VECTORS = 4;
#else
constexpr int OUTER_VECTORS = 2;
#endif

// Where A lies: A[m][k] is data[m * row + k * column], so a transposed A costs nothing.
struct Broadcast {
    const float *data;
    long row, column;
};

template <class B, int M, int N>
static inline void outer_tile(Broadcast a, const B *b, long ldb, float *c, long ldc, long depth, bool add) {
    vf acc[M][N] = {};
    if (add)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) acc[m][n] = load(c + m * ldc + n * VL);
    for (long k = 0; k < depth; k++) {
        vf bk[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) bk[n] = load(b + k * ldb + n * VL);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const vf amk = splat(a.data[m * a.row + k * a.column]);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) acc[m][n] = fma(amk, bk[n], acc[m][n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) store(c + m * ldc + n * VL, acc[m][n]);
}

template <class B, int N>
static void outer_columns(
    long rows, Broadcast a, const B *b, long ldb, float *c, long ldc, long depth, bool add) {
    balanced(rows, OUTER_ROWS, [&](long m, long tile) {
        const Broadcast at{a.data + m * a.row, a.row, a.column};
        float *cm = c + m * ldc;
        switch (tile) {
            case 1: return outer_tile<B, 1, N>(at, b, ldb, cm, ldc, depth, add);
            case 2: return outer_tile<B, 2, N>(at, b, ldb, cm, ldc, depth, add);
            case 3: return outer_tile<B, 3, N>(at, b, ldb, cm, ldc, depth, add);
            case 4: return outer_tile<B, 4, N>(at, b, ldb, cm, ldc, depth, add);
            case 5: return outer_tile<B, 5, N>(at, b, ldb, cm, ldc, depth, add);
            case 6: return outer_tile<B, 6, N>(at, b, ldb, cm, ldc, depth, add);
        }
    });
}

// C (rows, vectors * VL) = A @ B, or += with `add`.
template <class B>
static void outer_gemm(
    long rows, long vectors, long depth, Broadcast a, const B *b, long ldb, float *c, long ldc, bool add) {
    long v = 0;
    for (; v + OUTER_VECTORS <= vectors; v += OUTER_VECTORS)
        outer_columns<B, OUTER_VECTORS>(rows, a, b + v * VL, ldb, c + v * VL, ldc, depth, add);
    for (; v < vectors; v++)
        outer_columns<B, 1>(rows, a, b + v * VL, ldb, c + v * VL, ldc, depth, add);
}
