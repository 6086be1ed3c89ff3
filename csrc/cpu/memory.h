// How the memory of one example stands while a kernel works on it.
//
// The slots fill vector lanes: their number N is rounded up to P, a multiple of kSlotPadding, so no kernel has a tail
// to treat apart, and a dot product with a key is one multiply-add per element with no sum across lanes. Memory [N, W]
// becomes tiles of kTileSlots slots (the last one may be narrower), each [W, slots of the tile]: what is used together
// stays in L1, and rows are never 4096 bytes apart, where stores and loads would fall into the same cache set. Every
// other array over slots is [P] or [R, P]. The padding of memory, weights and gradients is zero.
#pragma once

#include <algorithm>
#include <limits>

#include "kernel.h"
#include "simd.h"

#include "../cells.h"

namespace mann::MANN_ISA {

constexpr int64_t kSlotPadding = 16;
inline int64_t padded_slots(int64_t N) { return (N + kSlotPadding - 1) / kSlotPadding * kSlotPadding; }

template <typename T> struct MemoryShape {
    int64_t N, P, W, R;
    bool shared, erase_all; // least-used slots: n-hot for every head, or one each; which of them are erased
    T decay, eps;

    int64_t erased() const { return erase_all ? R : 1; }
};

template <typename T> inline MemoryShape<T> memory_shape(const StepOptions &o) {
    return {o.N, padded_slots(o.N), o.W, o.R, o.shared, o.erase_all, T(o.decay), T(o.eps)};
}

// At most this many heads share a pass over memory, so that their accumulators stay in registers.
constexpr int kHeadGroup = 4;

constexpr int64_t kTileSlots = 256;

// Calls f(n0, width) for every tile: its first slot, and its slots. The tile stands n0 * W numbers into the memory.
template <typename F> inline void in_tiles(int64_t P, F &&f) {
    for (int64_t n0 = 0; n0 < P; n0 += kTileSlots) f(n0, P - n0 < kTileSlots ? P - n0 : kTileSlots);
}

// From [N, W] into tiles, and back.
template <typename S> inline void take_memory(int64_t N, int64_t P, int64_t W, const S *source, Arith<S> *memory) {
    in_tiles(P, [=](int64_t n0, int64_t width) {
        transpose(source + n0 * W, W, N - n0 < width ? N - n0 : width, W, memory + n0 * W, width, width);
    });
}
template <typename S> inline void give_memory(int64_t N, int64_t P, int64_t W, const Arith<S> *memory, S *target) {
    in_tiles(P, [=](int64_t n0, int64_t width) {
        transpose(memory + n0 * W, width, W, N - n0 < width ? N - n0 : width, target + n0 * W, W, W);
    });
}

// Where the row of a slot begins, and how far apart its numbers are.
template <typename T> struct Slot {
    T *first;
    int64_t stride;
};
template <typename T> inline Slot<T> slot_of(const MemoryShape<T> &s, T *memory, int64_t slot) {
    const int64_t n0 = slot / kTileSlots * kTileSlots;
    return {memory + n0 * s.W + slot - n0, std::min(s.P - n0, kTileSlots)};
}
template <typename T> inline void get_slot(const MemoryShape<T> &s, T *memory, int64_t slot, T *row) {
    const Slot<T> at = slot_of(s, memory, slot);
    for (int64_t w = 0; w < s.W; ++w) row[w] = at.first[w * at.stride];
}
// The row [W] becomes that of the slot; null is zero.
template <typename T> inline void set_slot(const MemoryShape<T> &s, T *memory, int64_t slot, const T *row) {
    const Slot<T> at = slot_of(s, memory, slot);
    for (int64_t w = 0; w < s.W; ++w) at.first[w * at.stride] = row ? row[w] : 0;
}

} // namespace mann::MANN_ISA
