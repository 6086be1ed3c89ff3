// How the threads of a block share the work on the memory of one example, and how its numbers stand.
//
// Numbers per head come in groups of four heads, so that a thread has those of a slot, or of a place in a row, with one
// load: an array over heads and n things is [G, n, 4] with G = head_groups(R), and the heads that do not exist are
// zero.
#pragma once

#include "device.h"

#define MANN_BOTH __host__ MANN_INLINE

namespace mann::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kLanes = 32;
constexpr int kHeadGroup = 4;

MANN_BOTH int head_groups(int R) { return (R + kHeadGroup - 1) / kHeadGroup; }
// Where head h of thing i of n stands.
MANN_BOTH int of_head(int h, int i, int n) { return (h / kHeadGroup * n + i) * kHeadGroup + h % kHeadGroup; }

template <typename T> struct alignas(16) Heads {
    T head[kHeadGroup];
};
template <typename T> MANN_INLINE Heads<T> load_heads(const T *source, int i) {
    return reinterpret_cast<const Heads<T> *>(source)[i];
}
template <typename T> MANN_INLINE void store_heads(T *target, int i, const Heads<T> &value) {
    reinterpret_cast<Heads<T> *>(target)[i] = value;
}
template <typename T> MANN_INLINE T dot(const Heads<T> &a, const Heads<T> &b) {
    T sum = 0;
#pragma unroll
    for (int j = 0; j < kHeadGroup; ++j) sum += a.head[j] * b.head[j];
    return sum;
}
// sum += factor * x
template <typename T> MANN_INLINE void add_to(Heads<T> &sum, T factor, const Heads<T> &x) {
#pragma unroll
    for (int j = 0; j < kHeadGroup; ++j) sum.head[j] += factor * x.head[j];
}

// Over each `lanes` neighbouring threads of a warp, a power of two; every thread gets the sum.
template <typename T> MANN_INLINE T sum_lanes(T x, int lanes = kLanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kWholeWarp, x, distance);
    return x;
}
template <typename T> MANN_INLINE Heads<T> sum_lanes(Heads<T> x, int lanes) {
#pragma unroll
    for (int j = 0; j < kHeadGroup; ++j) x.head[j] = sum_lanes(x.head[j], lanes);
    return x;
}
template <typename T> MANN_INLINE T largest_lane(T x) {
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        const T other = __shfl_xor_sync(kWholeWarp, x, distance);
        x = other > x ? other : x;
    }
    return x;
}

MANN_INLINE int warp_of_block() { return int(threadIdx.x) / kLanes; }
MANN_INLINE int warps_of_block() { return int(blockDim.x) / kLanes; }
MANN_INLINE int lane_of_warp() { return int(threadIdx.x) % kLanes; }

// f(h) for every head, each by one warp.
template <typename F> MANN_INLINE void for_heads(int R, F &&f) {
    for (int h = warp_of_block(); h < R; h += warps_of_block()) f(h);
}
// f(n, lane, exists) for every row, each by `lanes` threads of a warp. A warp stays together, for its shuffles: some of
// its rows may not exist.
template <typename F> MANN_INLINE void for_rows(int N, int lanes, F &&f) {
    const int at_once = int(blockDim.x) / lanes, mine = int(threadIdx.x) / lanes;
    const int of_warp = warp_of_block() * kLanes / lanes;
    for (int first = 0; first + of_warp < N; first += at_once)
        f(first + mine, int(threadIdx.x) % lanes, first + mine < N);
}
// f(n, w, i) for every number i = n * W + w, neighbours by neighbouring threads.
template <typename F> MANN_INLINE void for_numbers(int N, int W, F &&f) {
    const int step_n = int(blockDim.x) / W, step_w = int(blockDim.x) % W;
    int n = int(threadIdx.x) / W, w = int(threadIdx.x) % W;
    for (int i = int(threadIdx.x); n < N; i += int(blockDim.x)) {
        f(n, w, i);
        n += step_n, w += step_w;
        if (w >= W) w -= W, ++n;
    }
}
template <typename F> MANN_INLINE void for_each(int count, F &&f) {
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) f(i);
}

// A sum over rows for every column is taken in parts, one thread for a column of one part.
MANN_BOTH int column_parts(int N, int W, int threads) {
    const int parts = threads / W < N ? threads / W : N;
    return parts < 1 ? 1 : parts;
}
// f(w, part) for every column of every part, whose rows are part, part + parts, ...
template <typename F> MANN_INLINE void for_columns(int W, int parts, F &&f) {
    for_each(parts * W, [&](int i) { f(i % W, i / W); });
}

// Rows [N, W] of `source` to rows that stand `stride` apart, and back. A null source is zero.
template <typename S> MANN_INLINE void take_rows(const S *source, int N, int W, int stride, Arith<S> *target) {
    for_numbers(N, W,
                [&](int n, int w, int i) { target[n * stride + w] = source ? to_arith(source[i]) : Arith<S>(0); });
}
template <typename S> MANN_INLINE void give_rows(const Arith<S> *source, int N, int W, int stride, S *target) {
    for_numbers(N, W, [&](int n, int w, int i) { target[i] = to_storage<S>(source[n * stride + w]); });
}
// Of heads: [R, n] to [G, n, 4], and back. A null source is zero.
template <typename S> MANN_INLINE void take_heads(const S *source, int R, int n, Arith<S> *target) {
    for_numbers(head_groups(R) * kHeadGroup, n, [&](int h, int i, int at) {
        target[of_head(h, i, n)] = source && h < R ? to_arith(source[at]) : Arith<S>(0);
    });
}
template <typename S> MANN_INLINE void give_heads(const Arith<S> *source, int R, int n, S *target) {
    for_numbers(R, n, [&](int h, int i, int at) { target[at] = to_storage<S>(source[of_head(h, i, n)]); });
}

// A block of numbers handed out in pieces that vector loads may start at: offsets.
struct Plan {
    int64_t size = 0;
    MANN_BOTH int64_t take(int64_t numbers) {
        const int64_t start = size;
        size += (numbers + 3) / 4 * 4;
        return start;
    }
};

} // namespace mann::cuda
