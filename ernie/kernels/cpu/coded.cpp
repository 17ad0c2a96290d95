// Making the blocks of coded.h.
#include "coded.h"

#include <atomic>
#include <vector>

#include "packing.h"

namespace {

constexpr int CODES = 16, BYTES = 256;
constexpr uint8_t NO_CODE = 0x80;

struct Source {
    const uint16_t *rows;  // of a block: `kept` rows of `width` bfloat16
    long kept, width;
};

// Zero and, of the high bytes of a block, the most frequent others. Of a large block every third weight is counted:
// enough to know which are frequent.
struct Table {
    uint8_t bytes[CODES] = {};
    uint8_t codes[BYTES];  // of every high byte

    explicit Table(const Source &from) {
        uint32_t counts[2][BYTES] = {};  // neighbours are often equal: counted apart, they need not wait
        const long size = from.kept * from.width, step = size > 4096 ? 3 : 1;
        for (long i = 0; i < size; i += step) counts[i % 2][from.rows[i] >> 8]++;
        for (int byte = 0; byte < BYTES; byte++) counts[0][byte] += counts[1][byte];
        memset(codes, NO_CODE, sizeof codes);
        codes[0] = 0;
        for (int code = 1; code < CODES; code++) {
            int best = -1;
            for (int byte = 0; byte < BYTES; byte++)
                if (codes[byte] == NO_CODE && (best < 0 || counts[0][byte] > counts[0][best])) best = byte;
            bytes[code] = (uint8_t)best, codes[best] = (uint8_t)code;
        }
    }
};

// Eight columns of a row: their low bytes and codes, the first column in the lowest byte.
struct Eight {
    uint64_t low = 0, code = 0;

    Eight(const Table &table, const Source &from, long row, long column, std::vector<Escape> &escapes) {
        bf16 values[8] = {};
        const uint16_t *words = from.rows + row * from.width + column;
        if (column + 8 <= from.width)
            memcpy(values, words, sizeof values);
        else
            memcpy(values, words, (from.width - column) * sizeof(bf16));
        for (int c = 0; c < 8; c++) {
            low |= (uint64_t)(values[c].bits & 255) << 8 * c;
            code |= (uint64_t)table.codes[values[c].bits >> 8] << 8 * c;
        }
        if (!(code & 0x0101010101010101u * NO_CODE)) return;
        for (int c = 0; c < 8; c++) {
            const uint64_t byte = (uint64_t)255 << 8 * c;
            if (!(code & byte & 0x0101010101010101u * NO_CODE)) continue;
            escapes.push_back({(uint32_t)((column + c) * LANES + row), load_one(values + c)});
            low &= ~byte, code &= ~byte;
        }
    }
    void store(long row, uint8_t *units) const {
        const uint32_t codes = (uint32_t)(code | code >> 28);
        const auto put = [&](long at, uint64_t pair) {
            const uint8_t bytes[2] = {(uint8_t)pair, (uint8_t)(pair >> 8)};
            memcpy(units + row / 4 * 16 + row % 4 * 2 + at, bytes, 2);
        };
        put(0, low), put(8, low >> 16), put(UNIT, low >> 32), put(UNIT + 8, low >> 48);
        put(2 * UNIT, codes), put(2 * UNIT + 8, codes >> 16);
    }
};

void code_block(const Weight &w, const Source &from, uint8_t *block, std::vector<Escape> &escapes) {
    const Table table(from);
    CodedHeader header{};
    memcpy(header.table, table.bytes, sizeof header.table);
    memcpy(block, &header, sizeof header);
    uint8_t *units = block + w.unit_at(0);
    for (long k = 0; k < w.groups() * GROUP; k += 8, units += 3 * UNIT) {
        if (from.kept < LANES || k >= w.width) memset(units, 0, 3 * UNIT);
        for (long j = 0; j < from.kept && k < w.width; j++) Eight(table, from, j, k, escapes).store(j, units);
    }
}

}  // namespace

// Fills w->blocks from a bfloat16 weight in the order of files, and the memory behind them with up to `most`
// escapes. `num_escapes` is set; where it is larger than `most`, the blocks are of no use.
extern "C" void ernie_pack_coded(const uint16_t *data, const Weight *w, long most, int64_t *num_escapes, int threads) {
    Escape *memory = reinterpret_cast<Escape *>(const_cast<uint8_t *>(w->block(w->experts, 0, 0)));
    std::atomic<long> used{0};
    pack_blocks(*w, threads, [&](uint8_t *block, long first, long kept) {
        static thread_local std::vector<Escape> escapes;
        if (used.load(std::memory_order_relaxed) > most) return;
        escapes.clear();
        code_block(*w, {data + first * w->width, kept, w->width}, block, escapes);
        const long count = escapes.size(), begin = used.fetch_add(count, std::memory_order_relaxed);
        if (begin + count > most) return;
        CodedHeader &header = *reinterpret_cast<CodedHeader *>(block);
        header.count = count;
        header.offset = reinterpret_cast<uint8_t *>(memory + begin) - block;
        if (count) memcpy(memory + begin, escapes.data(), count * sizeof(Escape));
    });
    *num_escapes = used;
}
