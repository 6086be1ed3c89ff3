// One time step of the memory of one example, forward and backward, by all threads of a block.
//
// What a function is given must be there for every thread (a barrier before it), and what it gives is there after the
// caller's next barrier. Arrays may be in shared memory, of this block or in global memory.
#pragma once

#include "address.h"

namespace mann::cuda {

template <typename T> struct StepShape : MemoryShape {
    bool shared, erase_all; // least-used slots: n-hot for every head, or one each; which of them are erased
    T decay, eps;

    MANN_INLINE int erased() const { return erase_all ? R : 1; }
};

// Whether usage a of slot i comes before b of slot j: ties to the lowest index, NaN last.
template <typename T> MANN_INLINE bool less_used(T a, int i, T b, int j) {
    const bool nan_a = a != a, nan_b = b != b;
    if (nan_a || nan_b) return nan_a && nan_b ? i < j : nan_b;
    return a < b || (a == b && i < j);
}

// Eq. 6, by one warp: the R slots of least usage [N], ascending -> slots [R]. Head after head, the least that comes
// after the one before.
template <typename T> MANN_INLINE void choose_slots(const T *usage, int N, int R, int32_t *slots) {
    T last = 0;
    int last_slot = -1;
    for (int h = 0; h < R; ++h) {
        T best = 0;
        int best_slot = -1; // none yet
        for (int n = lane_of_warp(); n < N; n += kLanes) {
            const T u = usage[n];
            if (h > 0 && !less_used(last, last_slot, u, n)) continue;
            if (best_slot < 0 || less_used(u, n, best, best_slot)) best = u, best_slot = n;
        }
        for (int distance = kLanes / 2; distance > 0; distance /= 2) {
            const T u = __shfl_xor_sync(kWholeWarp, best, distance);
            const int n = __shfl_xor_sync(kWholeWarp, best_slot, distance);
            if (n >= 0 && (best_slot < 0 || less_used(u, n, best, best_slot))) best = u, best_slot = n;
        }
        last = best, last_slot = best_slot;
        if (lane_of_warp() == 0) slots[h] = best_slot;
    }
}

// 1 where head h writes to a least-used slot, else 0.
template <typename T> MANN_INLINE T own_slot(const StepShape<T> &s, const int32_t *slots, int h, int n) {
    bool own = false;
    for (int i = s.shared ? 0 : h; i < (s.shared ? s.R : h + 1); ++i) own |= slots[i] == n;
    return own ? T(1) : T(0);
}
// Eq. 7 for a group of heads of slot n; gate [R] is after its sigmoid, previous [G, N, 4].
template <typename T>
MANN_INLINE Heads<T> write_weights(const StepShape<T> &s, const T *previous, const T *gate, const int32_t *slots, int g,
                                   int n) {
    Heads<T> weights = load_heads(previous, g * s.N + n);
#pragma unroll
    for (int j = 0; j < kHeadGroup; ++j) {
        const int h = g * kHeadGroup + j;
        weights.head[j] = h < s.R ? gate[h] * weights.head[j] + (1 - gate[h]) * own_slot(s, slots, h, n) : T(0);
    }
    return weights;
}

template <typename T> struct StepForward {
    T *memory;                 // [N, stride] in and out
    T *usage;                  // [N] in and out
    const T *previous;         // [G, N, 4], the read weights of the previous step
    const T *key, *add;        // [G, W, 4]; add may be key
    const T *gate, *beta;      // [R]; gate after its sigmoid, beta may be null (1)
    const int32_t *least_used; // [R], by choose_slots
    T *weights;                // [G, N, 4] out, the read weights of this step
    T *overwritten;            // [R, W] out: what stood in the least-used slots; or null
    T *scratch;                // step_forward_scratch(shape, threads)
};

MANN_BOTH int64_t step_forward_scratch(const MemoryShape &s, int threads) {
    Plan plan;
    plan.take(s.N), plan.take(s.N), plan.take(column_parts(s.N, s.W, threads) * s.words());
    return plan.size;
}

// The first half of a step: erase, write (eq. 8), address (eq. 2 and 3). Scratch: [N] for the square sums of the rows,
// [N] for the sums of the write weights over heads.
template <typename T> MANN_INLINE void write_and_address(const StepShape<T> &s, const StepForward<T> &p) {
    Plan plan;
    T *squares = p.scratch + plan.take(s.N), *write_sums = p.scratch + plan.take(s.N);
    for_rows(s.N, s.lanes, [&](int n, int lane, bool exists) {
        T *row = p.memory + n * s.stride;
        bool erased = false;
        for (int i = 0; exists && i < s.R; ++i) {
            if (p.least_used[i] != n) continue;
            erased |= i < s.erased();
            for (int w = lane; p.overwritten && w < s.W; w += s.lanes) p.overwritten[i * s.W + w] = row[w];
        }
        T write_sum = 0;
        for (int g = 0; exists && g < s.groups(); ++g) {
            const Heads<T> weights = write_weights(s, p.previous, p.gate, p.least_used, g, n);
            for (int w = lane; w < s.W; w += s.lanes)
                row[w] = (erased && g == 0 ? T(0) : row[w]) + dot(weights, load_heads(p.add, g * s.W + w));
#pragma unroll
            for (int j = 0; j < kHeadGroup; ++j) write_sum += weights.head[j];
        }
        if (exists && lane == 0) write_sums[n] = write_sum;
        match_row(s, p.memory, p.key, n, lane, exists, p.weights, squares);
    });
    __syncthreads();
    for_heads(s.R, [&](int h) { softmax_of_cosine(s, h, p.key, p.beta, s.eps, squares, p.weights); });
}

// The second half, after a barrier: read (eq. 4) and update the usage (eq. 5). give(h, w, read) takes the reads.
template <typename T, typename Give>
MANN_INLINE void read_and_use(const StepShape<T> &s, const StepForward<T> &p, Give &&give) {
    Plan plan;
    plan.take(s.N);
    const T *write_sums = p.scratch + plan.take(s.N);
    const int parts = column_parts(s.N, s.W, blockDim.x);
    T *sums = p.scratch + plan.take(parts * s.words());
    for_columns(s.W, parts, [&](int w, int part) {
        for (int g = 0; g < s.groups(); ++g)
            store_heads(sums + part * s.words(), g * s.W + w, sum_column(s, p.memory, p.weights, g, w, part, parts));
    });
    for_each(s.N, [&](int n) {
        T read_sum = 0;
        for (int h = 0; h < s.R; ++h) read_sum += p.weights[of_head(h, n, s.N)];
        p.usage[n] = s.decay * p.usage[n] + read_sum + write_sums[n];
    });
    __syncthreads();
    for_numbers(s.R, s.W, [&](int h, int w, int) { give(h, w, sum_parts(s, sums, parts, h, w)); });
}

template <typename T, typename Give>
MANN_INLINE void step_forward(const StepShape<T> &s, const StepForward<T> &p, Give &&give) {
    write_and_address(s, p);
    __syncthreads();
    read_and_use(s, p, give);
}

// One step backward; `memory` is the memory after the step, and with `undo` becomes the one before it.
template <typename T> struct StepBackward {
    T *memory, *dmemory;       // [N, stride] in and out
    T *weights;                // [G, N, 4] in: the read weights of the step; destroyed
    T *dweights;               // [G, N, 4] in: their gradient; out: that of the previous step's
    const T *previous;         // [G, N, 4], the read weights of the previous step
    const T *dreads;           // [G, W, 4]
    const T *key, *add;        // [G, W, 4]; add may be key
    const T *gate, *beta;      // [R]; gate after its sigmoid, beta may be null
    const int32_t *least_used; // [R]
    const T *overwritten;      // [R, W], of write_and_address; only with undo
    T *dgate, *dbeta;          // [R] out; dgate before the sigmoid; dbeta may be null
    T *scratch;                // step_backward_scratch(shape, threads)
};

MANN_BOTH int64_t step_backward_scratch(const MemoryShape &s, int threads) {
    Plan plan;
    plan.take(s.slots()), plan.take(s.N), plan.take(s.R);
    plan.take(2 * column_parts(s.N, s.W, threads) * s.words());
    return plan.size;
}

// Row n of the gradient of memory, completed: the read, eq. 4, and the cosine, eq. 2, are behind it, the write before.
// The write weights take the place of the read weights, their gradient that of the factors in `dots`.
template <typename T>
MANN_INLINE void backward_of_row(const StepShape<T> &s, const StepBackward<T> &p, T *dots, int n, int lane,
                                 bool exists) {
    const T *row = p.memory + n * s.stride;
    T *drow = p.dmemory + n * s.stride;
    const T shrink = exists ? row_factor(s, dots, n) : T(0);
    for (int g = 0; exists && g < s.groups(); ++g) {
        const Heads<T> read = load_heads(p.weights, g * s.N + n);
        const Heads<T> ddot = load_heads(p.dweights, g * s.N + n);
        for (int w = lane; w < s.W; w += s.lanes) {
            T dm = drow[w] - (g == 0 ? shrink * row[w] : T(0));
            dm += dot(read, load_heads(p.dreads, g * s.W + w));
            drow[w] = dm + dot(ddot, load_heads(p.key, g * s.W + w));
        }
    }
    for (int g = 0; g < s.groups(); ++g) {
        Heads<T> dwrite{};
        for (int w = lane; exists && w < s.W; w += s.lanes) add_to(dwrite, drow[w], load_heads(p.add, g * s.W + w));
        dwrite = sum_lanes(dwrite, s.lanes);
        __syncwarp(); // every lane has read what lane 0 replaces
        if (!exists || lane != 0) continue;
        store_heads(p.weights, g * s.N + n, write_weights(s, p.previous, p.gate, p.least_used, g, n));
        store_heads(dots, g * s.N + n, dwrite);
    }
}

// One column of a part: dkey = ddots . M, dadd = write weights . dM, to `sums`; and the write undone.
template <bool undo, typename T>
MANN_INLINE void backward_of_column(const StepShape<T> &s, const StepBackward<T> &p, T *sums, int w, int part,
                                    int parts) {
    for (int g = 0; g < s.groups(); ++g) {
        const int at = g * s.W + w;
        store_heads(sums + part * s.words(), at, sum_column(s, p.memory, p.dweights, g, w, part, parts));
        store_heads(sums + (parts + part) * s.words(), at, sum_column(s, p.dmemory, p.weights, g, w, part, parts));
    }
    for (int n = part; undo && n < s.N; n += parts) {
        T m = p.memory[n * s.stride + w];
        for (int g = 0; g < s.groups(); ++g)
            m -= dot(load_heads(p.weights, g * s.N + n), load_heads(p.add, g * s.W + w));
        p.memory[n * s.stride + w] = m;
    }
}

// give(h, w, dkey, dadd) takes the gradients of key and add; where add is key, that of the key is their sum.
template <bool undo, typename T, typename Give>
MANN_INLINE void step_backward(const StepShape<T> &s, const StepBackward<T> &p, Give &&give) {
    Plan plan;
    const int parts = column_parts(s.N, s.W, blockDim.x);
    T *dots = p.scratch + plan.take(s.slots()), *squares = p.scratch + plan.take(s.N);
    T *dkey_factor = p.scratch + plan.take(s.R), *sums = p.scratch + plan.take(2 * parts * s.words());
    for_rows(s.N, s.lanes, [&](int n, int lane, bool exists) {
        match_row(s, p.memory, p.dreads, n, lane, exists, dots, static_cast<T *>(nullptr)); // through the read
        for (int g = 0; exists && lane == 0 && g < s.groups(); ++g) {
            Heads<T> sum = load_heads(p.dweights, g * s.N + n);
            add_to(sum, T(1), load_heads(dots, g * s.N + n));
            store_heads(p.dweights, g * s.N + n, sum);
        }
        match_row(s, p.memory, p.key, n, lane, exists, dots, squares);
    });
    __syncthreads();
    for_heads(s.R, [&](int h) {
        const auto grad = softmax_of_cosine_backward(s, h, p.key, p.beta, s.eps, squares, p.weights, p.dweights, dots);
        if (lane_of_warp() != 0) return;
        dkey_factor[h] = grad.dkey_factor;
        if (p.dbeta) p.dbeta[h] = grad.dbeta;
    });
    __syncthreads();
    for_rows(s.N, s.lanes, [&](int n, int lane, bool exists) { backward_of_row(s, p, dots, n, lane, exists); });
    __syncthreads();
    for_columns(s.W, parts, [&](int w, int part) { backward_of_column<undo>(s, p, sums, w, part, parts); });
    for_heads(s.R, [&](int h) {
        T dsigma = 0;
        for (int n = lane_of_warp(); n < s.N; n += kLanes)
            dsigma += dots[of_head(h, n, s.N)] * (p.previous[of_head(h, n, s.N)] - own_slot(s, p.least_used, h, n));
        dsigma = sum_lanes(dsigma);
        if (lane_of_warp() == 0) p.dgate[h] = dsigma * p.gate[h] * (1 - p.gate[h]);
    });
    __syncthreads();
    for_numbers(s.R, s.W, [&](int h, int w, int i) {
        const T dkey = sum_parts(s, sums, parts, h, w) - dkey_factor[h] * p.key[of_head(h, w, s.W)];
        give(h, w, dkey, sum_parts(s, sums + parts * s.words(), parts, h, w));
        const int at = p.least_used[h] * s.stride + w;
        if (h < s.erased()) p.dmemory[at] = 0;
        if (undo) p.memory[at] = p.overwritten[i]; // exactly, where the most was overwritten
    });
    for_each(s.N, [&](int n) {
        for (int h = 0; h < s.R; ++h) p.dweights[of_head(h, n, s.N)] = p.gate[h] * dots[of_head(h, n, s.N)];
    });
}

} // namespace mann::cuda
