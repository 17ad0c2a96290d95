// The likeliest token of each row of logits.
#include <cmath>
#include <vector>

#include "threads.h"
#include "vec.h"

namespace {

constexpr long PIECE = 8 * 1024;  // columns: stays in the first-level cache from one look to the next
constexpr long SERIAL_COLUMNS = 1024 * 1024;  // fewer take less time than waiting for a thread that must wake

struct Found {
    float value;
    long column;
    bool is_number() const { return value == value; }
};

// The first of the largest numbers, or of those that are none, which torch holds for larger.
Found largest_of(const float *x, long begin, long end) {
    const long whole = begin + (end - begin) / VL * VL;
    vf most = splat(-INFINITY), special = {};
    for (long i = begin; i < whole; i += VL) {
        const vf v = load(x + i);
        most = vmax(most, v), special = special + (v - v);  // NaN by a NaN and by an infinity
    }
    Found found{largest(most), -1};
    for (long i = whole; i < end; i++) found.value = x[i] > found.value ? x[i] : found.value;
    const float doubt = sum(special);
    if (doubt != doubt || whole < end)
        for (long i = begin; i < end; i++)
            if (x[i] != x[i]) return {x[i], i};
    for (found.column = begin; x[found.column] != found.value;) found.column++;
    return found;
}

}  // namespace

// x (rows, width) contiguous, out (rows).
extern "C" void ernie_argmax(const float *x, long rows, long width, int64_t *out, int threads) {
    const long pieces = (width + PIECE - 1) / PIECE;
    std::vector<Found> found(rows * pieces);
    parallel_for(rows * width < SERIAL_COLUMNS ? 1 : threads, rows * pieces, [&](long i) {
        const long row = i / pieces, begin = i % pieces * PIECE;
        found[i] = largest_of(x + row * width, begin, begin + PIECE < width ? begin + PIECE : width);
    });
    for (long row = 0; row < rows; row++) {
        const Found *of_row = found.data() + row * pieces, *best = of_row;
        for (long p = 1; p < pieces && best->is_number(); p++)
            if (!of_row[p].is_number() || of_row[p].value > best->value) best = of_row + p;
        out[row] = best->column;
    }
}
