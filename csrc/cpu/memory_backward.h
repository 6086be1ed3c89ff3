// One time step of the memory of one example, backward.
#pragma once

#include "memory_forward.h"

namespace mann::MANN_ISA {

// The parts of the backward pass over memory; see backward_pass.
enum : unsigned { kMatch = 1, kRead = 2, kWrite = 4, kRollBack = 8, kTied = 16 };

// Pointers of one group of heads; the gradient of memory is completed and handed on to what made the memory.
template <typename T> struct BackwardPass {
    T *memory, *dmemory;               // [W, P]; memory is only written to by kRollBack
    const T *read_weights, *dreads;    // kRead: [heads, P], [heads, W]
    const T *ddots, *key, *row_factor; // kMatch: [heads, P], [heads, W], [P]
    const T *write_weights, *add;      // kWrite, kRollBack: [heads, P], [heads, W]
    T *dwrite_weights;                 // kWrite: [heads, P], added to
    T *dkey, *dadd;                    // [heads, W]; with kTied dkey takes the gradient of add too
};

// One pass over memory and its gradient, with M the memory after the write, per head:
//   kRead      dM += read_weights (x) dreads
//   kMatch     dM += ddots (x) key - row_factor * M ;   dkey = ddots . M
//   kWrite     dadd = write_weights . dM ;   dwrite_weights += add . dM
//   kRollBack  M -= write_weights (x) add
template <typename T, int heads, unsigned parts>
inline void backward_pass(int64_t P, int64_t W, const BackwardPass<T> &p) {
    constexpr bool tied = parts & kTied;
    constexpr int lanes = kLanes<T>, block = MANN_VECTOR_REGISTERS == 32 ? (tied ? 4 : 2) : 1;
    const auto columns = [=](auto columns_at_once, int64_t n0, int64_t width, int64_t w0) {
        constexpr int count = columns_at_once;
        T *rows = p.memory + n0 * W + w0 * width, *drows = p.dmemory + n0 * W + w0 * width;
        Vec<T> dkey[heads * count] = {}, dadd[heads * count] = {};
        for (int64_t n = 0; n < width; n += lanes) {
            Vec<T> m[count] = {}, dm[count];
            for (int j = 0; j < count; ++j) {
                dm[j] = load(drows + j * width + n);
                prefetch(drows + (j + count) * width + n);
                if constexpr (parts & (kMatch | kRollBack)) m[j] = load(rows + j * width + n);
            }
            if constexpr (parts & kRead) {
                for (int h = 0; h < heads; ++h) {
                    const Vec<T> weight = load(p.read_weights + h * P + n0 + n);
                    for (int j = 0; j < count; ++j) dm[j] += weight * broadcast(p.dreads[h * W + w0 + j]);
                }
            }
            if constexpr (parts & kMatch) {
                for (int h = 0; h < heads; ++h) {
                    const Vec<T> ddot = load(p.ddots + h * P + n0 + n);
                    for (int j = 0; j < count; ++j) {
                        dkey[h * count + j] += ddot * m[j];
                        dm[j] += ddot * broadcast(p.key[h * W + w0 + j]);
                    }
                }
                const Vec<T> factor = load(p.row_factor + n0 + n);
                for (int j = 0; j < count; ++j) dm[j] -= factor * m[j];
            }
            if constexpr (parts & kWrite) {
                for (int h = 0; h < heads; ++h) {
                    const Vec<T> weight = load(p.write_weights + h * P + n0 + n);
                    Vec<T> dweight = load(p.dwrite_weights + h * P + n0 + n);
                    for (int j = 0; j < count; ++j) {
                        const Vec<T> add = broadcast(p.add[h * W + w0 + j]);
                        (tied ? dkey : dadd)[h * count + j] += weight * dm[j];
                        dweight += add * dm[j];
                        if constexpr (parts & kRollBack) m[j] -= weight * add;
                    }
                    store(p.dwrite_weights + h * P + n0 + n, dweight);
                }
            }
            for (int j = 0; j < count; ++j) {
                store(drows + j * width + n, dm[j]);
                if constexpr (parts & kRollBack) store(rows + j * width + n, m[j]);
            }
        }
        if constexpr (parts & kMatch) add_lane_sums<heads, count, T>(dkey, p.dkey + w0, W, n0 == 0);
        if constexpr ((parts & kWrite) && !tied) add_lane_sums<heads, count, T>(dadd, p.dadd + w0, W, n0 == 0);
    };
    in_tiles(P, [=](int64_t n0, int64_t width) {
        int64_t w = 0;
        for (; w + block <= W; w += block) columns(std::integral_constant<int, block>{}, n0, width, w);
        for (; w < W; ++w) columns(std::integral_constant<int, 1>{}, n0, width, w);
    });
}

// Backward of softmax_of_cosine for one head: dweights [P] becomes ddots [P], row_factor [P] is added to, dkey_factor
// is what times key must be taken off dkey. Returns dbeta.
template <typename T> struct CosineGrad {
    T dbeta, dkey_factor;
};
template <typename T>
inline CosineGrad<T> softmax_of_cosine_backward(int64_t P, const T *weights, const T *dots, const T *row_squares,
                                                T key_square, T beta, T eps, T *dweights, T *row_factor) {
    constexpr int lanes = kLanes<T>;
    Vec<T> weighted{};
    for (int64_t n = 0; n < P; n += lanes) weighted += load(weights + n) * load(dweights + n);
    const T mean = sum_lanes<T>(weighted);
    Vec<T> dbeta{}, dkey_factor{};
    for (int64_t n = 0; n < P; n += lanes) {
        const Vec<T> dx = load(weights + n) * (load(dweights + n) - mean);
        const Vec<T> row_square = load(row_squares + n);
        const auto similarity = cosine(load(dots + n), row_square, key_square, eps);
        const Vec<T> ddot = beta * dx * similarity.inverse_norm;
        // of K with respect to |key|^2 |row|^2, doubled
        const Vec<T> through_norm = ddot * similarity.value * similarity.inverse_norm;
        dbeta += dx * similarity.value;
        dkey_factor += through_norm * row_square;
        store(row_factor + n, load(row_factor + n) + through_norm * key_square);
        store(dweights + n, ddot);
    }
    return {sum_lanes<T>(dbeta), sum_lanes<T>(dkey_factor)};
}

// Backward of address: dweights [R, P] becomes ddots, row_factor [P] is set, dkey_factor [R] as above; dbeta [R] may be
// null.
template <typename T>
inline void address_backward(const MemoryShape<T> &s, const T *weights, const T *dots, const T *row_squares,
                             const T *keys, int64_t stride, const T *beta, T *dweights, T *row_factor, T *dkey_factor,
                             T *dbeta) {
    std::fill_n(row_factor, s.P, T(0));
    for (int64_t h = 0; h < s.R; ++h) {
        const auto grad = softmax_of_cosine_backward(s.P, weights + h * s.P, dots + h * s.P, row_squares,
                                                     square_sum(keys + h * stride, s.W), beta ? beta[h] : T(1), s.eps,
                                                     dweights + h * s.P, row_factor);
        dkey_factor[h] = grad.dkey_factor;
        if (dbeta) dbeta[h] = grad.dbeta;
    }
}

// Backward of interpolate: the gradients of the previous read weights [R, P] and of the gate [R] before its sigmoid.
template <typename T>
inline void interpolate_backward(const MemoryShape<T> &s, const T *dwrite_weights, const T *read_weights, const T *gate,
                                 const int32_t *least_used, T *dread_weights, T *dgate) {
    for (int64_t h = 0; h < s.R; ++h) {
        const T *dweights = dwrite_weights + h * s.P;
        Vec<T> sum{};
        for (int64_t n = 0; n < s.P; n += kLanes<T>) {
            sum += load(dweights + n) * load(read_weights + h * s.P + n);
            store(dread_weights + h * s.P + n, gate[h] * load(dweights + n));
        }
        T dsigma = sum_lanes<T>(sum);
        for (int64_t i = s.shared ? 0 : h; i < (s.shared ? s.R : h + 1); ++i) dsigma -= dweights[least_used[i]];
        dgate[h] = dsigma * gate[h] * (1 - gate[h]);
    }
}

// What backward needs of a step beside its inputs: kept for the steps of a segment only, which are recomputed.
template <typename T> struct StepRecord {
    T *read_weights, *dots; // [R, P]
    T *row_squares;         // [P]
    T *overwritten;         // [R, W], of the least-used slots before the step: what is written there is not small

    StepRecord(const MemoryShape<T> &s, T *base)
        : read_weights(base), dots(base + s.R * s.P), row_squares(dots + s.R * s.P), overwritten(row_squares + s.P) {}
};

inline int64_t step_record_size(const StepOptions &o, int64_t P) { return (2 * o.R + 1) * P + padded_slots(o.R * o.W); }

// Undoing writes rounds, and small rows would drown in what was written to them later: while the steps of a segment are
// recomputed, every so many of them the memory is set aside, to go on from there on the way back.
constexpr int64_t kRestartEvery = 8;
inline int64_t restarts_size(const StepOptions &o, int64_t P, int64_t steps) { return steps / kRestartEvery * o.W * P; }
// After step j of the segment was taken, and before it is undone. `restarts` holds one memory [W, P] of this example
// every `stride` numbers.
template <typename T> inline void set_aside(int64_t j, const T *memory, int64_t size, T *restarts, int64_t stride) {
    if ((j + 1) % kRestartEvery == 0) convert(memory, restarts + j / kRestartEvery * stride, size);
}
template <typename T> inline void restart(int64_t j, T *memory, int64_t size, const T *restarts, int64_t stride) {
    if ((j + 1) % kRestartEvery == 0) convert(restarts + j / kRestartEvery * stride, memory, size);
}

// One step backward; `memory` is the memory after the step, and becomes the one before it. `gate` is after its sigmoid.
template <typename T> struct StepBackward {
    T *memory, *dmemory;       // [W, P] in and out
    T *dread_weights;          // [R, P] in: of the step's read weights; out: of the previous step's
    const T *dreads;           // [R, W]
    const T *previous_weights; // [R, P], the read weights of the previous step
    const T *key, *add;        // [R, W]; add may be key
    const T *gate, *beta;      // [R]; beta may be null
    const int32_t *least_used; // [R]
    T *dkey, *dadd;            // [R, W] out; where add is key, dkey is the whole gradient and dadd is left alone
    T *dgate, *dbeta;          // [R] out; dgate before the sigmoid; dbeta may be null
    T *scratch;                // step_backward_scratch(shape)
};

inline int64_t step_backward_scratch(const StepOptions &o, int64_t P) { return P * (1 + 3 * o.R) + o.R * (o.W + 1); }

template <typename T>
inline void step_backward(const MemoryShape<T> &s, const StepRecord<T> &record, const StepBackward<T> &p) {
    const int64_t P = s.P, W = s.W, R = s.R;
    constexpr int lanes = kLanes<T>;
    T *row_factor = p.scratch, *write_weights = row_factor + P, *dwrite_weights = write_weights + R * P;
    T *dweights = dwrite_weights + R * P, *dadd_of_key = dweights + R * P, *dkey_factor = dadd_of_key + R * W;
    const bool tied = p.add == p.key;

    match(P, W, p.memory, R, p.dreads, dweights, static_cast<T *>(nullptr)); // through the read
    for (int64_t n = 0; n < R * P; n += lanes) {
        store(dweights + n, load(dweights + n) + load(p.dread_weights + n));
        store(dwrite_weights + n, Vec<T>{});
    }
    address_backward(s, record.read_weights, record.dots, record.row_squares, p.key, W, p.beta, dweights, row_factor,
                     dkey_factor, p.dbeta);
    interpolate(s, p.previous_weights, p.gate, p.least_used, write_weights);

    const auto pass_of = [&](int64_t h) {
        return BackwardPass<T>{p.memory,
                               p.dmemory,
                               record.read_weights + h * P,
                               p.dreads + h * W,
                               dweights + h * P,
                               p.key + h * W,
                               row_factor,
                               write_weights + h * P,
                               p.add + h * W,
                               dwrite_weights + h * P,
                               p.dkey + h * W,
                               p.dadd ? p.dadd + h * W : nullptr};
    };
    constexpr unsigned whole = kMatch | kRead | kWrite | kRollBack;
    if (R <= kHeadGroup && tied) {
        in_groups<kHeadGroup>(R,
                              [&](auto heads, int64_t h) { backward_pass<T, heads, whole | kTied>(P, W, pass_of(h)); });
    } else if (R <= kHeadGroup) {
        in_groups<kHeadGroup>(R, [&](auto heads, int64_t h) { backward_pass<T, heads, whole>(P, W, pass_of(h)); });
    } else { // dM must hold every head's part before any head's write sees it
        in_groups<kHeadGroup>(R, [&](auto heads, int64_t h) {
            backward_pass<T, heads, kMatch | kRead>(P, W, pass_of(h));
            for (int64_t n = 0; n < P; n += lanes) store(row_factor + n, Vec<T>{}); // counted once
        });
        in_groups<kHeadGroup>(R, [&](auto heads, int64_t h) {
            BackwardPass<T> pass = pass_of(h);
            if (tied) pass.dadd = dadd_of_key;
            backward_pass<T, heads, kWrite | kRollBack>(P, W, pass);
            for (int64_t i = 0; tied && i < heads * W; ++i) p.dkey[h * W + i] += dadd_of_key[i];
        });
    }
    for (int64_t h = 0; h < R; ++h)
        for (int64_t w = 0; w < W; ++w) p.dkey[h * W + w] -= dkey_factor[h] * p.key[h * W + w];
    for (int64_t i = 0; i < s.erased(); ++i) set_slot(s, p.dmemory, p.least_used[i], static_cast<const T *>(nullptr));
    for (int64_t i = 0; i < R; ++i) set_slot(s, p.memory, p.least_used[i], record.overwritten + i * W);
    interpolate_backward(s, dwrite_weights, p.previous_weights, p.gate, p.least_used, p.dread_weights, p.dgate);
}

} // namespace mann::MANN_ISA
