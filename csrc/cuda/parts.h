// The blocks that share the slots of an example: what each sums over its warps, and what they make of the sums of all.
#pragma once

#include "rows.h"

namespace mann::cuda {

// What the warps of a block leave of a step forward, each as a part does.
struct WarpSums {
    alignas(16) T part[kRowWarps][kPart];

    MANN_INLINE T *of_warp() { return part[least(warp_of_block(), kRowWarps - 1)]; }
};

// Numbers 4 i and following of a part, from those of its warps. Barrier before.
MANN_INLINE Four<T> sum_warps(const WarpSums &warps, int i) {
    Four<T> sum{}, top{};
    int head[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int p = 4 * i + j;
        head[j] = p < kWords ? p / W : p < kTopAt ? p - kWords : least(p - kTopAt, R - 1);
        if (!kKeyStrength) continue;
        top[j] = warps.part[0][kTopAt + head[j]];
#pragma unroll
        for (int w = 1; w < kRowWarps; ++w) {
            const T other = warps.part[w][kTopAt + head[j]];
            top[j] = other > top[j] ? other : top[j];
        }
    }
#pragma unroll
    for (int w = 0; w < kRowWarps; ++w) {
        const Four<T> x = reinterpret_cast<const Four<T> *>(warps.part[w])[i];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            sum[j] += kKeyStrength ? x[j] * exponential(warps.part[w][kTopAt + head[j]] - top[j]) : x[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
        if (4 * i + j >= kTopAt) sum[j] = top[j];
    return sum;
}

// What makes shares of the whole of what each part has summed for a head; parts [kParts, kPart] of an example.
struct Factors {
    T of[kParts];

    MANN_INLINE Factors(const T (*parts)[kPart], int h) {
        T top = 0, sum = 0;
        if (kKeyStrength) {
            top = parts[0][kTopAt + h];
#pragma unroll
            for (int p = 1; p < kParts; ++p) top = parts[p][kTopAt + h] > top ? parts[p][kTopAt + h] : top;
        }
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
            of[p] = kKeyStrength ? exponential(parts[p][kTopAt + h] - top) : T(1);
            sum += parts[p][kSumAt + h] * of[p];
        }
        const T scale = fast_reciprocal(sum);
#pragma unroll
        for (int p = 0; p < kParts; ++p) of[p] *= scale;
    }
    MANN_INLINE T of_part(int part) const {
        T factor = of[0];
#pragma unroll
        for (int p = 1; p < kParts; ++p) factor = part == p ? of[p] : factor;
        return factor;
    }
};
// Number k of the reads, of head k / W.
MANN_INLINE T read_of(const T (*parts)[kPart], int k, const Factors &factors) {
    T sum = 0;
#pragma unroll
    for (int p = 0; p < kParts; ++p) sum += parts[p][k] * factors.of[p];
    return sum;
}
MANN_INLINE T read_of(const T (*parts)[kPart], int k) { return read_of(parts, k, Factors(parts, k / W)); }
// Read weights and usage after a step, from the parts of all.
MANN_INLINE void finish_step(Rows &rows, const T (*parts)[kPart], const WarpSums &warps, T decay) {
    T scale[R];
#pragma unroll
    for (int h = 0; h < R; ++h) {
        scale[h] = Factors(parts, h).of_part(rows.part);
        if (kKeyStrength)
            scale[h] *= warp_of_block() < kRowWarps
                            ? exponential(warps.part[warp_of_block()][kTopAt + h] - parts[rows.part][kTopAt + h])
                            : T(0);
    }
    rows.normalise(scale, decay);
}

// Sums of one number a head over the warps and the parts of an example. Two buffers: a part that has the sums of the
// others may send the next before these have read its own.
struct PartSums {
    alignas(16) T parts[2][kParts][2 * R];
    Mailbox box[2];
    T sums[kWarps][R], tops[kWarps][R]; // of the warps, in
    T total[kHeads], top[kHeads];       // of all, out
};
constexpr int kSumBytes = kParts * 2 * R * int(sizeof(T));

// By one thread, before the cluster's first barrier.
MANN_INLINE void open_sums(PartSums &s) { mailbox_open(&s.box[0], kSumBytes), mailbox_open(&s.box[1], kSumBytes); }

// With tops, sums of numbers that are relative to these. `first_rank`: of the blocks that share the example; `number`
// counts the exchanges. Has a barrier before and after.
MANN_INLINE void exchange_sums(PartSums &s, int first_rank, int part, int &number, bool with_tops) {
    __syncthreads();
    const int buffer = number & 1, thread = thread_again(), h = thread % R, to = thread / R;
    if (thread < kParts * R) {
        T top = with_tops ? s.tops[0][h] : T(0), sum = 0;
        for (int w = 1; with_tops && w < kRowWarps; ++w) top = s.tops[w][h] > top ? s.tops[w][h] : top;
        for (int w = 0; w < kRowWarps; ++w)
            sum += with_tops ? s.sums[w][h] * exponential(s.tops[w][h] - top) : s.sums[w][h];
        if constexpr (kParts == 1) {
            s.total[h] = sum, s.top[h] = top;
        } else {
            send(&s.parts[buffer][part][h], first_rank + to, &s.box[buffer], sum);
            send(&s.parts[buffer][part][R + h], first_rank + to, &s.box[buffer], top);
        }
    }
    if constexpr (kParts > 1) {
        mailbox_wait(&s.box[buffer], number / 2);
        if (thread == 0) mailbox_expect(&s.box[buffer], kSumBytes);
        if (thread < R) {
            T top = s.parts[buffer][0][R + h], sum = 0;
#pragma unroll
            for (int p = 1; p < kParts; ++p) top = s.parts[buffer][p][R + h] > top ? s.parts[buffer][p][R + h] : top;
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
                const T x = s.parts[buffer][p][h];
                sum += with_tops ? x * exponential(s.parts[buffer][p][R + h] - top) : x;
            }
            s.total[h] = sum, s.top[h] = top;
        }
        ++number;
    }
    __syncthreads();
}

// Read weights after a step that is recomputed, of which write_and_match is done; exchanges sums.
MANN_INLINE void finish_recomputed(Rows &rows, PartSums &s, int first_rank, int &number) {
    if (warp_of_block() < kRowWarps) rows.sum_exps(s.sums[warp_of_block()]);
    exchange_sums(s, first_rank, rows.part, number, kKeyStrength);
    T scale[R];
#pragma unroll
    for (int h = 0; h < R; ++h) {
        scale[h] = fast_reciprocal(s.total[h]);
        if (kKeyStrength)
            scale[h] *= warp_of_block() < kRowWarps ? exponential(s.tops[warp_of_block()][h] - s.top[h]) : T(0);
    }
    rows.normalise(scale, T(0));
}

} // namespace mann::cuda
