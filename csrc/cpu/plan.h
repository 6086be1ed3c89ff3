// The layout of a kernel's scratch memory, said once: the host takes its size, the kernel the places.
#pragma once

#include <cstdint>

namespace mann {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Blocks of scratch one after the other, on cache lines where the base is; the numbers are offsets.
struct Plan {
    int64_t size = 0;
    int64_t take(int64_t numbers) {
        const int64_t start = size;
        size += round_up(numbers, 16);
        return start;
    }
};

} // namespace mann
