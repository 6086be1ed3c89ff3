// A tile of a matrix product by a block, in arithmetic type: device code.
#pragma once

#include "device.h"

#include "augmented_linear.h"

namespace mann::cuda {

using S = MANN_STORAGE;
using T = Arith<S>;

constexpr int kI = MANN_I, kO = MANN_O;

struct Tile {
    static constexpr LinearTile t{MANN_LARGE != 0};
    static constexpr int kRowGroups = t.row_groups, kColumnGroups = t.column_groups, kSlices = t.slices;
    static constexpr int kRows = t.rows(), kColumns = t.columns(), kUnits = kRowGroups * kColumnGroups;
    // Of the two operands in shared memory, deep ones beside each other; on 16 bytes.
    static constexpr int kRowStride = kRows + 4, kColumnStride = kColumns + 4;
    static constexpr int kA = kLinearDepth * kRowStride, kB = kLinearDepth * kColumnStride;
    // Weights that are in shared memory at once.
    static constexpr int kWeights = 7680 / kB < 1 ? 1 : 7680 / kB;
    static_assert(kUnits * kSlices == kLinearThreads);
};

// Where this thread's numbers stand. A group of rows has neighbouring threads.
struct Place {
    int row, column, slice, unit;
    MANN_INLINE Place()
        : row(int(threadIdx.x) / (Tile::kColumnGroups * Tile::kSlices) * 4),
          column(int(threadIdx.x) % Tile::kColumnGroups * 4),
          slice(int(threadIdx.x) / Tile::kColumnGroups % Tile::kSlices),
          unit(row / 4 * Tile::kColumnGroups + column / 4) {}
};

// f(k, i) for all k < kLinearDepth and i < count, shared out over the threads; deep ones are neighbours in memory where
// `deep` says so.
template <bool deep, int count, typename F> MANN_INLINE void for_operand(F &&f) {
    constexpr int kInner = deep ? kLinearDepth : count, kOuter = deep ? count : kLinearDepth;
    constexpr int kStep = kLinearThreads / kInner;
    static_assert(kOuter % kStep == 0);
    const int inner = int(threadIdx.x) % kInner, first = int(threadIdx.x) / kInner;
#pragma unroll
    for (int i = 0; i < kOuter / kStep; ++i) {
        const int outer = first + i * kStep;
        f(deep ? inner : outer, deep ? outer : inner);
    }
}

// sum += this slice's part of a b.
MANN_INLINE void add_product(T (&sum)[4][4], const Place &place, const T *a, const T *b) {
#pragma unroll 4
    for (int k = place.slice; k < kLinearDepth; k += Tile::kSlices) {
        const Four<T> x = *reinterpret_cast<const Four<T> *>(a + k * Tile::kRowStride + place.row);
        const Four<T> y = *reinterpret_cast<const Four<T> *>(b + k * Tile::kColumnStride + place.column);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i][j] += x[i] * y[j];
    }
}

// f(row, column, numbers [count]) for all of the tile, the slices summed in order.
template <int count, typename F> MANN_INLINE void for_sums(const T (&sums)[count][4][4], T *shared, F &&f) {
    const Place place;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 16 * count; ++i)
        shared[(place.slice * 16 * count + i) * Tile::kUnits + place.unit] = sums[i / 16][i / 4 % 4][i % 4];
    __syncthreads();
    for (int at = int(threadIdx.x); at < Tile::kRows * Tile::kColumns; at += kLinearThreads) {
        const int row = at / Tile::kColumns, column = at % Tile::kColumns;
        const int unit = row / 4 * Tile::kColumnGroups + column / 4, number = row % 4 * 4 + column % 4;
        T numbers[count] = {};
#pragma unroll 4
        for (int slice = 0; slice < Tile::kSlices; ++slice)
#pragma unroll
            for (int i = 0; i < count; ++i)
                numbers[i] += shared[(slice * 16 * count + i * 16 + number) * Tile::kUnits + unit];
        f(row, column, numbers);
    }
}

// Weight number s of task g: 0 the slow one, then the rows of the memory.
MANN_INLINE const S *weight_of(const AugmentedLayer<S> &layer, int64_t g, int64_t s) {
    return s == 0 ? layer.weight : layer.fast + g * layer.task_stride + (s - 1) * layer.row_stride;
}
// How much of it an example has, if there is such an example.
MANN_INLINE T share_of(const AugmentedLayer<S> &layer, int64_t example, int64_t s, bool exists) {
    const bool is_mixed = s > 0 && layer.mix;
    const S mix = load_if(exists && is_mixed, layer.mix + example * layer.rows + s - 1);
    return is_mixed ? to_arith(mix) : T(1);
}

// Of `count` weights from s0 on, kLinearDepth x kColumns numbers each, [k][column]: copy(target, weight, k, column).
template <bool deep, typename F>
MANN_INLINE void copy_weights(const AugmentedLayer<S> &layer, int64_t g, int64_t s0, int count, T *shared, F &&copy) {
    for (int s = 0; s < count; ++s) {
        const S *weight = weight_of(layer, g, s0 + s);
        for_operand<deep, Tile::kColumns>([&](int k, int column) {
            copy(shared + s * Tile::kB + k * Tile::kColumnStride + column, weight, k, column);
        });
    }
}

// The shares of `count` weights from s0 on, of the tile's examples: [weight][row].
MANN_INLINE void load_shares(const AugmentedLayer<S> &layer, int64_t g, int64_t l0, int64_t s0, int count, T *shares) {
    for (int at = int(threadIdx.x); at < count * Tile::kRows; at += kLinearThreads) {
        const int64_t l = l0 + at % Tile::kRows;
        shares[at] = share_of(layer, g * layer.L + l, s0 + at / Tile::kRows, l < layer.L);
    }
}

} // namespace mann::cuda
