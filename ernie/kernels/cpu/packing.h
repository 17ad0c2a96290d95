// Blocks of a weight in memory of their own.
#pragma once

#include <sys/mman.h>

#include <algorithm>

#include "threads.h"
#include "weight.h"

// Pages of 2 MiB where the system has them: a product walks through all of a weight.
static void ask_for_large_pages(void *memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 4096;
    const uintptr_t begin = ((uintptr_t)memory + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = ((uintptr_t)memory + bytes) / PAGE * PAGE;
    if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// make(block, first, kept) for each block, and the rows of the weight that it holds.
template <class Make>
static void pack_blocks(const Weight &w, int threads, const Make &make) {
    const long blocks = w.blocks_of_part(), count = w.experts * w.parts * blocks;
    ask_for_large_pages(const_cast<uint8_t *>(w.blocks), count * w.block_bytes());
    parallel_for(threads, count, [&](long i) {
        const long b = i / w.parts % blocks, part = i % w.parts, expert = i / w.parts / blocks;
        const long first = (expert * w.parts + part) * w.outputs + b * LANES;
        make(const_cast<uint8_t *>(w.block(expert, b, part)), first, std::min<long>(LANES, w.outputs - b * LANES));
    });
}
