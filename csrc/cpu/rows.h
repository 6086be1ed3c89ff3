// The memory in the caller's layout [N, W], for operators that pass over it once or twice: as many rows at a time as a
// vector has lanes, in arithmetic type, Q numbers each, W rounded up to a multiple of the lanes. A block is worked on
// where the caller has it, or where its rows are not whole vectors of that type in a buffer that stays in L1, filled
// with zeros. Vectors that meet the rows are [R, Q], numbers of each slot [R, P] as in memory.h.
#pragma once

#include "memory_backward.h"

namespace mann::MANN_ISA {

template <typename T> inline int64_t padded_width(int64_t W) { return (W + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }

template <typename T> struct RowBlock {
    static constexpr int rows = kLanes<T>;
    T *const own; // [rows, Q]
    const int64_t N, P, W, Q;
    T *data = own;  // where the block stands, [rows, Q]
    int64_t n0 = 0; // its first slot

    // For f to take and use the blocks of an example one after the other, rows of zeros beyond the last slot among
    // them: what f makes of each slot has no gaps.
    template <typename F> void for_each(F &&f) {
        for (n0 = 0; n0 < P; n0 += rows) f();
    }
    // The block in the caller's memory, null if it cannot be worked on there.
    template <typename S> auto *there(S *memory) const {
        using Same = std::conditional_t<std::is_const_v<S>, const T, T>;
        if constexpr (std::is_same_v<S, Same>) return W == Q && n0 + rows <= N ? memory + n0 * W : nullptr;
        else return static_cast<Same *>(nullptr);
    }
    // The lines of the block behind this one, to read or to write: the hardware does not see that it comes next.
    void ask_for_next(const T *block) const {
        for (int64_t i = 0; i < rows * Q; i += 64 / int64_t(sizeof(T))) prefetch(block + rows * Q + i);
    }
    // To read it.
    template <typename S> void look(const S *memory) {
        const T *found = there(memory);
        data = found ? const_cast<T *>(found) : own;
        if (found) ask_for_next(found);
        else take(memory);
    }
    // To write it; then it is to be given.
    template <typename S> void place(S *memory) {
        T *found = there(memory);
        data = found ? found : own;
        if (found) ask_for_next(found);
    }
    template <typename S> void give(S *memory) const {
        if (data != own) return;
        for (int64_t i = 0; i < std::min<int64_t>(rows, N - n0); ++i)
            for (int64_t q = 0; q < Q; q += kLanes<T>)
                store_storage(memory + (n0 + i) * W + q, load(data + i * Q + q), W - q);
    }
    // A copy of the caller's rows, wherever the block stands.
    template <typename S> void take(const S *memory) const {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t q = 0; q < Q; q += kLanes<T>)
                store(data + i * Q + q, n0 + i < N ? load_arith(memory + (n0 + i) * W + q, W - q) : Vec<T>{});
    }
    // The caller's rows without those of some slots, there or as a copy here.
    template <typename S> const T *erased(const S *memory, const int32_t *slots, int64_t count) const {
        const auto here = [this](int32_t slot) { return slot >= n0 && slot < n0 + rows; };
        const T *found = there(memory);
        if (found) ask_for_next(found);
        if (found && std::none_of(slots, slots + count, here)) return found;
        take(memory);
        erase(slots, count);
        return data;
    }
    void erase(const int32_t *slots, int64_t count) const {
        for (int64_t e = 0; e < count; ++e)
            if (slots[e] >= n0 && slots[e] < n0 + rows) std::fill_n(data + (slots[e] - n0) * Q, Q, T(0));
    }
    // row n = row n of `from` (null: zero) + sum over h of weights[h, n] * vectors[h], and less factor[n] * row n of
    // `other` where there is one.
    void outer(int64_t R, const T *weights, const T *vectors, const T *from, const T *factor = nullptr,
               const T *other = nullptr) const {
        constexpr int group = rows < 8 ? rows : 8;
        for (int64_t i0 = 0; i0 < rows; i0 += group)
            for (int64_t q = 0; q < Q; q += kLanes<T>) {
                Vec<T> m[group] = {};
                if (from) {
#pragma GCC unroll 16
                    for (int i = 0; i < group; ++i) m[i] = load(from + (i0 + i) * Q + q);
                }
                for (int64_t h = 0; h < R; ++h) {
                    const Vec<T> vector = load(vectors + h * Q + q);
#pragma GCC unroll 16
                    for (int i = 0; i < group; ++i) m[i] += broadcast(weights[h * P + n0 + i0 + i]) * vector;
                }
                if (factor) {
#pragma GCC unroll 16
                    for (int i = 0; i < group; ++i)
                        m[i] -= broadcast(factor[n0 + i0 + i]) * load(other + (i0 + i) * Q + q);
                }
#pragma GCC unroll 16
                for (int i = 0; i < group; ++i) store(data + (i0 + i) * Q + q, m[i]);
            }
    }
    // dots[h, n] = row n . vectors[h]
    void dot(int64_t R, const T *vectors, T *dots) const {
        for (int64_t h = 0; h < R; ++h) {
            Vec<T> sums[rows] = {};
            for (int64_t q = 0; q < Q; q += kLanes<T>) {
                const Vec<T> vector = load(vectors + h * Q + q);
#pragma GCC unroll 16
                for (int i = 0; i < rows; ++i) sums[i] += vector * load(data + i * Q + q);
            }
            store(dots + h * P + n0, sum_each(sums));
        }
    }
    void square(T *row_squares) const {
        Vec<T> sums[rows] = {};
        for (int64_t q = 0; q < Q; q += kLanes<T>)
#pragma GCC unroll 16
            for (int i = 0; i < rows; ++i) {
                const Vec<T> m = load(data + i * Q + q);
                sums[i] += m * m;
            }
        store(row_squares + n0, sum_each(sums));
    }
    // sums[h] += sum over n of weights[h, n] * row n
    void add_sums(int64_t R, const T *weights, T *sums) const {
        in_groups<kHeadGroup>(R, [&](auto group, int64_t h0) {
            constexpr int heads = group;
            in_groups<2>(Q / kLanes<T>, [&](auto pair, int64_t column) {
                constexpr int columns = pair;
                T *out = sums + h0 * Q + column * kLanes<T>;
                Vec<T> sum[heads][columns];
#pragma GCC unroll 16
                for (int h = 0; h < heads; ++h)
#pragma GCC unroll 16
                    for (int j = 0; j < columns; ++j) sum[h][j] = load(out + h * Q + j * kLanes<T>);
#pragma GCC unroll 16
                for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
                    for (int j = 0; j < columns; ++j) {
                        const Vec<T> m = load(data + i * Q + (column + j) * kLanes<T>);
#pragma GCC unroll 16
                        for (int h = 0; h < heads; ++h) sum[h][j] += broadcast(weights[(h0 + h) * P + n0 + i]) * m;
                    }
#pragma GCC unroll 16
                for (int h = 0; h < heads; ++h)
#pragma GCC unroll 16
                    for (int j = 0; j < columns; ++j) store(out + h * Q + j * kLanes<T>, sum[h][j]);
            });
        });
    }
};

} // namespace mann::MANN_ISA
