// The product of weight_hh with (h, reads) in a step of mann_sequence forward: exact, or on tensor cores (tensor.h).
#pragma once

#include "tensor.h"

namespace mann::cuda {

constexpr int kLanesOfH = (kHidden + kWarp - 1) / kWarp, kLanesOfReads = (kWords + kWarp - 1) / kWarp;
constexpr int kColumnsHere = kHidden + kWords; // of weight_hh as it stands here
using Hidden = OfExamples<kHidden>;
using Reads = OfExamples<kWords>;
#if MANN_TENSOR
using Cell = TensorCell;
constexpr int kFragmentsOfH = fragments_of(kHidden), kFragments = kFragmentsOfH + fragments_of(kWords);
struct RecurrentWeights {
    Fragment of[kUnitWarps][kFragments][kWarp];
};
#else
using Cell = SummedCell;
using RecurrentWeights = WeightRows<kColumnsHere>;
#endif

struct Gates {
    const S *weight_hh; // [4H, H + words]
    const Share share;
    RecurrentWeights &weights;
    T sums[MANN_TENSOR ? 4 : 4 * kCells]; // of the warp, so far
    T held[MANN_HELD ? kUnitsOfWarp : 1][MANN_HELD ? kLanesOfH + kLanesOfReads : 1][4];

    MANN_INLINE Gates(const S *weight_hh, const Share &share, RecurrentWeights &weights)
        : weight_hh(weight_hh), share(share), weights(weights) {}

    // Where column `at`, in the order of kHidden, stands in weight_hh; -1 where there is none.
    MANN_INLINE static int column(int at) {
        const int block = at / kUnitsPadded, other = at % kUnitsPadded, k = block * kUnits + other;
        return at >= kHidden ? H + at - kHidden : other < kUnits && k < H ? k : -1;
    }
    // Of a unit of the block; zero where there is none.
    MANN_INLINE S weight(int u, int at, int gate) const {
        const int k = column(at);
        return load_if(u < share.units() && at < kColumnsHere && k >= 0,
                       weight_hh + (int64_t(gate) * H + share.first_unit() + u) * kRecurrent + k);
    }
    MANN_INLINE void begin() {
#pragma unroll
        for (int i = 0; i < int(sizeof(sums) / sizeof(T)); ++i) sums[i] = 0;
    }
#if MANN_TENSOR
    MANN_INLINE void take_weights() {
        take_fragments<kUnitWarps * kFragments>(
            [&](int i, int lane) { return &weights.of[i / kFragments][i % kFragments][lane]; },
            [&](int i, int row, int column) {
                const int f = i % kFragments, warp = i / kFragments;
                const int before = f < kFragmentsOfH ? f * kDepth : kHidden + (f - kFragmentsOfH) * kDepth;
                const int at = before + column, after = f < kFragmentsOfH ? kHidden : kColumnsHere;
                return weight(warp * 4 + row % 4, at < after ? at : kColumnsHere, row / 4);
            });
    }
    // sums += the fragments from `start` on times x, the next ones of two sums: they wait for each other.
    template <int count, int start, int stride> MANN_INLINE void multiply(const T (*x)[stride]) {
        T others[4] = {};
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const Fragment &fragment = weights.of[least(warp_of_block(), kUnitWarps - 1)][start + i][lane_of_warp()];
            fragment.multiply(i % 2 ? others : sums, numbers_of_lane(x, i));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += others[i];
    }
    MANN_INLINE void multiply_h(const Hidden &h) { multiply<kFragmentsOfH, 0>(h.all); }
    MANN_INLINE void multiply_reads(const Reads &reads) {
        multiply<kFragments - kFragmentsOfH, kFragmentsOfH>(reads.all);
    }
    // The lane's gates, and all of its cell: after(i, x) of gate Cell::gate(i), whose sum is x.
    template <typename F> MANN_INLINE void finish(T (&own)[4], T (&gates)[4], F &&after) {
        TensorCell::take_gates(sums, own);
#pragma unroll
        for (int g = 0; g < 4; ++g) gates[g] = own[g] = after(g, own[g]);
    }
#else
    MANN_INLINE void take_weights() {
        if constexpr (MANN_HELD) {
#pragma unroll
            for (int n = 0; n < kUnitsOfWarp; ++n)
#pragma unroll
                for (int i = 0; i < kLanesOfH + kLanesOfReads; ++i)
#pragma unroll
                    for (int g = 0; g < 4; ++g) {
                        const int k = (i < kLanesOfH ? i : i - kLanesOfH) * kWarp + lane_of_warp();
                        const int u = warp_of_block() * kUnitsOfWarp + n, at = i < kLanesOfH ? k : kHidden + k;
                        const bool exists = k < (i < kLanesOfH ? kHidden : kWords);
                        held[n][i][g] = to_arith(weight(u, exists ? at : kColumnsHere, g));
                    }
        } else {
            weights.copy(weight_hh, share, column);
        }
    }
    // sums += the columns from `start` on times x [count, kExamples].
    template <int count, int start, int held_at> MANN_INLINE void multiply(const T (*x)[kExamples]) {
        constexpr int iterations = (count + kWarp - 1) / kWarp;
        const int first = warp_of_block() * kUnitsOfWarp;
#pragma unroll
        for (int i = 0; i < iterations; ++i) {
            const int k = i * kWarp + lane_of_warp();
            if (count % kWarp != 0 && i == iterations - 1 && k >= count) continue;
            const Each each = Each::load(x[k]);
#pragma unroll
            for (int n = 0; n < kUnitsOfWarp; ++n) {
                Four<T> four;
                if constexpr (MANN_HELD) {
#pragma unroll
                    for (int g = 0; g < 4; ++g) four[g] = held[n][held_at + i][g];
                } else {
                    four = *reinterpret_cast<const Four<T> *>(weights.of[least(first + n, kUnits - 1)][start + k]);
                }
#pragma unroll
                for (int e = 0; e < kExamples; ++e)
#pragma unroll
                    for (int g = 0; g < 4; ++g) sums[(n * kExamples + e) * 4 + g] += four[g] * each.at[e];
            }
        }
    }
    MANN_INLINE void multiply_h(const Hidden &h) { multiply<kHidden, 0, 0>(h.all); }
    MANN_INLINE void multiply_reads(const Reads &reads) { multiply<kWords, kHidden, kLanesOfH>(reads.all); }
    // The lane's gates, and all of its cell: after(i, x) of gate Cell::gate(i), whose sum is x.
    template <typename F> MANN_INLINE void finish(T (&own)[Cell::kGates], T (&gates)[4], F &&after) {
        scatter_sums<1>(sums);
#pragma unroll
        for (int i = 0; i < Cell::kGates; ++i) own[i] = after(i, sums[i]);
        Cell::take_gates(own, gates);
    }
#endif
};

} // namespace mann::cuda
