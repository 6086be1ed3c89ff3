// What the two directions of mann_sequence share: sizes, weights and heads.
//
// A cluster of `tile` blocks takes `tile` examples through time. Each block has a share of the hidden units: their rows
// of weight_hh (all four gates) and their columns of weight_head stay with it for the whole episode. It also owns one
// of the examples, whose memory stays in its shared memory.
#pragma once

#include "recurrent_columns.h"
#include "recurrent_rows.h"
#include "step.h"

namespace mann::cuda {

struct MannSizes {
    int T, B, checkpoint_every, N, W, R, H;
    bool write_add, key_strength, squash;
    // By with_tile(). A head is key, gate, strength and add.
    int tile, units, units_inverse; // of a cluster; of a block; 2^16 / units, rounded up
    int words, beta_at, add_at, head, recurrent;

    MannSizes with_tile(int of_cluster) const {
        MannSizes s = *this;
        s.tile = of_cluster, s.units = (H + of_cluster - 1) / of_cluster, s.units_inverse = (1 << 16) / s.units + 1;
        s.words = R * W, s.beta_at = s.words + R, s.add_at = s.beta_at + (key_strength ? R : 0);
        s.head = s.add_at + (write_add ? s.words : 0), s.recurrent = H + s.words;
        return s;
    }
    MANN_BOTH int64_t row(int t, int b) const { return int64_t(t) * B + b; } // of [T, B]
    // The recurrent input with h padded to whole steps of the tensor cores.
    template <typename S> MANN_BOTH int reads_at() const { return round_up(H, kDepth<S>); }
    template <typename S> MANN_BOTH int padded() const { return reads_at<S>() + words; }
};

// Hands out shared memory, on 16 bytes: offsets.
class Carver {
  public:
    explicit Carver(int64_t start = 0) : bytes_(start) {}
    template <typename T> int take(int64_t numbers) {
        const int64_t at = bytes_;
        bytes_ += (numbers * int64_t(sizeof(T)) + 15) / 16 * 16;
        return int(at);
    }
    int64_t bytes() const { return bytes_; }

  private:
    int64_t bytes_;
};

// The hidden unit of one example that a thread has.
struct Unit {
    int example, unit, b;
    bool exists;
};
// The part of a block in its cluster.
template <typename S, int tile> struct Share {
    const MannSizes &s;

    MANN_INLINE int rank() const { return block_again() % tile; }
    MANN_INLINE int first_example() const { return block_again() / tile * tile; }
    MANN_INLINE int owned() const { return block_again(); } // the example of the block
    MANN_INLINE int first_unit() const { return rank() * s.units; }
    MANN_INLINE int own() const { return max(min(s.H - first_unit(), s.units), 0); } // the last block may have fewer
    MANN_INLINE Unit unit_of_thread() const {
        const int thread = thread_again(), example = thread * s.units_inverse >> 16;
        const int unit = thread - example * s.units, b = first_example() + example;
        return {example, unit, b, example < tile && unit < own() && b < s.B};
    }
    // Where the unit stands in a row of [rows, H].
    MANN_INLINE int64_t at(const Unit &u, int64_t row) const { return row * s.H + first_unit() + u.unit; }

    // weight_hh [4H, H + words] at a row of the block, gate after gate, and a column of the padded input.
    MANN_INLINE S weight_hh(const S *weights, int row, int column) const {
        const int gate = row / s.units, unit = row % s.units, reads = s.reads_at<S>();
        const int k = column < s.H ? column : (column < reads ? -1 : s.H + column - reads);
        if (gate > 3 || unit >= own() || k < 0 || k >= s.recurrent) return S(0.0f);
        return weights[(int64_t(gate) * s.H + first_unit() + unit) * s.recurrent + k];
    }
    // weight_head [head, H], transposed.
    MANN_INLINE S weight_head(const S *weights, int unit, int p) const {
        return unit < own() && p < s.head ? weights[int64_t(p) * s.H + first_unit() + unit] : S(0.0f);
    }
};

// The real steps of each example of the cluster, none of those that do not exist -> [tile].
MANN_INLINE void take_lengths(const MannSizes &s, const int64_t *lengths, int first_example, int *target) {
    for_each(s.tile, [&](int e) {
        const int b = first_example + e;
        target[e] = b >= s.B ? 0 : (lengths ? int(max(min(lengths[b], int64_t(s.T)), int64_t(0))) : s.T);
    });
}

// The matrix [rows, columns] into rows that stand `leading` apart, with what is between them. at(row, column) is a
// weight, or zero beyond the matrix.
template <typename S, typename At> MANN_INLINE void take_matrix(S *target, int rows, int leading, At &&at) {
    for_numbers(rows, leading, [&](int row, int column, int i) { target[i] = at(row, column); });
}
template <typename S> MANN_INLINE void fill_zero(S *target, int count) {
    for_each(count, [&](int i) { target[i] = S(0.0f); });
}

// A head as the memory's step wants it.
template <typename T> struct Head {
    T *key, *add;   // [G, W, 4]; add is key if the key is written
    T *gate, *beta; // [R]; gate after its sigmoid; beta null if the strength is 1
};
// raw(p) is number p of the head before the activations.
template <typename T, typename Raw> MANN_INLINE void make_head(const MannSizes &s, const Head<T> &head, Raw &&raw) {
    for_numbers(head_groups(s.R) * kHeadGroup, s.W, [&](int h, int w, int i) {
        const int64_t at = of_head(h, w, s.W);
        const auto activated = [&](T x) { return s.squash ? hyperbolic_tangent(x) : x; };
        head.key[at] = h < s.R ? activated(raw(i)) : T(0);
        if (s.write_add) head.add[at] = h < s.R ? activated(raw(s.add_at + i)) : T(0);
    });
    for_each(s.R, [&](int h) {
        head.gate[h] = sigmoid(raw(s.words + h));
        if (!s.key_strength) return;
        const T x = raw(s.beta_at + h);
        head.beta[h] = x > 20 ? x : T(log1p(exponential(x))); // softplus
    });
}

} // namespace mann::cuda
