// The product of the gates' gradients with weight_hh in a step of mann_sequence backward: exact, or on tensor cores
// (tensor.h).
#pragma once

#include "tensor.h"

namespace mann::cuda {

using Cell = SummedCell;
using GateGradients = OfExamples<4 * kUnits>; // unit * 4 + gate
#if MANN_TENSOR
constexpr int kFragments = fragments_of(4 * kUnits), kTiles = fragments_of(kRecurrent);
struct RecurrentWeights {
    Fragment of[kTiles][kFragments][kWarp]; // rows are columns of weight_hh, columns its rows
};
#else
// Columns of weight_hh: a thread has one in every kColumnStride.
constexpr int kColumnsOfThread = share_of(kRecurrent);
constexpr int kColumnStride = (kRecurrent + kColumnsOfThread - 1) / kColumnsOfThread;
using RecurrentWeights = WeightRows<kRecurrent>;
#endif

struct Columns {
    const S *weight_hh; // [4H, H + words]
    const Share share;
    RecurrentWeights &weights;

    // Of a unit of the block; zero where there is none.
    MANN_INLINE S weight(int u, int k, int gate) const {
        return load_if(u < share.units() && k < kRecurrent,
                       weight_hh + (int64_t(gate) * H + share.first_unit() + u) * kRecurrent + k);
    }
#if MANN_TENSOR
    MANN_INLINE Columns(const S *weight_hh, const Share &share, RecurrentWeights &weights)
        : weight_hh(weight_hh), share(share), weights(weights) {}
    MANN_INLINE void take_weights() {
        take_fragments<kTiles * kFragments>(
            [&](int i, int lane) { return &weights.of[i / kFragments][i % kFragments][lane]; },
            [&](int i, int row, int column) {
                const int f = i % kFragments, tile = i / kFragments;
                return weight((f * kDepth + column) / 4, tile * kDepth + row, column % 4);
            });
    }
    // give(k, e, x): products x of column k for examples e and, where there is one, e + 1.
    template <typename F> MANN_INLINE void multiply(const GateGradients &dgates, F &&give) const {
        constexpr int kTilesOfWarp = (kTiles + kWarps - 1) / kWarps;
        T sums[kTilesOfWarp][4] = {};
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
            const Four<T> x = numbers_of_lane(dgates.all, f);
#pragma unroll
            for (int n = 0; n < kTilesOfWarp; ++n)
                weights.of[least(warp_of_block() + n * kWarps, kTiles - 1)][f][lane_of_warp()].multiply(sums[n], x);
        }
        const int e = lane_of_warp() % 4 * 2;
#pragma unroll
        for (int n = 0; n < kTilesOfWarp; ++n) {
            const int k = (warp_of_block() + n * kWarps) * kDepth + lane_of_warp() / 4;
            if (e < kExamples) give(k, e, sums[n]), give(k + 8, e, sums[n] + 2);
        }
    }
    static constexpr int kTogether = least(kExamples, 2); // examples of a call of give
#else
    T held[MANN_HELD ? kColumnsOfThread : 1][MANN_HELD ? kUnits : 1][4];

    MANN_INLINE Columns(const S *weight_hh, const Share &share, RecurrentWeights &weights)
        : weight_hh(weight_hh), share(share), weights(weights) {}
    MANN_INLINE static int column_of_thread(int n) { return int(threadIdx.x) + n * kColumnStride; }
    MANN_INLINE void take_weights() {
        if constexpr (MANN_HELD) {
#pragma unroll
            for (int n = 0; n < kColumnsOfThread; ++n)
#pragma unroll
                for (int u = 0; u < kUnits; ++u)
#pragma unroll
                    for (int g = 0; g < 4; ++g)
                        held[n][u][g] =
                            to_arith(weight(u, int(threadIdx.x) < kColumnStride ? column_of_thread(n) : kRecurrent, g));
        } else {
            weights.copy(weight_hh, share, [](int k) { return k; });
        }
    }
    // give(k, 0, x): products x of column k for all examples.
    template <typename F> MANN_INLINE void multiply(const GateGradients &dgates, F &&give) const {
        if (int(threadIdx.x) >= kColumnStride) return;
        T sums[kColumnsOfThread][kExamples] = {};
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            Each each[4];
#pragma unroll
            for (int g = 0; g < 4; ++g) each[g] = Each::load(dgates.all[4 * u + g]);
#pragma unroll
            for (int n = 0; n < kColumnsOfThread; ++n) {
                Four<T> four;
                if constexpr (MANN_HELD) {
#pragma unroll
                    for (int g = 0; g < 4; ++g) four[g] = held[n][u][g];
                } else {
                    four =
                        *reinterpret_cast<const Four<T> *>(weights.of[u][least(column_of_thread(n), kRecurrent - 1)]);
                }
#pragma unroll
                for (int g = 0; g < 4; ++g)
#pragma unroll
                    for (int e = 0; e < kExamples; ++e) sums[n][e] += four[g] * each[g].at[e];
            }
        }
#pragma unroll
        for (int n = 0; n < kColumnsOfThread; ++n) give(column_of_thread(n), 0, sums[n]);
    }
    static constexpr int kTogether = kExamples; // examples of a call of give
#endif
};

} // namespace mann::cuda
