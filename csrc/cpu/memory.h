// One time step of the memory of one example, forward and backward.
//
// The memory stands transposed, [W, P]: P is the number of slots N rounded up to kSlotPadding, so the slots fill vector lanes and
// there is no tail to treat apart. A dot product with a key is then one multiply-add per element and no sum across lanes. Every
// array over slots ([P] or [R, P]) is padded alike; the padding of memory, weights and gradients is zero.
#pragma once

#include <limits>

#include "kernel.h"
#include "simd.h"

#include "../cells.h"

namespace mann::MANN_ISA {

constexpr int64_t kSlotPadding = 16;
inline int64_t padded_slots(int64_t N) { return (N + kSlotPadding - 1) / kSlotPadding * kSlotPadding; }

template <typename T> struct MemoryShape {
    int64_t N, P, W, R;
    bool shared, erase_all; // least-used slots: n-hot for every head, or one each; which of them are erased
    T decay, eps;

    int64_t erased() const { return erase_all ? R : 1; }
};

template <typename T> inline MemoryShape<T> memory_shape(const StepOptions &o) {
    return {o.N, padded_slots(o.N), o.W, o.R, o.shared, o.erase_all, T(o.decay), T(o.eps)};
}

// At most this many heads share a pass over memory, so that their accumulators stay in registers.
constexpr int kHeadGroup = 4;

// Calls f with the number of heads of each group as a compile-time constant, and the first head of the group.
template <int largest, typename F> inline void in_groups(int64_t heads, F &&f, int64_t first = 0) {
    for (; heads - first >= largest; first += largest) f(std::integral_constant<int, largest>{}, first);
    if constexpr (largest > 1) {
        if (heads > first) in_groups<largest - 1>(heads, f, first);
    }
}

// ---------------------------------------------------------------------------------------------------------------- forward

// The R smallest of usage [N], ascending, ties to the lowest index, NaN last -> slots [R].
template <typename T> inline void least_used_slots(const T *usage, int64_t N, int64_t R, int32_t *slots) {
    const auto less = [](T a, T b) { return a < b || (b != b && a == a); };
    int64_t found = 0;
    for (int64_t i = 0; i < N; ++i) {
        if (found == R && !less(usage[i], usage[slots[R - 1]])) continue;
        int64_t place = found < R ? found++ : R - 1;
        for (; place > 0 && less(usage[i], usage[slots[place - 1]]); --place) slots[place] = slots[place - 1];
        slots[place] = static_cast<int32_t>(i);
    }
}

template <typename S> inline void sigmoid_of(const S *source, Arith<S> *target, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes<Arith<S>>) store_some(target + i, sigmoid(load_arith(source + i, n - i)), n - i);
}

// Eq. 7: sigma * previous read weights + (1 - sigma) * own slot; gate [R] is sigma.
template <typename T>
inline void interpolate(const MemoryShape<T> &s, const T *read_weights, const T *gate, const int32_t *least_used,
                        T *write_weights) {
    for (int64_t h = 0; h < s.R; ++h) {
        T *row = write_weights + h * s.P;
        for (int64_t n = 0; n < s.P; n += kLanes<T>) store(row + n, gate[h] * load(read_weights + h * s.P + n));
        if (s.shared) {
            for (int64_t i = 0; i < s.R; ++i) row[least_used[i]] += 1 - gate[h];
        } else {
            row[least_used[h]] += 1 - gate[h];
        }
    }
}

// Adds the outer products of `writers` heads (eq. 8) and, of the new rows, takes the dot products with `readers` vectors and the
// square sums: one pass. write_weights [writers, P], add [writers, W], keys [readers, W], dots [readers, P], row_squares [P] or null.
template <typename T, int writers, int readers>
inline void write_and_match(int64_t P, int64_t W, T *memory, const T *write_weights, const T *add, const T *keys, T *dots,
                            T *row_squares) {
    constexpr int lanes = kLanes<T>;
    const auto strip = [=](auto width, int64_t n0) {
        constexpr int vectors = width; // of slots at once
        Vec<T> weight[writers + 1][vectors], dot[readers + 1][vectors] = {}, square[vectors] = {};
        for (int h = 0; h < writers; ++h)
            for (int v = 0; v < vectors; ++v) weight[h][v] = load(write_weights + h * P + n0 + v * lanes);
        for (int64_t w = 0; w < W; ++w) {
            T *row = memory + w * P + n0;
            Vec<T> m[vectors];
            for (int v = 0; v < vectors; ++v) m[v] = load(row + v * lanes);
            if constexpr (writers > 0) {
                for (int h = 0; h < writers; ++h)
                    for (int v = 0; v < vectors; ++v) m[v] += weight[h][v] * broadcast(add[h * W + w]);
                for (int v = 0; v < vectors; ++v) store(row + v * lanes, m[v]);
            }
            for (int h = 0; h < readers; ++h)
                for (int v = 0; v < vectors; ++v) dot[h][v] += m[v] * broadcast(keys[h * W + w]);
            for (int v = 0; v < vectors; ++v) square[v] += m[v] * m[v];
        }
        for (int h = 0; h < readers; ++h)
            for (int v = 0; v < vectors; ++v) store(dots + h * P + n0 + v * lanes, dot[h][v]);
        if (row_squares)
            for (int v = 0; v < vectors; ++v) store(row_squares + n0 + v * lanes, square[v]);
    };
    constexpr int wide = MANN_VECTOR_REGISTERS == 32 ? 2 : 1;
    int64_t n = 0;
    for (; n + wide * lanes <= P; n += wide * lanes) strip(std::integral_constant<int, wide>{}, n);
    for (; n < P; n += lanes) strip(std::integral_constant<int, 1>{}, n);
}

// dots [vectors, P] = keys [vectors, W] . memory, and the square sums of the rows.
template <typename T>
inline void match(int64_t P, int64_t W, T *memory, int64_t vectors, const T *keys, T *dots, T *row_squares) {
    in_groups<2 * kHeadGroup>(vectors, [&](auto group, int64_t first) {
        write_and_match<T, 0, group>(P, W, memory, nullptr, nullptr, keys + first * W, dots + first * P,
                                     first == 0 ? row_squares : nullptr);
    });
}

// The padding gets square sum 1: similarity 0 whatever eps is, and no NaN that a sum over slots would pick up.
template <typename T> inline void pad_row_squares(int64_t N, int64_t P, T *row_squares) {
    for (int64_t n = N; n < P; ++n) row_squares[n] = 1;
}

template <typename T> inline T square_sum(const T *vector, int64_t W) {
    Vec<T> sum{};
    for (int64_t w = 0; w < W; w += kLanes<T>) {
        const Vec<T> x = load_some(vector + w, W - w);
        sum += x * x;
    }
    return sum_lanes<T>(sum);
}

// Eq. 2 and 3 for one head, from dot products [P] to read weights [P] in place. NaN anywhere makes every weight NaN, as in softmax.
template <typename T>
inline void softmax_of_cosine(int64_t N, int64_t P, const T *row_squares, T key_square, T beta, T eps, T *weights) {
    constexpr int lanes = kLanes<T>;
    Vec<T> highest = broadcast(-std::numeric_limits<T>::infinity());
    for (int64_t n = 0; n < P; n += lanes) {
        Vec<T> x = cosine(load(weights + n), load(row_squares + n), key_square, eps).value * beta;
        if (n + lanes > N) // the padding takes no part
            for (int i = 0; i < lanes; ++i)
                if (n + i >= N) x[i] = -std::numeric_limits<T>::infinity();
        store(weights + n, x);
        highest = highest < x ? x : highest;
    }
    T top = highest[0];
    for (int i = 1; i < lanes; ++i) top = top < highest[i] ? highest[i] : top;
    Vec<T> sum{};
    for (int64_t n = 0; n < P; n += lanes) {
        Vec<T> e = exponential(load(weights + n) - top);
        if (n + lanes > N)
            for (int i = 0; i < lanes; ++i)
                if (n + i >= N) e[i] = 0;
        store(weights + n, e);
        sum += e;
    }
    const T scale = 1 / sum_lanes<T>(sum);
    for (int64_t n = 0; n < P; n += lanes) store(weights + n, load(weights + n) * scale);
    for (int64_t n = N; n < P; ++n) weights[n] = 0;
}

// reads [heads, W] = weights [heads, P] . memory (eq. 4).
template <typename T, int heads> inline void read(int64_t P, int64_t W, const T *memory, const T *weights, T *reads) {
    constexpr int lanes = kLanes<T>, accumulators = MANN_VECTOR_REGISTERS / 2;
    const auto columns = [=](auto width, int64_t w0) {
        constexpr int block = width;
        Vec<T> sum[heads * block] = {};
        for (int64_t n = 0; n < P; n += lanes) {
            Vec<T> m[block];
            for (int j = 0; j < block; ++j) m[j] = load(memory + (w0 + j) * P + n);
            for (int h = 0; h < heads; ++h) {
                const Vec<T> weight = load(weights + h * P + n);
                for (int j = 0; j < block; ++j) sum[h * block + j] += weight * m[j];
            }
        }
        T out[heads * block];
        sum_lanes<heads * block, T>(sum, out);
        for (int h = 0; h < heads; ++h)
            for (int j = 0; j < block; ++j) reads[h * W + w0 + j] = out[h * block + j];
    };
    constexpr int block = accumulators / heads;
    int64_t w = 0;
    for (; w + block <= W; w += block) columns(std::integral_constant<int, block>{}, w);
    for (; w < W; ++w) columns(std::integral_constant<int, 1>{}, w);
}

// The row of one slot becomes row [W], or zero where that is null; what stood there goes to `old` [W], if given.
template <typename T>
inline void set_slot(const MemoryShape<T> &s, T *memory, int64_t slot, const T *row, T *old = nullptr) {
    for (int64_t w = 0; w < s.W; ++w) {
        if (old) old[w] = memory[w * s.P + slot];
        memory[w * s.P + slot] = row ? row[w] : 0;
    }
}

// One step forward. All arrays are this example's; `gate` is after its sigmoid, `add` may be `key`.
template <typename T> struct StepForward {
    T *memory;             // [W, P] in and out
    T *usage;              // [P] in and out
    const T *read_weights; // [R, P] of the previous step
    const T *key, *add;    // [R, W]
    const T *gate, *beta;  // [R]; beta may be null (1)
    T *write_weights;      // [R, P] out
    T *new_read_weights;   // [R, P] out
    T *reads;              // [R, W] out
    int32_t *least_used;   // [R] out
    T *erased;             // [erased(), W] out: what stood in the erased slots; or null
    T *row_squares;        // [P] scratch
};

template <typename T> inline void step_forward(const MemoryShape<T> &s, const StepForward<T> &p) {
    const int64_t P = s.P, W = s.W;
    least_used_slots(p.usage, s.N, s.R, p.least_used);
    interpolate(s, p.read_weights, p.gate, p.least_used, p.write_weights);
    for (int64_t i = 0; i < s.erased(); ++i)
        set_slot(s, p.memory, p.least_used[i], static_cast<const T *>(nullptr), p.erased ? p.erased + i * W : nullptr);
    if (s.R <= kHeadGroup) {
        in_groups<kHeadGroup>(s.R, [&](auto group, int64_t) {
            write_and_match<T, group, group>(P, W, p.memory, p.write_weights, p.add, p.key, p.new_read_weights, p.row_squares);
        });
    } else {
        in_groups<kHeadGroup>(s.R, [&](auto group, int64_t h) {
            write_and_match<T, group, 0>(P, W, p.memory, p.write_weights + h * P, p.add + h * W, nullptr, nullptr, nullptr);
        });
        match(P, W, p.memory, s.R, p.key, p.new_read_weights, p.row_squares);
    }
    pad_row_squares(s.N, P, p.row_squares);
    for (int64_t h = 0; h < s.R; ++h)
        softmax_of_cosine(s.N, P, p.row_squares, square_sum(p.key + h * W, W), p.beta ? p.beta[h] : T(1), s.eps,
                          p.new_read_weights + h * P);
    in_groups<kHeadGroup>(s.R, [&](auto group, int64_t h) {
        read<T, group>(P, W, p.memory, p.new_read_weights + h * P, p.reads + h * W);
    });
    for (int64_t n = 0; n < P; n += kLanes<T>) { // eq. 5
        Vec<T> read_sum{}, write_sum{};
        for (int64_t h = 0; h < s.R; ++h) read_sum += load(p.new_read_weights + h * P + n);
        for (int64_t h = 0; h < s.R; ++h) write_sum += load(p.write_weights + h * P + n);
        store(p.usage + n, s.decay * load(p.usage + n) + read_sum + write_sum);
    }
}

// --------------------------------------------------------------------------------------------------------------- backward

// The parts of the backward pass over memory; see backward_pass.
enum : unsigned { kMatch = 1, kRead = 2, kWrite = 4, kRollBack = 8, kTied = 16 };

// Pointers of one group of heads; the gradient of memory is completed and handed on to what made the memory.
template <typename T> struct BackwardPass {
    T *memory, *dmemory;                        // [W, P]; memory is only written to by kRollBack
    const T *read_weights, *dreads;             // kRead: [heads, P], [heads, W]
    const T *ddots, *key, *row_factor;          // kMatch: [heads, P], [heads, W], [P]
    const T *write_weights, *add;               // kWrite, kRollBack: [heads, P], [heads, W]
    T *dwrite_weights;                          // kWrite: [heads, P], added to
    T *dkey, *dadd;                             // [heads, W]; with kTied dkey takes the gradient of add too
};

// One pass over memory and its gradient, with M the memory after the write, per head:
//   kRead      dM += read_weights (x) dreads
//   kMatch     dM += ddots (x) key - row_factor * M ;   dkey = ddots . M
//   kWrite     dadd = write_weights . dM ;   dwrite_weights += add . dM
//   kRollBack  M -= write_weights (x) add
template <typename T, int heads, unsigned parts>
inline void backward_pass(int64_t P, int64_t W, const BackwardPass<T> &p) {
    constexpr int lanes = kLanes<T>;
    constexpr bool tied = parts & kTied;
    const auto columns = [=](auto width, int64_t w0) {
        constexpr int block = width;
        Vec<T> dkey[heads * block] = {}, dadd[heads * block] = {};
        for (int64_t n = 0; n < P; n += lanes) {
            Vec<T> m[block] = {}, dm[block];
            for (int j = 0; j < block; ++j) {
                dm[j] = load(p.dmemory + (w0 + j) * P + n);
                if constexpr (parts & (kMatch | kRollBack)) m[j] = load(p.memory + (w0 + j) * P + n);
            }
            if constexpr (parts & kRead) {
                for (int h = 0; h < heads; ++h) {
                    const Vec<T> weight = load(p.read_weights + h * P + n);
                    for (int j = 0; j < block; ++j) dm[j] += weight * broadcast(p.dreads[h * W + w0 + j]);
                }
            }
            if constexpr (parts & kMatch) {
                for (int h = 0; h < heads; ++h) {
                    const Vec<T> ddot = load(p.ddots + h * P + n);
                    for (int j = 0; j < block; ++j) {
                        dkey[h * block + j] += ddot * m[j];
                        dm[j] += ddot * broadcast(p.key[h * W + w0 + j]);
                    }
                }
                const Vec<T> factor = load(p.row_factor + n);
                for (int j = 0; j < block; ++j) dm[j] -= factor * m[j];
            }
            if constexpr (parts & kWrite) {
                for (int h = 0; h < heads; ++h) {
                    const Vec<T> weight = load(p.write_weights + h * P + n);
                    Vec<T> dweight = load(p.dwrite_weights + h * P + n);
                    for (int j = 0; j < block; ++j) {
                        const Vec<T> add = broadcast(p.add[h * W + w0 + j]);
                        (tied ? dkey : dadd)[h * block + j] += weight * dm[j];
                        dweight += add * dm[j];
                        if constexpr (parts & kRollBack) m[j] -= weight * add;
                    }
                    store(p.dwrite_weights + h * P + n, dweight);
                }
            }
            for (int j = 0; j < block; ++j) {
                store(p.dmemory + (w0 + j) * P + n, dm[j]);
                if constexpr (parts & kRollBack) store(p.memory + (w0 + j) * P + n, m[j]);
            }
        }
        const auto put = [&](const Vec<T> *sums, T *target) {
            T out[heads * block];
            sum_lanes<heads * block, T>(sums, out);
            for (int h = 0; h < heads; ++h)
                for (int j = 0; j < block; ++j) target[h * W + w0 + j] = out[h * block + j];
        };
        if constexpr (parts & kMatch) put(dkey, p.dkey);
        if constexpr ((parts & kWrite) && !tied) put(dadd, p.dadd);
    };
    constexpr int block = MANN_VECTOR_REGISTERS == 32 ? 2 : 1;
    int64_t w = 0;
    for (; w + block <= W; w += block) columns(std::integral_constant<int, block>{}, w);
    for (; w < W; ++w) columns(std::integral_constant<int, 1>{}, w);
}

// Backward of softmax_of_cosine for one head: dweights [P] becomes ddots [P], row_factor [P] is added to, dkey_factor is what times
// key must be taken off dkey. Returns dbeta.
template <typename T> struct CosineGrad {
    T dbeta, dkey_factor;
};
template <typename T>
inline CosineGrad<T> softmax_of_cosine_backward(int64_t P, const T *weights, const T *dots, const T *row_squares, T key_square,
                                                T beta, T eps, T *dweights, T *row_factor) {
    constexpr int lanes = kLanes<T>;
    Vec<T> weighted{};
    for (int64_t n = 0; n < P; n += lanes) weighted += load(weights + n) * load(dweights + n);
    const T mean = sum_lanes<T>(weighted);
    Vec<T> dbeta{}, dkey_factor{};
    for (int64_t n = 0; n < P; n += lanes) {
        const Vec<T> dx = load(weights + n) * (load(dweights + n) - mean);
        const Vec<T> row_square = load(row_squares + n);
        const auto similarity = cosine(load(dots + n), row_square, key_square, eps);
        const Vec<T> ddot = beta * dx / similarity.norm;
        const Vec<T> through_norm = ddot * similarity.value / similarity.norm; // of K with respect to |key|^2 |row|^2, doubled
        dbeta += dx * similarity.value;
        dkey_factor += through_norm * row_square;
        store(row_factor + n, load(row_factor + n) + through_norm * key_square);
        store(dweights + n, ddot);
    }
    return {sum_lanes<T>(dbeta), sum_lanes<T>(dkey_factor)};
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

// One step backward; `memory` is the memory after the step, and becomes the one before it. `gate` is after its sigmoid.
template <typename T> struct StepBackward {
    T *memory, *dmemory;        // [W, P] in and out
    T *dread_weights;           // [R, P] in: of the step's read weights; out: of the previous step's
    const T *dreads;            // [R, W]
    const T *read_weights;      // [R, P] of the step
    const T *previous_weights;  // [R, P] of the previous step
    const T *key, *add;         // [R, W]; add may be key
    const T *gate, *beta;       // [R]; beta may be null
    const int32_t *least_used;  // [R]
    const T *erased;            // [erased(), W], or null: the erased slots are not restored
    T *dkey, *dadd;             // [R, W] out; where add is key, dkey is the whole gradient and dadd is left alone
    T *dgate, *dbeta;           // [R] out; dgate before the sigmoid; dbeta may be null
    T *scratch;                 // step_backward_scratch(shape)
};

template <typename T> inline int64_t step_backward_scratch(const MemoryShape<T> &s) {
    return s.P * (2 + 4 * s.R) + 2 * s.R * s.W;
}

template <typename T> inline void step_backward(const MemoryShape<T> &s, const StepBackward<T> &p) {
    const int64_t P = s.P, W = s.W, R = s.R;
    constexpr int lanes = kLanes<T>;
    T *row_squares = p.scratch, *row_factor = row_squares + P, *write_weights = row_factor + P;
    T *dwrite_weights = write_weights + R * P, *dots = dwrite_weights + R * P, *vectors = dots + 2 * R * P;
    const bool tied = p.add == p.key;

    // dots of the rows with every key, and with dreads: the gradient of the read weights
    std::memcpy(vectors, p.key, R * W * sizeof(T));
    std::memcpy(vectors + R * W, p.dreads, R * W * sizeof(T));
    match(P, W, p.memory, 2 * R, vectors, dots, row_squares);
    pad_row_squares(s.N, P, row_squares);
    T *dweights = dots + R * P;
    for (int64_t n = 0; n < P; n += lanes) store(row_factor + n, Vec<T>{});
    for (int64_t n = 0; n < R * P; n += lanes) {
        store(dweights + n, load(dweights + n) + load(p.dread_weights + n));
        store(dwrite_weights + n, Vec<T>{});
    }
    T *dkey_factor = vectors + R * W; // dreads is not needed there any more: it is read where it came from
    for (int64_t h = 0; h < R; ++h) {
        const auto grad = softmax_of_cosine_backward(P, p.read_weights + h * P, dots + h * P, row_squares,
                                                     square_sum(p.key + h * W, W), p.beta ? p.beta[h] : T(1), s.eps,
                                                     dweights + h * P, row_factor);
        if (p.dbeta) p.dbeta[h] = grad.dbeta;
        dkey_factor[h] = grad.dkey_factor;
    }
    interpolate(s, p.previous_weights, p.gate, p.least_used, write_weights);

    const auto pass_of = [&](int64_t h) {
        return BackwardPass<T>{p.memory,           p.dmemory,     p.read_weights + h * P,   p.dreads + h * W,
                               dweights + h * P,   p.key + h * W, row_factor,               write_weights + h * P,
                               p.add + h * W,      dwrite_weights + h * P, p.dkey + h * W,  p.dadd ? p.dadd + h * W : nullptr};
    };
    constexpr unsigned whole = kMatch | kRead | kWrite | kRollBack;
    if (R <= kHeadGroup && tied) {
        in_groups<kHeadGroup>(R, [&](auto heads, int64_t h) { backward_pass<T, heads, whole | kTied>(P, W, pass_of(h)); });
    } else if (R <= kHeadGroup) {
        in_groups<kHeadGroup>(R, [&](auto heads, int64_t h) { backward_pass<T, heads, whole>(P, W, pass_of(h)); });
    } else { // dM must hold every head's part before any head's write sees it
        T *dadd = vectors; // [heads, W] where the caller has none: the keys there are used up
        in_groups<kHeadGroup>(R, [&](auto heads, int64_t h) {
            backward_pass<T, heads, kMatch | kRead>(P, W, pass_of(h));
            for (int64_t n = 0; n < P; n += lanes) store(row_factor + n, Vec<T>{}); // counted once
        });
        in_groups<kHeadGroup>(R, [&](auto heads, int64_t h) {
            BackwardPass<T> pass = pass_of(h);
            if (tied) pass.dadd = dadd;
            backward_pass<T, heads, kWrite | kRollBack>(P, W, pass);
            for (int64_t i = 0; tied && i < heads * W; ++i) p.dkey[h * W + i] += dadd[i];
        });
    }
    for (int64_t h = 0; h < R; ++h)
        for (int64_t w = 0; w < W; ++w) p.dkey[h * W + w] -= dkey_factor[h] * p.key[h * W + w];
    for (int64_t i = 0; i < s.erased(); ++i) {
        set_slot(s, p.dmemory, p.least_used[i], static_cast<const T *>(nullptr));
        if (p.erased) set_slot(s, p.memory, p.least_used[i], p.erased + i * W);
    }
    interpolate_backward(s, dwrite_weights, p.previous_weights, p.gate, p.least_used, p.dread_weights, p.dgate);
}

} // namespace mann::MANN_ISA
