// Content-based addressing of the memory of one example by one block: eq. 2 and 3, forward and backward.
#pragma once

#include "block.h"

namespace mann::cuda {

// How a memory of N rows stands: `lanes` threads share a row, `stride` numbers lie from a row to the next.
struct MemoryShape {
    int N, W, R;
    int lanes, stride;

    // In shared memory of a block of `threads`: with few rows, several threads share one, and the stride is an odd
    // multiple of them, so that a warp touches every bank once. Elsewhere eight threads share a row as it is: a sector.
    static MemoryShape of(int N, int W, int R, int threads, bool in_shared) {
        const auto wider = [&](int lanes) {
            return lanes < kLanes && lanes < W && (in_shared ? 2 * lanes * N <= threads : lanes < 8);
        };
        int lanes = 1;
        while (wider(lanes)) lanes *= 2;
        const int multiple = (W + lanes - 1) / lanes;
        return {N, W, R, lanes, in_shared ? (multiple + (multiple % 2 == 0)) * lanes : W};
    }
    MANN_BOTH int groups() const { return head_groups(R); }
    // Numbers of arrays.
    MANN_BOTH int memory() const { return N * stride; }
    MANN_BOTH int slots() const { return groups() * N * kHeadGroup; }
    MANN_BOTH int words() const { return groups() * W * kHeadGroup; }
};

// dots [G, N, 4] = vectors [G, W, 4] . memory; for the first group also the square sums of the rows, to squares unless
// that is null.
template <typename T, typename M>
MANN_INLINE void match_row(const MemoryShape &s, const M *memory, const T *vectors, int n, int lane, bool exists,
                           T *dots, T *squares) {
    const M *row = memory + n * s.stride;
    for (int g = 0; g < s.groups(); ++g) {
        Heads<T> sums{};
        T square = 0;
        for (int w = lane; exists && w < s.W; w += s.lanes) {
            const T m = to_arith(row[w]);
            add_to(sums, m, load_heads(vectors, g * s.W + w));
            square += m * m;
        }
        sums = sum_lanes(sums, s.lanes);
        if (exists && lane == 0) store_heads(dots, g * s.N + n, sums);
        if (g == 0 && squares) {
            square = sum_lanes(square, s.lanes);
            if (exists && lane == 0) squares[n] = square;
        }
    }
}

// Of the vector of head h, by a warp.
template <typename T> MANN_INLINE T square_sum(const MemoryShape &s, const T *vectors, int h) {
    T sum = 0;
    for (int w = lane_of_warp(); w < s.W; w += kLanes) {
        const T x = vectors[of_head(h, w, s.W)];
        sum += x * x;
    }
    return sum_lanes(sum);
}

// Eq. 2 and 3 for head h, by a warp: of its dot products, weights. NaN anywhere makes every weight NaN, as in softmax.
template <typename T>
MANN_INLINE void softmax_of_cosine(const MemoryShape &s, int h, const T *key, const T *beta, T eps, const T *squares,
                                   T *weights) {
    const T key_square = square_sum(s, key, h), strength = beta ? beta[h] : T(1);
    T top = -T(INFINITY), sum = 0;
    for (int n = lane_of_warp(); n < s.N; n += kLanes) {
        T &weight = weights[of_head(h, n, s.N)];
        weight = cosine(weight, squares[n], key_square, eps).value * strength;
        top = weight > top ? weight : top;
    }
    top = largest_lane(top);
    for (int n = lane_of_warp(); n < s.N; n += kLanes) {
        T &weight = weights[of_head(h, n, s.N)];
        weight = exponential(weight - top);
        sum += weight;
    }
    const T scale = 1 / sum_lanes(sum);
    for (int n = lane_of_warp(); n < s.N; n += kLanes) weights[of_head(h, n, s.N)] *= scale;
}

// Backward of softmax_of_cosine, by a warp: the gradient of the weights becomes that of the dot products, and each dot
// product what its head takes off the gradient of the row, in units of the row.
template <typename T> struct CosineGrad {
    T dbeta, dkey_factor; // the latter times key is to be taken off dkey
};
template <typename T>
MANN_INLINE CosineGrad<T> softmax_of_cosine_backward(const MemoryShape &s, int h, const T *key, const T *beta, T eps,
                                                     const T *squares, const T *weights, T *dweights, T *dots) {
    const T key_square = square_sum(s, key, h), strength = beta ? beta[h] : T(1);
    T mean = 0;
    for (int n = lane_of_warp(); n < s.N; n += kLanes) {
        const int at = of_head(h, n, s.N);
        mean += weights[at] * dweights[at];
    }
    mean = sum_lanes(mean);
    CosineGrad<T> grad{};
    for (int n = lane_of_warp(); n < s.N; n += kLanes) {
        const int at = of_head(h, n, s.N);
        const T dx = weights[at] * (dweights[at] - mean);
        const auto similarity = cosine(dots[at], squares[n], key_square, eps);
        const T ddot = strength * dx * similarity.inverse_norm;
        // of K with respect to |key|^2 |row|^2, doubled
        const T through_norm = ddot * similarity.value * similarity.inverse_norm;
        grad.dbeta += dx * similarity.value;
        grad.dkey_factor += through_norm * squares[n];
        dweights[at] = ddot;
        dots[at] = through_norm * key_square;
    }
    return {sum_lanes(grad.dbeta), sum_lanes(grad.dkey_factor)};
}

// What all heads take off the gradient of row n: the sum of what softmax_of_cosine_backward left in `dots`.
template <typename T> MANN_INLINE T row_factor(const MemoryShape &s, const T *dots, int n) {
    T sum = 0;
    for (int g = 0; g < s.groups(); ++g) {
        const Heads<T> part = load_heads(dots, g * s.N + n);
#pragma unroll
        for (int j = 0; j < kHeadGroup; ++j) sum += part.head[j];
    }
    return sum;
}

// One column of a part: sum over its rows of weights (x) memory, for a group of heads.
template <typename T, typename M>
MANN_INLINE Heads<T> sum_column(const MemoryShape &s, const M *memory, const T *weights, int g, int w, int part,
                                int parts) {
    Heads<T> sum{};
    for (int n = part; n < s.N; n += parts)
        add_to(sum, to_arith(memory[n * s.stride + w]), load_heads(weights, g * s.N + n));
    return sum;
}
// Of `sums` [parts, G, W, 4], those of head h and column w.
template <typename T> MANN_INLINE T sum_parts(const MemoryShape &s, const T *sums, int parts, int h, int w) {
    T sum = 0;
    for (int part = 0; part < parts; ++part) sum += sums[part * s.words() + of_head(h, w, s.W)];
    return sum;
}

} // namespace mann::cuda
