// The memory's step of rows.h, backward: one pass over the rows, which also undoes the write.
#pragma once

#include "rows.h"

namespace mann::cuda {

// What a part finds of the gradient of a head, and, for the step before, of what the softmax takes off every gradient.
constexpr int kMeanAt = kHead, kSent = round_up(kHead + R, 4);

// What the warps of a block leave of a step that was undone, each summed over its rows: of the gradient of key and add
// (where the key is written, both in dkey); and a number a head of what takes the key's own part off that, of the
// gradients of strength and gate, and of the means of the step before.
struct WarpGradients {
    T dkey[kRowWarps][kWords], dadd[kWriteAdd ? kRowWarps : 1][kWords];
    T scalars[kRowWarps][4 * R];
};

struct RowsBackward : Rows {
    T dm[kRows][kColumns];
    T dweights[kRows][R]; // of the read weights of the step to be undone, but for what comes through its reads
    T next[kRows][R];     // the read weights before the step, from the record

    MANN_INLINE void take_dweights(const S *source) { // [R, N] or null
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int h = 0; h < R; ++h) dweights[i][h] = source && exists(i) ? to_arith(source[h * N + slot(i)]) : T(0);
    }
    MANN_INLINE void give_dweights(S *target) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int h = 0; h < R; ++h)
                if (exists(i) && lane() == h % kLanes) target[h * N + slot(i)] = to_storage<S>(dweights[i][h]);
    }
    MANN_INLINE void take_dmemory(const S *source) {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
                dm[i][j] = source && exists(i) && has_column(j) ? to_arith(source[slot(i) * W + column(j)]) : T(0);
    }
    MANN_INLINE void give_dmemory(S *target) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
                if (exists(i) && has_column(j)) target[slot(i) * W + column(j)] = to_storage<S>(dm[i][j]);
    }
    // The record of read weights: [N, kHeads].
    MANN_INLINE void give_record(T *target) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int h = 0; h < R; ++h)
                if (exists(i) && lane() == h % kLanes) target[slot(i) * kHeads + h] = weights[i][h];
    }
    MANN_INLINE void take_record(const T *source) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int g = 0; g < kHeadGroups; ++g) {
                const Four<T> none{}, *heads = reinterpret_cast<const Four<T> *>(source + slot(i) * kHeads);
                const Four<T> four = exists(i) ? heads[g] : none;
#pragma unroll
                for (int j = 0; j < least(R - 4 * g, 4); ++j) next[i][4 * g + j] = four[j];
            }
        }
    }
    template <typename V> MANN_INLINE void take_next(const V *source) { // [R, N]
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int h = 0; h < R; ++h) next[i][h] = exists(i) ? to_arith(source[h * N + slot(i)]) : T(0);
    }
    // What stands in the slots to be written to, before it is written: [R, W].
    MANN_INLINE void give_overwritten(const Step &step, T *target) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            for (int h = 0; h < R; ++h) {
                if (!exists(i) || step.slots[h] != slot(i)) continue;
#pragma unroll
                for (int j = 0; j < kColumns; ++j)
                    if (has_column(j)) target[h * W + column(j)] = m[i][j];
            }
    }
    // The warp's sums of read weight times gradient, to its sums [R].
    MANN_INLINE void sum_means(T *sums) const {
        T v[R] = {};
#pragma unroll
        for (int h = 0; h < R; ++h)
#pragma unroll
            for (int i = 0; i < kRows; ++i) v[h] += weights[i][h] * dweights[i][h];
        give_head_sums(v, sums);
    }

    // Undoes a step. dreads [W, kHeads] and means [R]: the sum over all slots of read weight times its gradient.
    MANN_INLINE void undo(const Step &step, const T (*dreads)[kHeads], const T *means, const T *overwritten, T eps,
                          WarpGradients &warps) {
        T read[kRows][R], write[kRows][R], squares[kRows], dots[kRows][R], through[kRows][R], shrink[kRows];
        T key_squares[R];
        sum_heads([&](int w, int h) { return step.key[w][h] * step.key[w][h]; }, key_squares);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            squares[i] = shrink[i] = 0;
#pragma unroll
            for (int h = 0; h < R; ++h) {
                dots[i][h] = through[i][h] = 0;
                read[i][h] = weights[i][h], weights[i][h] = next[i][h];
            }
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            if (!has_column(j)) continue;
            T key[kHeads], dread[kHeads];
            take_heads(step.key[column(j)], key), take_heads(dreads[column(j)], dread);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                squares[i] += m[i][j] * m[i][j];
#pragma unroll
                for (int h = 0; h < R; ++h) dots[i][h] += m[i][j] * key[h], through[i][h] += m[i][j] * dread[h];
            }
        }
        T sums[4 * R] = {};
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            squares[i] = sum_lanes(squares[i], 1, kLanes);
#pragma unroll
            for (int h = 0; h < R; ++h) {
                const T dot = sum_lanes(dots[i][h], 1, kLanes),
                        dweight = dweights[i][h] + sum_lanes(through[i][h], 1, kLanes);
                const T dx = read[i][h] * (dweight - means[h]);
                const T inverse_norm = inverse_square_root(squares[i] * key_squares[h] + eps);
                const T similarity = dot * inverse_norm, ddot = step.beta[h] * dx * inverse_norm;
                // of the cosine with respect to |key|^2 |row|^2, doubled
                const T norm = ddot * similarity * inverse_norm;
                shrink[i] += norm * key_squares[h];
                sums[h] += norm * squares[i];
                sums[R + h] += dx * similarity;
                dots[i][h] = ddot;
                write[i][h] = exists(i) ? write_weight(step, i, h) : T(0);
                through[i][h] = 0; // from here on the gradient of the write weight
            }
        }
#pragma unroll
        for (int first = 0; first < kColumns; first += kChunk) {
            T keys[R * kChunk] = {}, adds[R * kChunk] = {};
#pragma unroll
            for (int k = 0; k < kChunk; ++k) {
                const int j = first + k;
                if (j >= kColumns || !has_column(j)) continue;
                T key[kHeads], add[kHeads], dread[kHeads];
                take_heads(step.key[column(j)], key), take_heads(dreads[column(j)], dread);
                if (kWriteAdd) take_heads(step.add[column(j)], add);
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    T d = dm[i][j] - shrink[i] * m[i][j], before = m[i][j];
#pragma unroll
                    for (int h = 0; h < R; ++h) {
                        d += read[i][h] * dread[h] + dots[i][h] * key[h];
                        keys[h * kChunk + k] += dots[i][h] * m[i][j];
                        before -= write[i][h] * (kWriteAdd ? add[h] : key[h]);
                    }
#pragma unroll
                    for (int h = 0; h < R; ++h) {
                        through[i][h] += d * (kWriteAdd ? add[h] : key[h]);
                        (kWriteAdd ? adds : keys)[h * kChunk + k] += write[i][h] * d;
                    }
                    dm[i][j] = d, m[i][j] = before;
                }
            }
            give_sums(keys, first, warps.dkey[warp_of_block()]);
            if (kWriteAdd) give_sums(adds, first, warps.dadd[kWriteAdd ? warp_of_block() : 0]);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int h = 0; h < R; ++h) {
                const T dwrite = sum_lanes(through[i][h], 1, kLanes);
                sums[2 * R + h] += exists(i) ? dwrite * (weights[i][h] - (is_own(step, i, h) ? T(1) : T(0))) : T(0);
                dweights[i][h] = exists(i) ? step.gate[h] * dwrite : T(0);
                sums[3 * R + h] += weights[i][h] * dweights[i][h];
            }
            restore(step, overwritten, i);
        }
        give_head_sums(sums, warps.scalars[warp_of_block()]);
    }
    // Of a row that was written to as least used: exactly what stood there; and no gradient comes from before an
    // erasure.
    MANN_INLINE void restore(const Step &step, const T *overwritten, int i) {
        if (!exists(i)) return;
        const bool erased = is_erased(step, i);
        for (int h = 0; h < R; ++h) {
            if (step.slots[h] != slot(i)) continue;
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
                if (has_column(j)) m[i][j] = overwritten[h * W + column(j)];
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) dm[i][j] = erased ? T(0) : dm[i][j];
    }
};

// Number p of a part's share of the gradient of a head before its activations; from kMeanAt on, of the means.
MANN_INLINE T head_gradient(const WarpGradients &warps, const Step &step, int p) {
    const auto scalar = [&](int which, int h) {
        T sum = 0;
#pragma unroll
        for (int w = 0; w < kRowWarps; ++w) sum += warps.scalars[w][which * R + h];
        return sum;
    };
    T sum = 0;
    if (p < kWords) {
        const int h = p / W, w = p % W;
        const T key = step.key[w][h];
#pragma unroll
        for (int i = 0; i < kRowWarps; ++i) sum += warps.dkey[i][p];
        sum -= scalar(0, h) * key;
        return kSquash ? sum * (1 - key * key) : sum;
    }
    if (p < kBetaAt) {
        const T gate = step.gate[p - kWords];
        return scalar(2, p - kWords) * gate * (1 - gate);
    }
    if (kKeyStrength && p < kAddAt) {
        const T slope = kSoftplus ? -exponential_minus_one(-step.beta[p - kBetaAt]) : T(1);
        return scalar(1, p - kBetaAt) * slope;
    }
    if (p < kHead) {
        const int k = p - kAddAt;
        const T add = step.add[kWriteAdd ? k % W : 0][k / W];
#pragma unroll
        for (int i = 0; kWriteAdd && i < kRowWarps; ++i) sum += warps.dadd[i][k];
        return kSquash ? sum * (1 - add * add) : sum;
    }
    return scalar(3, p - kHead);
}

} // namespace mann::cuda
