// augmented_conv2d backward. After pooling at most one pixel of a window has a gradient, and ReLU leaves out more, so
// the products go over lists of what is there: a list entry adds a number times a row of vectors that stay in
// registers.
#pragma once

#include "augmented_conv2d.h"

namespace mann::MANN_ISA {

template <typename T> struct Entry {
    T value;
    std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t> index;
};
template <typename T> struct List {
    const Entry<T> *entries;
    int64_t count;
};

constexpr int64_t kRowVectors = 9; // of a row that are in registers together

// Where the vectors of a row stand. A weight [O, K] becomes [blocks of kRowVectors vectors][O][vectors].
template <typename T> struct Rows {
    ConvShape s;
    ConvRows r;
    int64_t vectors; // of a row

    explicit Rows(const ConvShape &shape) : s(shape), r(shape) {
        vectors = r.unfold ? (s.K() + kLanes<T> - 1) / kLanes<T> : (s.C + kLanes<T> - 1) / kLanes<T> * r.taps;
    }
    int64_t in_block(int64_t first) const { return std::min(kRowVectors, vectors - first); }
    // From the position of an output pixel to vector v of its row.
    int64_t offset(int64_t v) const {
        if (r.unfold) return v * r.positions * kLanes<T>;
        const int64_t tap = v % r.taps;
        return (v / r.taps * r.positions + tap / s.k * s.padded_width() + tap % s.k) * kLanes<T>;
    }
    int64_t position(int64_t pixel) const {
        return r.unfold ? pixel : pixel / s.width() * s.padded_width() + pixel % s.width();
    }
};

// Calls f(k, step, count, at) for every vector of `outputs` rows of a weight [O, K]: its numbers are k + i * step, i <
// count, of the weight, and stand at `at` among the rows of vectors.
template <typename T, typename F> inline void for_vectors(const Rows<T> &rows, int64_t outputs, F &&f) {
    const int64_t K = rows.s.K(), taps = rows.r.unfold ? 1 : rows.r.taps, lengths = rows.r.unfold ? K : rows.s.C;
    int64_t at = 0;
    for (int64_t first = 0; first < rows.vectors; first += kRowVectors) {
        int64_t k[kRowVectors], count[kRowVectors];
        const int64_t n = rows.in_block(first);
        for (int64_t v = 0; v < n; ++v) {
            const int64_t channel = (first + v) / taps * kLanes<T>;
            k[v] = channel * taps + (first + v) % taps;
            count[v] = std::min<int64_t>(kLanes<T>, lengths - channel);
        }
        for (int64_t o = 0; o < outputs; ++o)
            for (int64_t v = 0; v < n; ++v, at += kLanes<T>) f(o * K + k[v], taps, count[v], at);
    }
}

// A weight [outputs, K] as rows of vectors, filled with zeros, and back.
template <typename S>
inline void pack_rows(const Rows<Arith<S>> &rows, const S *source, int64_t outputs, Arith<S> *target) {
    using T = Arith<S>;
    for_vectors(rows, outputs, [=](int64_t k, int64_t step, int64_t count, int64_t at) {
        if (count < kLanes<T>) store(target + at, Vec<T>{});
        for (int64_t i = 0; i < count; ++i) target[at + i] = to_arith(source[k + i * step]);
    });
}
template <typename S>
inline void unpack_rows(const Rows<Arith<S>> &rows, const Arith<S> *source, int64_t outputs, S *target) {
    for_vectors(rows, outputs, [=](int64_t k, int64_t step, int64_t count, int64_t at) {
        for (int64_t i = 0; i < count; ++i) target[k + i * step] = to_storage<S>(source[at + i]);
    });
}

// The vectors of a row: side by side, or each `offsets` away.
enum class Place { kTogether, kApart };

namespace detail {
template <int n, Place rows, typename T>
inline void add_block(List<T> list, const T *base, int64_t stride, const int64_t *offsets, T *target) {
    const auto row_at = [&](int v) { return rows == Place::kApart ? offsets[v] : int64_t(v * kLanes<T>); };
    const auto target_at = [&](int v) { return rows == Place::kApart ? int64_t(v * kLanes<T>) : offsets[v]; };
    Vec<T> sum[n] = {}; // added to the target as a whole, which rounds less than number by number
    int64_t at[n];
#pragma GCC unroll 9
    for (int v = 0; v < n; ++v) at[v] = row_at(v);
    for (int64_t i = 0; i < list.count; ++i) {
        const Vec<T> value = broadcast(list.entries[i].value);
        const T *row = base + list.entries[i].index * stride;
#pragma GCC unroll 9
        for (int v = 0; v < n; ++v) sum[v] += value * load(row + at[v]);
    }
#pragma GCC unroll 9
    for (int v = 0; v < n; ++v) store(target + target_at(v), load(target + target_at(v)) + sum[v]);
}
} // namespace detail

// target[v] += sum over the list of value * vector v of the row at base + index * stride, v < n <= kRowVectors. Either
// the vectors of a row are apart and those of the target together, or the other way round.
template <Place rows, typename T, int vectors = int(kRowVectors)>
inline void add_rows(int64_t n, List<T> list, const T *base, int64_t stride, const int64_t *offsets, T *target) {
    if (n == vectors) return detail::add_block<vectors, rows>(list, base, stride, offsets, target);
    if constexpr (vectors > 1) add_rows<rows, T, vectors - 1>(n, list, base, stride, offsets, target);
}

// ---- the gradient of x

// The gradients of one example as lists by pixel: entry.index is the output.
template <typename S>
void lists_by_pixel(const AugmentedConv2dBackwardArgs &a, int64_t example, Arith<S> *dy, Entry<Arith<S>> *entries,
                    List<Arith<S>> *slow, List<Arith<S>> *fast) {
    using T = Arith<S>;
    const ConvShape &s = a.shape;
    const int64_t P = s.pooled_pixels(), kept = P * s.O, outputs = s.padded_outputs();
    transpose(static_cast<const S *>(a.dy) + example * s.O * P, P, s.O, P, dy, outputs, outputs);
    const T *slopes = a.slopes ? static_cast<const T *>(a.slopes) + example * kept : nullptr;
    T *slow_dy = dy + P * outputs, *fast_dy = slow_dy + P * outputs;
    for (int64_t h = 0, w_all = 0; h < s.pooled_height(); ++h)
        for (int64_t w = 0; w < s.pooled_width(); ++w, ++w_all) {
            const uint8_t *codes = a.codes + example * kept + w_all * s.O;
            const T *of_slow = dy + w_all * outputs, *of_fast = of_slow;
            if (slopes) {
                for (int64_t o = 0; o < s.O; ++o) {
                    slow_dy[o] = of_slow[o] * slopes[w_all * s.O + o];
                    fast_dy[o] = of_slow[o] * slopes[a.examples * kept + w_all * s.O + o];
                }
                of_slow = slow_dy, of_fast = fast_dy;
            }
            int64_t pixels[4];
            const int64_t count = s.window(h, w, pixels);
            const auto list = [&](List<T> *lists, const T *values, int64_t q, int bit) {
                int64_t n = 0;
                for (int64_t o = 0; o < s.O; ++o) { // each is written, only what has a gradient stays
                    entries[n] = {values[o], static_cast<decltype(entries->index)>(o)};
                    n += (codes[o] & (kPixelBits | bit)) == (q | bit);
                }
                lists[pixels[q]] = {entries, n};
                entries += n;
            };
            for (int64_t q = 0; q < count; ++q) {
                list(slow, of_slow, q, kSlowBit);
                list(fast, of_fast, q, kFastBit);
            }
        }
}

// From vectors of channels, or from unfolded patches, to the image [C, H, W].
template <typename S> void give_image(const Rows<Arith<S>> &rows, const Arith<S> *source, S *target) {
    using T = Arith<S>;
    const ConvShape &s = rows.s;
    if (!rows.r.unfold) {
        for (int64_t c = 0; c < s.C; c += kLanes<T>, source += rows.r.positions * kLanes<T>)
            for (int64_t h = 0; h < s.H; ++h)
                transpose(source + ((h + s.padding) * s.padded_width() + s.padding) * kLanes<T>, kLanes<T>, s.W,
                          std::min<int64_t>(kLanes<T>, s.C - c), target + (c * s.H + h) * s.W, s.H * s.W, s.W);
        return;
    }
    const auto at = [&](int64_t k, int64_t pixel) {
        return source[(k / kLanes<T> * rows.r.positions + pixel) * kLanes<T> + k % kLanes<T>];
    };
    for (int64_t c = 0; c < s.C; ++c)
        for (int64_t h = 0; h < s.H; ++h)
            for (int64_t w = 0; w < s.W; ++w) {
                T sum = 0;
                for (int64_t i = 0; i < s.k; ++i)
                    for (int64_t j = 0; j < s.k; ++j) {
                        const int64_t y = h + s.padding - i, x = w + s.padding - j; // of the output that saw it there
                        if (y >= 0 && y < s.height() && x >= 0 && x < s.width())
                            sum += at((c * s.k + i) * s.k + j, y * s.width() + x);
                    }
                target[(c * s.H + h) * s.W + w] = to_storage<S>(sum);
            }
}

// dx (+)= the lists of all pixels with the rows of one weight, for vectors [first, first + kRowVectors).
template <typename T>
inline void scatter_rows(const Rows<T> &rows, int64_t first, const List<T> *lists, const T *weight,
                         const int64_t *offsets, T *dx) {
    const int64_t n = rows.in_block(first);
    for (int64_t pixel = 0; pixel < rows.s.pixels(); ++pixel)
        if (lists[pixel].count > 0)
            add_rows<Place::kTogether>(n, lists[pixel], weight, n * kLanes<T>, offsets,
                                       dx + rows.position(pixel) * kLanes<T>);
}

template <typename S>
void augmented_conv2d_backward_x(const AugmentedConv2dBackwardArgs &a, int64_t begin, int64_t end, void *memory) {
    using T = Arith<S>;
    const ConvShape &s = a.shape;
    const Rows<T> rows(s);
    const AugmentedConv2dBackwardXPlan plan(s, a.S);
    T *scratch = static_cast<T *>(memory), *slow = scratch + plan.slow, *fast = scratch + plan.fast,
      *dx = scratch + plan.dx, *mix = scratch + plan.mix;
    Entry<T> *entries = reinterpret_cast<Entry<T> *>(scratch + plan.entries);
    List<T> *lists = reinterpret_cast<List<T> *>(scratch + plan.lists);
    const int64_t weight = plan.weight, pixels = s.pixels();
    pack_rows(rows, static_cast<const S *>(a.weight), s.O, slow);
    int64_t task = -1;
    for (int64_t first = begin, count; first < end; first += count) {
        count = std::min({end - first, plan.together, a.L - first % a.L});
        if (first / a.L != task) {
            task = first / a.L;
            for (int64_t r = 0; r < a.S; ++r)
                pack_rows(rows, static_cast<const S *>(a.fast.data) + task * a.fast.task_stride + r * a.fast.row_stride,
                          s.O, fast + r * weight);
        }
        const T *of_example = fast;
        if (a.mix) {
            convert(static_cast<const S *>(a.mix) + first * a.S, mix, count * a.S);
            mix_rows(count, a.S, s.O * rows.vectors * kLanes<T>, mix, fast, weight, scratch + plan.mixed, weight);
            of_example = scratch + plan.mixed;
        }
        std::memset(dx, 0, count * plan.image * sizeof(T));
        for (int64_t e = 0; e < count; ++e)
            lists_by_pixel<S>(a, first + e, scratch + plan.dy, entries + e * 2 * s.pooled_pixels() * s.O,
                              lists + e * 2 * pixels, lists + (e * 2 + 1) * pixels);
        for (int64_t v = 0; v < rows.vectors; v += kRowVectors) {
            int64_t offsets[kRowVectors];
            for (int64_t i = 0; i < rows.in_block(v); ++i) offsets[i] = rows.offset(v + i);
            const int64_t block = v * s.O * kLanes<T>;
            for (int64_t e = 0; e < count; ++e)
                scatter_rows(rows, v, lists + e * 2 * pixels, slow + block, offsets, dx + e * plan.image);
            for (int64_t e = 0; e < count; ++e)
                scatter_rows(rows, v, lists + (e * 2 + 1) * pixels, of_example + (a.mix ? e * weight : 0) + block,
                             offsets, dx + e * plan.image);
        }
        for (int64_t e = 0; e < count; ++e)
            give_image(rows, dx + e * plan.image, static_cast<S *>(a.dx) + (first + e) * s.C * s.H * s.W);
    }
}

// ---- the gradients of the weights

// The image [C, H, W] as vectors of channels with a frame of zeros, or as unfolded patches.
template <typename S> void take_image(const Rows<Arith<S>> &rows, const S *source, Arith<S> *padded, Arith<S> *target) {
    using T = Arith<S>;
    const ConvShape &s = rows.s;
    if (!rows.r.unfold) {
        std::memset(target, 0, rows.vectors / rows.r.taps * rows.r.positions * kLanes<T> * sizeof(T));
        for (int64_t c = 0; c < s.C; c += kLanes<T>, target += rows.r.positions * kLanes<T>)
            for (int64_t h = 0; h < s.H; ++h)
                transpose(source + (c * s.H + h) * s.W, s.H * s.W, std::min<int64_t>(kLanes<T>, s.C - c), s.W,
                          target + ((h + s.padding) * s.padded_width() + s.padding) * kLanes<T>, kLanes<T>, kLanes<T>);
        return;
    }
    pad_image(s, source, padded);
    for (int64_t v = 0; v < rows.vectors; ++v) {
        const int64_t count = std::min<int64_t>(kLanes<T>, s.K() - v * kLanes<T>);
        int64_t offsets[kLanes<T>];
        for (int64_t i = 0; i < count; ++i) {
            const int64_t k = v * kLanes<T> + i, tap = k % rows.r.taps;
            offsets[i] = k / rows.r.taps * s.plane() + tap / s.k * s.padded_width() + tap % s.k;
        }
        for (int64_t h = 0; h < s.height(); ++h)
            for (int64_t w = 0; w < s.width(); ++w, target += kLanes<T>) {
                store(target, Vec<T>{});
                const T *patch = padded + h * s.padded_width() + w;
                for (int64_t i = 0; i < count; ++i) target[i] = patch[offsets[i]];
            }
    }
}

// The gradients of one output of one example as lists: entry.index is the position of the pixel. Returns the slow ones'
// sum.
template <typename S>
Arith<S> lists_of_output(const AugmentedConv2dBackwardArgs &a, int64_t example, int64_t o, const int64_t *positions,
                         Entry<Arith<S>> *entries, List<Arith<S>> &slow, List<Arith<S>> &fast) {
    using T = Arith<S>;
    const int64_t P = a.shape.pooled_pixels(), O = a.shape.O, kept = P * O;
    const S *dy = static_cast<const S *>(a.dy) + example * kept + o * P;
    const uint8_t *codes = a.codes + example * kept + o;
    const T *slopes = a.slopes ? static_cast<const T *>(a.slopes) + example * kept + o : nullptr;
    Entry<T> *other = entries + P;
    int64_t n = 0, m = 0;
    T sum = 0;
    for (int64_t w = 0; w < P; ++w) {
        const uint8_t code = codes[w * O];
        T of_slow = to_arith(dy[w]), of_fast = of_slow;
        if (slopes) of_slow *= slopes[w * O], of_fast *= slopes[a.examples * kept + w * O];
        const auto index = static_cast<decltype(entries->index)>(positions[w * 4 + (code & kPixelBits)]);
        entries[n] = {of_slow, index};
        other[m] = {of_fast, index};
        sum += code & kSlowBit ? of_slow : T(0);
        n += (code & kSlowBit) != 0;
        m += (code & kFastBit) != 0;
    }
    slow = {entries, n}, fast = {other, m};
    return sum;
}

namespace detail {
// With the gradient of an example's own weight, rows [examples][n]: drow += sum_e mix[e] rows[e], dots[e] += <rows[e],
// row>.
template <int examples, typename T>
inline void unmix_some(int64_t n, const T *rows, const T *mix, int64_t mix_stride, const T *row, T *drow, Vec<T> *dots,
                       int64_t dots_stride) {
    Vec<T> dot[examples], weight[examples];
    for (int e = 0; e < examples; ++e) dot[e] = dots[e * dots_stride], weight[e] = broadcast(mix[e * mix_stride]);
    for (int64_t v = 0; v < n; ++v) {
        const Vec<T> m = load(row + v * kLanes<T>);
        Vec<T> sum = load(drow + v * kLanes<T>);
#pragma GCC unroll 4
        for (int e = 0; e < examples; ++e) {
            const Vec<T> value = load(rows + (e * kRowVectors + v) * kLanes<T>);
            dot[e] += value * m;
            sum += weight[e] * value;
        }
        store(drow + v * kLanes<T>, sum);
    }
    for (int e = 0; e < examples; ++e) dots[e * dots_stride] = dot[e];
}
} // namespace detail

template <typename T, int examples = 4>
inline void unmix(int64_t count, int64_t n, const T *rows, const T *mix, int64_t mix_stride, const T *row, T *drow,
                  Vec<T> *dots, int64_t dots_stride) {
    for (; count >= examples; count -= examples, rows += examples * kRowVectors * kLanes<T>,
                              mix += examples * mix_stride, dots += examples * dots_stride)
        detail::unmix_some<examples>(n, rows, mix, mix_stride, row, drow, dots, dots_stride);
    if constexpr (examples > 1) {
        if (count) unmix<T, examples / 2>(count, n, rows, mix, mix_stride, row, drow, dots, dots_stride);
    }
}

template <typename S> struct BackwardWeights {
    using T = Arith<S>;
    const AugmentedConv2dBackwardArgs &a;
    const Rows<T> rows;
    const AugmentedConv2dBackwardWPlan plan;
    const int64_t o_begin, outputs; // of this part
    T *const scratch;

    T *dslow() const { return scratch + plan.slow; }
    T *fast(int64_t r) const { return scratch + plan.fast + r * outputs * plan.row; }
    T *dfast(int64_t r) const { return scratch + plan.dfast + r * outputs * plan.row; }
    T *image(int64_t e) const { return scratch + plan.x + e * plan.image; }
    Entry<T> *entries() const { return reinterpret_cast<Entry<T> *>(scratch + plan.entries); }
    List<T> *lists() const { return reinterpret_cast<List<T> *>(scratch + plan.lists); }
    int64_t *positions() const { return reinterpret_cast<int64_t *>(scratch + plan.positions); }
    T *own_rows() const { return scratch + plan.rows; }
    Vec<T> *dots() const { return reinterpret_cast<Vec<T> *>(scratch + plan.dots); }

    void set_positions() const {
        const ConvShape &s = a.shape;
        for (int64_t h = 0, at = 0; h < s.pooled_height(); ++h)
            for (int64_t w = 0; w < s.pooled_width(); ++w, at += 4) {
                int64_t pixels[4];
                const int64_t count = s.window(h, w, pixels);
                for (int64_t q = 0; q < count; ++q) positions()[at + q] = rows.position(pixels[q]);
            }
    }

    // Outputs [first, first + count), counted from o_begin, of the examples whose images and lists are there.
    void add(int64_t examples, int64_t first, int64_t count) const {
        std::memset(dots(), 0, examples * a.S * sizeof(Vec<T>));
        for (int64_t v = 0; v < rows.vectors; v += kRowVectors) {
            const int64_t n = rows.in_block(v), block = v * outputs * kLanes<T>;
            int64_t offsets[kRowVectors];
            for (int64_t i = 0; i < n; ++i) offsets[i] = rows.offset(v + i);
            for (int64_t o = 0; o < count; ++o) {
                const int64_t at = block + (first + o) * n * kLanes<T>;
                add_shared(examples, o, n, 0, offsets, dslow() + at);
                if (a.mix) add_mixed(examples, o, n, offsets, at);
                else add_shared(examples, o, n, 1, offsets, dfast(0) + at);
            }
        }
    }
    // A weight that all the examples share.
    void add_shared(int64_t examples, int64_t o, int64_t n, int64_t side, const int64_t *offsets, T *target) const {
        for (int64_t e = 0; e < examples; ++e)
            add_rows<Place::kApart>(n, lists()[(e * kTogetherOutputs + o) * 2 + side], image(e), kLanes<T>, offsets,
                                    target);
    }
    // Each example's own weight, a mixture (eq. 9 backward).
    void add_mixed(int64_t examples, int64_t o, int64_t n, const int64_t *offsets, int64_t at) const {
        std::memset(own_rows(), 0, examples * kRowVectors * kLanes<T> * sizeof(T));
        for (int64_t e = 0; e < examples; ++e)
            add_rows<Place::kApart>(n, lists()[(e * kTogetherOutputs + o) * 2 + 1], image(e), kLanes<T>, offsets,
                                    own_rows() + e * kRowVectors * kLanes<T>);
        for (int64_t r = 0; r < a.S; ++r)
            unmix(examples, n, own_rows(), scratch + plan.mix + r, a.S, fast(r) + at, dfast(r) + at, dots() + r, a.S);
    }

    // All the part's outputs, for examples [first, first + count) of one task.
    void examples(int64_t first, int64_t count) const {
        for (int64_t e = 0; e < count; ++e)
            take_image(rows, static_cast<const S *>(a.x) + (first + e) * a.shape.C * a.shape.H * a.shape.W,
                       scratch + plan.padded, image(e));
        if (a.mix) convert(static_cast<const S *>(a.mix) + first * a.S, scratch + plan.mix, count * a.S);
        const int64_t P = a.shape.pooled_pixels();
        for (int64_t o = 0; o < outputs; o += kTogetherOutputs) {
            const int64_t some = std::min(kTogetherOutputs, outputs - o);
            for (int64_t e = 0; e < count; ++e)
                for (int64_t i = 0; i < some; ++i) {
                    List<T> *to = lists() + (e * kTogetherOutputs + i) * 2;
                    T &dbias = static_cast<T *>(a.bias_sums)[o_begin + o + i];
                    dbias += lists_of_output<S>(a, first + e, o_begin + o + i, positions(),
                                                entries() + (e * kTogetherOutputs + i) * 2 * P, to[0], to[1]);
                }
            add(count, o, some);
            if (!a.mix) continue;
            T *dots_of = static_cast<T *>(a.dots) + ((o_begin + o) / kTogetherOutputs * a.examples + first) * a.S;
            for (int64_t i = 0; i < count * a.S; ++i) dots_of[i] = sum_lanes<T>(dots()[i]);
        }
    }

    void task(int64_t g) const {
        const int64_t K = a.shape.K();
        for (int64_t r = 0; r < a.S; ++r) {
            const S *row = static_cast<const S *>(a.fast.data) + g * a.fast.task_stride + r * a.fast.row_stride;
            if (a.mix) pack_rows(rows, row + o_begin * K, outputs, fast(r));
            std::memset(dfast(r), 0, outputs * rows.vectors * kLanes<T> * sizeof(T));
        }
        for (int64_t l = 0; l < a.L; l += plan.together) examples(g * a.L + l, std::min(plan.together, a.L - l));
        for (int64_t r = 0; r < a.S; ++r)
            unpack_rows(rows, dfast(r), outputs, static_cast<S *>(a.dfast) + ((g * a.S + r) * a.shape.O + o_begin) * K);
    }
};

// Over blocks of kTogetherOutputs outputs.
template <typename S>
void augmented_conv2d_backward_w(const AugmentedConv2dBackwardArgs &a, int64_t begin, int64_t end, void *memory) {
    using T = Arith<S>;
    const ConvShape &s = a.shape;
    const int64_t first = begin * kTogetherOutputs, outputs = std::min(end * kTogetherOutputs, s.O) - first;
    const BackwardWeights<S> part{a,     Rows<T>(s), AugmentedConv2dBackwardWPlan(s, a.S, outputs),
                                  first, outputs,    static_cast<T *>(memory)};
    part.set_positions();
    std::memset(part.dslow(), 0, outputs * part.rows.vectors * kLanes<T> * sizeof(T));
    std::memset(static_cast<T *>(a.bias_sums) + first, 0, outputs * sizeof(T));
    for (int64_t g = 0; g < a.G; ++g) part.task(g);
    unpack_rows(part.rows, part.dslow(), outputs, static_cast<S *>(a.dweight) + first * s.K());
}

// dmix, the sum of its parts over the blocks of outputs, and dbias, in storage type.
template <typename S> void augmented_conv2d_finish(const AugmentedConv2dBackwardArgs &a, int64_t, int64_t, void *) {
    using T = Arith<S>;
    const int64_t numbers = a.examples * a.S, blocks = (a.shape.O + kTogetherOutputs - 1) / kTogetherOutputs;
    const T *dots = static_cast<const T *>(a.dots);
    for (int64_t i = 0; i < (a.mix ? numbers : 0); ++i) {
        T sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += dots[block * numbers + i];
        static_cast<S *>(a.dmix)[i] = to_storage<S>(sum);
    }
    convert(static_cast<const T *>(a.bias_sums), static_cast<S *>(a.dbias), a.shape.O);
}

} // namespace mann::MANN_ISA
