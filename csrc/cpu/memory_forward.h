// One time step of the memory of one example, forward.
#pragma once

#include "memory.h"

namespace mann::MANN_ISA {

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
    for (int64_t i = 0; i < n; i += kLanes<Arith<S>>)
        store_some(target + i, sigmoid(load_arith(source + i, n - i)), n - i);
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

// Adds the outer products of `writers` heads (eq. 8) and, of the new rows, takes the dot products with `readers`
// vectors and the square sums: one pass. write_weights [writers, P], add [writers, W], keys [readers, W], dots
// [readers, P], row_squares [P].
template <typename T, int writers, int readers, bool squares>
inline void write_and_match(int64_t P, int64_t W, T *memory, const T *write_weights, const T *add, const T *keys,
                            T *dots, T *row_squares) {
    constexpr int lanes = kLanes<T>, wide = MANN_VECTOR_REGISTERS == 32 ? 2 : 1;
    const auto strip = [=](auto vectors_at_once, T *rows, int64_t stride, int64_t n0) {
        constexpr int vectors = vectors_at_once;
        Vec<T> weight[writers + 1][vectors], dot[readers + 1][vectors] = {}, square[vectors] = {};
        for (int h = 0; h < writers; ++h)
            for (int v = 0; v < vectors; ++v) weight[h][v] = load(write_weights + h * P + n0 + v * lanes);
        for (int64_t w = 0; w < W; ++w, rows += stride) {
            Vec<T> m[vectors];
            for (int v = 0; v < vectors; ++v) {
                m[v] = load(rows + v * lanes);
                prefetch(rows + (v + vectors) * lanes); // the next strip: the hardware does not see the stride
            }
            if constexpr (writers > 0) {
                for (int h = 0; h < writers; ++h)
                    for (int v = 0; v < vectors; ++v) m[v] += weight[h][v] * broadcast(add[h * W + w]);
                for (int v = 0; v < vectors; ++v) store(rows + v * lanes, m[v]);
            }
            for (int h = 0; h < readers; ++h)
                for (int v = 0; v < vectors; ++v) dot[h][v] += m[v] * broadcast(keys[h * W + w]);
            for (int v = 0; squares && v < vectors; ++v) square[v] += m[v] * m[v];
        }
        for (int h = 0; h < readers; ++h)
            for (int v = 0; v < vectors; ++v) store(dots + h * P + n0 + v * lanes, dot[h][v]);
        for (int v = 0; squares && v < vectors; ++v) store(row_squares + n0 + v * lanes, square[v]);
    };
    in_tiles(P, [=](int64_t n0, int64_t width) {
        T *tile = memory + n0 * W;
        int64_t n = 0;
        for (; n + wide * lanes <= width; n += wide * lanes)
            strip(std::integral_constant<int, wide>{}, tile + n, width, n0 + n);
        for (; n < width; n += lanes) strip(std::integral_constant<int, 1>{}, tile + n, width, n0 + n);
    });
}

// dots [vectors, P] = keys [vectors, W] . memory, and the square sums of the rows unless row_squares is null.
template <typename T>
inline void match(int64_t P, int64_t W, T *memory, int64_t vectors, const T *keys, T *dots, T *row_squares) {
    in_groups<kHeadGroup>(vectors, [&](auto group, int64_t first) {
        if (first == 0 && row_squares)
            write_and_match<T, 0, group, true>(P, W, memory, nullptr, nullptr, keys, dots, row_squares);
        else
            write_and_match<T, 0, group, false>(P, W, memory, nullptr, nullptr, keys + first * W, dots + first * P,
                                                nullptr);
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

// Eq. 2 and 3 for one head, from dot products [P] to read weights [P], which may take their place. NaN anywhere makes
// every weight NaN, as in softmax.
template <typename T>
inline void softmax_of_cosine(int64_t N, int64_t P, const T *dots, const T *row_squares, T key_square, T beta, T eps,
                              T *weights) {
    constexpr int lanes = kLanes<T>;
    Vec<T> highest = broadcast(-std::numeric_limits<T>::infinity());
    for (int64_t n = 0; n < P; n += lanes) {
        Vec<T> x = cosine(load(dots + n), load(row_squares + n), key_square, eps).value * beta;
        if (n + lanes > N) // the padding takes no part
            for (int i = 0; i < lanes; ++i)
                if (n + i >= N) x[i] = -std::numeric_limits<T>::infinity();
        store(weights + n, x);
        highest = highest < x ? x : highest;
    }
    const T top = largest_lane<T>(highest);
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

// Eq. 2 and 3 for every head, from dot products to read weights; keys lie `stride` numbers apart, of which those after
// the W-th are zero. beta [R] may be null (1).
template <typename T>
inline void address(const MemoryShape<T> &s, const T *dots, T *row_squares, const T *keys, int64_t stride,
                    const T *beta, T *weights) {
    pad_row_squares(s.N, s.P, row_squares);
    for (int64_t h = 0; h < s.R; ++h)
        softmax_of_cosine(s.N, s.P, dots + h * s.P, row_squares, square_sum(keys + h * stride, s.W),
                          beta ? beta[h] : T(1), s.eps, weights + h * s.P);
}

// Eq. 5.
template <typename T>
inline void update_usage(const MemoryShape<T> &s, const T *read_weights, const T *write_weights, T *usage) {
    for (int64_t n = 0; n < s.P; n += kLanes<T>) {
        Vec<T> read_sum{}, write_sum{};
        for (int64_t h = 0; h < s.R; ++h) read_sum += load(read_weights + h * s.P + n);
        for (int64_t h = 0; h < s.R; ++h) write_sum += load(write_weights + h * s.P + n);
        store(usage + n, s.decay * load(usage + n) + read_sum + write_sum);
    }
}

// target[h * stride + j] = (first ? 0 : itself) + the sum of the lanes of sums[h * count + j].
template <int heads, int count, typename T>
inline void add_lane_sums(const Vec<T> *sums, T *target, int64_t stride, bool first) {
    T out[heads * count];
    sum_lanes<heads * count, T>(sums, out);
    for (int h = 0; h < heads; ++h)
        for (int j = 0; j < count; ++j)
            target[h * stride + j] = out[h * count + j] + (first ? 0 : target[h * stride + j]);
}

// reads [heads, W] = weights [heads, P] . memory (eq. 4).
template <typename T, int heads> inline void read(int64_t P, int64_t W, const T *memory, const T *weights, T *reads) {
    constexpr int lanes = kLanes<T>, block = MANN_VECTOR_REGISTERS / 2 / heads;
    const auto columns = [=](auto columns_at_once, const T *tile, int64_t n0, int64_t width, int64_t w0) {
        constexpr int count = columns_at_once;
        Vec<T> sum[heads * count] = {};
        for (int64_t n = 0; n < width; n += lanes) {
            Vec<T> m[count];
            for (int j = 0; j < count; ++j) m[j] = load(tile + (w0 + j) * width + n);
            for (int h = 0; h < heads; ++h) {
                const Vec<T> weight = load(weights + h * P + n0 + n);
                for (int j = 0; j < count; ++j) sum[h * count + j] += weight * m[j];
            }
        }
        add_lane_sums<heads, count, T>(sum, reads + w0, W, n0 == 0);
    };
    in_tiles(P, [=](int64_t n0, int64_t width) {
        int64_t w = 0;
        for (; w + block <= W; w += block) columns(std::integral_constant<int, block>{}, memory + n0 * W, n0, width, w);
        for (; w < W; ++w) columns(std::integral_constant<int, 1>{}, memory + n0 * W, n0, width, w);
    });
}

// One step forward. All arrays are this example's; `gate` is after its sigmoid, `add` may be `key`. Without usage and
// reads the step is recomputed: the slots it chose are given.
template <typename T> struct StepForward {
    T *memory;             // [W, P] in and out
    T *usage;              // [P] in and out, or null
    const T *read_weights; // [R, P] of the previous step
    const T *key, *add;    // [R, W]
    const T *gate, *beta;  // [R]; beta may be null (1)
    T *write_weights;      // [R, P] out
    T *new_read_weights;   // [R, P] out
    T *dots;               // [R, P] out, may be new_read_weights: of the rows and keys
    T *row_squares;        // [P] out
    T *reads;              // [R, W] out, or null
    int32_t *least_used;   // [R] out; in where usage is null
    T *overwritten;        // [R, W] out: what stood in the least-used slots; or null
};

template <typename T> inline void step_forward(const MemoryShape<T> &s, const StepForward<T> &p) {
    const int64_t P = s.P, W = s.W;
    if (p.usage) least_used_slots(p.usage, s.N, s.R, p.least_used);
    interpolate(s, p.read_weights, p.gate, p.least_used, p.write_weights);
    for (int64_t i = 0; p.overwritten && i < s.R; ++i) get_slot(s, p.memory, p.least_used[i], p.overwritten + i * W);
    for (int64_t i = 0; i < s.erased(); ++i) set_slot(s, p.memory, p.least_used[i], static_cast<const T *>(nullptr));
    if (s.R <= kHeadGroup) {
        in_groups<kHeadGroup>(s.R, [&](auto group, int64_t) {
            write_and_match<T, group, group, true>(P, W, p.memory, p.write_weights, p.add, p.key, p.dots,
                                                   p.row_squares);
        });
    } else {
        in_groups<kHeadGroup>(s.R, [&](auto group, int64_t h) {
            write_and_match<T, group, 0, false>(P, W, p.memory, p.write_weights + h * P, p.add + h * W, nullptr,
                                                nullptr, nullptr);
        });
        match(P, W, p.memory, s.R, p.key, p.dots, p.row_squares);
    }
    address(s, p.dots, p.row_squares, p.key, W, p.beta, p.new_read_weights);
    if (!p.reads) return;
    in_groups<kHeadGroup>(s.R, [&](auto group, int64_t h) {
        read<T, group>(P, W, p.memory, p.new_read_weights + h * P, p.reads + h * W);
    });
    update_usage(s, p.new_read_weights, p.write_weights, p.usage);
}

} // namespace mann::MANN_ISA
