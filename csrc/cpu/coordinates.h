// What the kernels share that put every coordinate of a gradient through one small network: a coordinate is a lane, its
// activations are rows of a block of coordinates that stays in the nearest caches, the weights are broadcast.
//
// A weight matrix [J, K] and its bias stand side by side as [J, K + 1], against inputs whose last row is one.
// Everything is done in chunks of kChunk coordinates, whose sums over coordinates are added up in their order at the
// end: the results do not depend on how many threads share the chunks.
#pragma once

#include <cmath>

#include "kernel.h"
#include "simd.h"

#include "../cells.h"

namespace mann {

constexpr int64_t kChunk = 2048;
// Sums over coordinates are added up in runs of so many, and the runs then: rounding grows with the length of either.
constexpr int64_t kRun = 512;
// Bounds over the instruction sets, for the scratch: coordinates of a block, lanes of a vector.
constexpr int64_t kMostBlock = 64, kMostLanes = 16;
inline int64_t chunks_of(int64_t P) { return (P + kChunk - 1) / kChunk; }

namespace MANN_ISA {

// A block is so many vectors wide; tiles of sums have so many rows (and columns) beside it.
constexpr int kWide = MANN_VECTOR_REGISTERS == 32 ? 4 : 2;
constexpr int kTileRows = MANN_VECTOR_REGISTERS == 32 ? 5 : 4;
constexpr int kTileSums = MANN_VECTOR_REGISTERS == 32 ? 5 : 3;
template <typename T> constexpr int64_t kBlock = kWide * kLanes<T>;

// Calls f(first, count) for the blocks of every chunk.
template <typename T, typename F> inline void in_blocks(int64_t P, int64_t chunk, F &&f) {
    const int64_t last = P < (chunk + 1) * kChunk ? P : (chunk + 1) * kChunk;
    for (int64_t first = chunk * kChunk; first < last; first += kBlock<T>)
        f(first, last - first < kBlock<T> ? last - first : kBlock<T>);
}

// A row of `count` coordinates to and from a block; on the way in the others become zero.
template <typename S> inline void load_row(const S *source, int64_t count, Arith<S> *row) {
    convert(source, row, count);
    for (int64_t i = count; i < kBlock<Arith<S>>; ++i) row[i] = 0;
}
template <typename T> inline void fill_row(T *row, T value) {
    for (int64_t i = 0; i < kBlock<T>; ++i) row[i] = value;
}

// The gradient preprocessing, and what a gradient of its two features is to g. eps is that of float32 in every type.
template <typename T> struct Preprocessing {
    T p, scale, eps = T(1.1920928955078125e-07);
    explicit Preprocessing(double p) : p(T(p)), scale(T(std::exp(p))) {}

    void features(const T *grads, T *magnitude, T *sign) const {
        for (int64_t i = 0; i < kBlock<T>; i += kLanes<T>) {
            const Vec<T> g = load(grads + i), large = log_size(g), small = g * scale;
            store(magnitude + i, maximum(broadcast(T(-1)), large)); // NaN passes all three
            store(sign + i, maximum(broadcast(T(-1)), minimum(broadcast(T(1)), small)));
        }
    }
    void backward(const T *grads, const T *dmagnitude, const T *dsign, T *dgrads) const {
        for (int64_t i = 0; i < kBlock<T>; i += kLanes<T>) {
            const Vec<T> g = load(grads + i), size = absolute(g), zero{};
            const Vec<T> slope = load(dmagnitude + i) / ((size + eps) * p);
            const Vec<T> signed_slope = g > 0 ? slope : (g < 0 ? -slope : zero);
            const Vec<T> through_log = between_ends_of_log(g) ? signed_slope : zero;
            const Vec<T> through_sign = between_ends_of_sign(g) ? load(dsign + i) * scale : zero;
            store(dgrads + i, through_log + through_sign);
        }
    }
    // 1 where backward lets a gradient through the feature, else 0.
    void sides(const T *grads, T *of_magnitude, T *of_sign) const {
        for (int64_t i = 0; i < kBlock<T>; i += kLanes<T>) {
            const Vec<T> g = load(grads + i), zero{}, one = zero + 1;
            store(of_magnitude + i, between_ends_of_log(g) ? one : zero);
            store(of_sign + i, between_ends_of_sign(g) ? one : zero);
        }
    }

  private:
    static Vec<T> absolute(Vec<T> g) { return g < 0 ? -g : g; }
    Vec<T> log_size(Vec<T> g) const { return natural_log(absolute(g) + eps) / p; }
    auto between_ends_of_log(Vec<T> g) const { return log_size(g) >= -1; }
    auto between_ends_of_sign(Vec<T> g) const { return absolute(g) * scale <= 1; }
};

// f(j, v, sum over k of weight[j * row_stride + k * inner_stride] * in[k]) for each of the `rows` sums and each vector
// v of the block.
template <typename T, typename F>
inline void multiply(int64_t rows, int64_t inner, const T *weight, int64_t row_stride, int64_t inner_stride,
                     const T *in, F &&f) {
    in_groups<kTileRows>(rows, [&](auto group, int64_t j0) {
        constexpr int count = decltype(group)::value;
        Vec<T> sum[count][kWide] = {};
        const T *w = weight + j0 * row_stride, *x = in;
        for (int64_t k = 0; k < inner; ++k, w += inner_stride, x += kBlock<T>) {
            Vec<T> value[kWide];
#pragma GCC unroll 4
            for (int v = 0; v < kWide; ++v) value[v] = load(x + v * kLanes<T>);
#pragma GCC unroll 8
            for (int i = 0; i < count; ++i) {
                const Vec<T> factor = broadcast(w[i * row_stride]);
#pragma GCC unroll 4
                for (int v = 0; v < kWide; ++v) sum[i][v] += factor * value[v];
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < kWide; ++v) f(j0 + i, v, sum[i][v]);
        }
    });
}

// Adds left[j] * right[k] of every coordinate to lane after lane of sums[j * sums_stride + k], a vector each, for
// `blocks` blocks of both; they are so many numbers apart.
template <typename T>
inline void add_products(int64_t rows, int64_t columns, int64_t blocks, const T *left, int64_t left_apart,
                         const T *right, int64_t right_apart, T *sums, int64_t sums_stride) {
    constexpr int lanes = kLanes<T>;
    in_groups<kTileSums>(rows, [&](auto tall, int64_t j0) {
        in_groups<kTileSums>(columns, [&](auto broad, int64_t k0) {
            constexpr int height = decltype(tall)::value, width = decltype(broad)::value;
            Vec<T> sum[height][width];
            T *at = sums + (j0 * sums_stride + k0) * lanes;
#pragma GCC unroll 8
            for (int i = 0; i < height; ++i)
#pragma GCC unroll 8
                for (int k = 0; k < width; ++k) sum[i][k] = load(at + (i * sums_stride + k) * lanes);
            for (int64_t block = 0; block < blocks; ++block) {
                const T *a = left + block * left_apart + j0 * kBlock<T>;
                const T *b = right + block * right_apart + k0 * kBlock<T>;
                for (int64_t v = 0; v < kBlock<T>; v += lanes) {
                    Vec<T> x[height];
#pragma GCC unroll 8
                    for (int i = 0; i < height; ++i) x[i] = load(a + i * kBlock<T> + v);
#pragma GCC unroll 8
                    for (int k = 0; k < width; ++k) {
                        const Vec<T> y = load(b + k * kBlock<T> + v);
#pragma GCC unroll 8
                        for (int i = 0; i < height; ++i) sum[i][k] += x[i] * y;
                    }
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < height; ++i)
#pragma GCC unroll 8
                for (int k = 0; k < width; ++k) store(at + (i * sums_stride + k) * lanes, sum[i][k]);
        });
    });
}

// Where a run ends with the block that starts at coordinate `first`, adds its sums to `total` and begins anew; a vector
// each.
template <typename T> inline void end_run(int64_t first, int64_t count, T *sums, T *total) {
    if ((first + kBlock<T>) % kRun != 0) return;
    for (int64_t i = 0; i < count * kLanes<T>; i += kLanes<T>) {
        store(total + i, load(total + i) + load(sums + i));
        store(sums + i, Vec<T>{});
    }
}

// total[i] = the lanes of sums[i] for i < count.
template <typename T> inline void sum_lanes_of(const T *sums, int64_t count, T *total) {
    constexpr int lanes = kLanes<T>;
    for (int64_t first = 0; first < count; first += lanes) {
        Vec<T> group[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) group[i] = first + i < count ? load(sums + (first + i) * lanes) : Vec<T>{};
        store_some(total + first, sum_each(group), count - first);
    }
}

// A weight [J, K] becomes columns [at, at + K) of a matrix with rows of `stride`, and back: there the sum of `chunks`
// such matrices, `apart` numbers from each other, in their order.
template <typename S>
inline void put_columns(const void *source, int64_t J, int64_t K, int64_t at, int64_t stride, Arith<S> *target) {
    for (int64_t j = 0; j < J; ++j) convert(static_cast<const S *>(source) + j * K, target + j * stride + at, K);
}
template <typename S>
inline void take_columns(const Arith<S> *sums, int64_t chunks, int64_t apart, int64_t J, int64_t K, int64_t at,
                         int64_t stride, void *target) {
    for (int64_t j = 0; j < J; ++j) {
        for (int64_t k = 0; k < K; ++k) {
            double sum = 0; // costs nothing here
            for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * apart + j * stride + at + k];
            static_cast<S *>(target)[j * K + k] = to_storage<S>(Arith<S>(sum));
        }
    }
}

} // namespace MANN_ISA
} // namespace mann
