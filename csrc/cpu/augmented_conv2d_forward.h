// augmented_conv2d forward: the product of weight panels with an image that is never unfolded, slow and fast side by
// side, activation and pooling before the next band of the image.
#pragma once

#include "augmented_conv2d.h"

namespace mann::MANN_ISA {

constexpr int kConvRows = 6;                                      // pixels of a block
constexpr int kConvVectors = MANN_VECTOR_REGISTERS == 32 ? 4 : 2; // and vectors of outputs
template <typename T> constexpr int kConvColumns = kConvVectors * kLanes<T>;
constexpr int64_t kConvDepth = 96; // rows of a panel that stay in the first-level cache

// A weight [O, K], its rows `stride` apart, becomes panels [ceil(O / columns)][K][columns], filled with zeros.
template <typename S> inline void pack_outputs(const S *source, int64_t O, int64_t K, Arith<S> *panels) {
    constexpr int64_t columns = kConvColumns<Arith<S>>;
    for (int64_t o = 0; o < O; o += columns, panels += K * columns)
        transpose(source + o * K, K, std::min(O - o, columns), K, panels, columns, columns);
}

namespace detail {
// out [rows, vectors] (+)= sum_k x[pixel_i + offset_k] panel[k].
template <typename T, int rows, int vectors>
inline void conv_block(const T *x, const int64_t *pixels, const int64_t *offsets, int64_t K, const T *panel, T *out,
                       int64_t out_stride, bool add) {
    Vec<T> sum[rows][vectors] = {};
    const T *a[rows];
    for (int i = 0; i < rows; ++i) a[i] = x + pixels[i];
    for (int64_t k = 0; k < K; ++k, panel += kConvColumns<T>) {
        const int64_t offset = offsets[k];
        Vec<T> b[vectors];
        for (int v = 0; v < vectors; ++v) b[v] = load(panel + v * kLanes<T>);
#pragma GCC unroll 6
        for (int i = 0; i < rows; ++i) {
            const Vec<T> value = broadcast(a[i][offset]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[i][v] += value * b[v];
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            T *at = out + i * out_stride + v * kLanes<T>;
            store(at, add ? load(at) + sum[i][v] : sum[i][v]);
        }
}
template <typename T, int vectors, int rows = kConvRows>
inline void conv_rows(int64_t M, const T *x, const int64_t *pixels, const int64_t *offsets, int64_t K, const T *panel,
                      T *out, int64_t out_stride, bool add) {
    if (M == rows) return conv_block<T, rows, vectors>(x, pixels, offsets, K, panel, out, out_stride, add);
    if constexpr (rows > 1) conv_rows<T, vectors, rows - 1>(M, x, pixels, offsets, K, panel, out, out_stride, add);
}
template <typename T, int vectors = kConvVectors>
inline void conv_panel(int64_t used, int64_t M, const T *x, const int64_t *pixels, const int64_t *offsets, int64_t K,
                       const T *panel, T *out, int64_t out_stride, bool add) {
    if constexpr (vectors > 1) {
        if (used < vectors)
            return conv_panel<T, vectors - 1>(used, M, x, pixels, offsets, K, panel, out, out_stride, add);
    }
    const int64_t blocks = (M + kConvRows - 1) / kConvRows;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = M * block / blocks, last = M * (block + 1) / blocks;
        conv_rows<T, vectors>(last - first, x, pixels + first, offsets, K, panel, out + first * out_stride, out_stride,
                              add);
    }
}
} // namespace detail

// out [M, outputs] = the convolution at M pixels, given by where their patch begins in x; offsets [K] within a patch.
template <typename T>
[[gnu::noinline]] void convolve(int64_t M, const T *x, const int64_t *pixels, const int64_t *offsets, int64_t K,
                                const T *panels, int64_t O, T *out, int64_t out_stride) {
    for (int64_t o = 0; o < O; o += kConvColumns<T>) {
        const int64_t used = std::min<int64_t>((O - o + kLanes<T> - 1) / kLanes<T>, kConvVectors);
        const T *panel = panels + o * K;
        for (int64_t k = 0; k < K; k += kConvDepth)
            detail::conv_panel<T>(used, M, x, pixels, offsets + k, std::min(kConvDepth, K - k),
                                  panel + k * kConvColumns<T>, out + o, out_stride, k > 0);
    }
}

// What is kept of one output number.
template <typename T> struct Chosen {
    using Int = std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t>;
    using IntVec = typename VectorOf<Int>::type;
    Vec<T> value, slow_slope, fast_slope;
    IntVec code;
};

// The largest of act(slow) + act(fast) over `count` pixels, their rows at [pixel]; of equal ones the first.
template <typename T>
inline Chosen<T> choose(int64_t activation, int64_t count, const int64_t *rows, const T *slow, const T *fast,
                        Vec<T> bias) {
    using IntVec = typename Chosen<T>::IntVec;
    const Vec<T> zero{};
    Chosen<T> best{};
    for (int64_t q = 0; q < count; ++q) {
        const Activated<T> s = activate<T>(activation, load(slow + rows[q]) + bias);
        const Activated<T> f = activate<T>(activation, load(fast + rows[q]));
        const Vec<T> value = s.value + f.value;
        const IntVec code = int(q & kPixelBits) + (s.slope != zero ? IntVec{} + kSlowBit : IntVec{}) +
                            (f.slope != zero ? IntVec{} + kFastBit : IntVec{});
        const IntVec take = q == 0 ? IntVec{} - 1 : (value > best.value) | (value != value);
        best.value = take ? value : best.value;
        best.slow_slope = take ? s.slope : best.slow_slope;
        best.fast_slope = take ? f.slope : best.fast_slope;
        best.code = take ? code : best.code;
    }
    return best;
}

template <typename V> inline void store_codes(V codes, int64_t count, uint8_t *target) {
    typedef uint8_t Bytes __attribute__((vector_size(sizeof(V) / sizeof(codes[0]))));
    const Bytes bytes = __builtin_convertvector(codes, Bytes);
    if (count >= int64_t(sizeof bytes)) std::memcpy(target, &bytes, sizeof bytes);
    else std::memcpy(target, &bytes, count);
}

// Pooled rows [first, last) of one example, from the rows of the band: y [pooled, outputs], and what is kept.
template <typename T>
void finish_band(const AugmentedConv2dArgs &a, int64_t example, int64_t band_row, int64_t first, int64_t last,
                 const T *slow, const T *fast, const T *bias, T *y) {
    const ConvShape &s = a.shape;
    const int64_t outputs = s.padded_outputs(), kept = s.pooled_pixels() * s.O;
    for (int64_t h = first; h < last; ++h)
        for (int64_t w = 0; w < s.pooled_width(); ++w) {
            int64_t rows[4];
            const int64_t count = s.window(h, w, rows), pixel = h * s.pooled_width() + w;
            for (int64_t q = 0; q < count; ++q) rows[q] = (rows[q] - band_row * s.width()) * outputs;
            for (int64_t o = 0; o < s.O; o += kLanes<T>) {
                const Chosen<T> best = choose<T>(a.activation, count, rows, slow + o, fast + o, load(bias + o));
                store(y + pixel * outputs + o, best.value);
                const int64_t left = s.O - o, at = example * kept + pixel * s.O + o;
                if (a.codes) store_codes(best.code, left, a.codes + at);
                if (a.slopes) {
                    T *slopes = static_cast<T *>(a.slopes) + at;
                    store_some(slopes, best.slow_slope, left);
                    store_some(slopes + a.examples * kept, best.fast_slope, left);
                }
            }
        }
}

// The weights of a part, and of the task it is at.
template <typename S> struct ForwardWeights {
    using T = Arith<S>;
    const AugmentedConv2dArgs &a;
    const AugmentedConv2dForwardPlan &plan;
    T *scratch;
    int64_t task = -1;

    void pack_slow() {
        pack_outputs(static_cast<const S *>(a.weight), a.shape.O, a.shape.K(), scratch + plan.slow_panels);
        T *bias = scratch + plan.bias;
        std::memset(bias, 0, a.shape.padded_outputs() * sizeof(T));
        if (a.bias) convert(static_cast<const S *>(a.bias), bias, a.shape.O);
    }
    // The panels of examples [first, first + count) of one task; apart from each other, or 0 where they share them.
    const T *fast_of(int64_t first, int64_t count, int64_t &apart) {
        const int64_t now = first / a.L;
        if (now != task)
            for (int64_t r = 0; r < a.S; ++r)
                pack_outputs(static_cast<const S *>(a.fast.data) + now * a.fast.task_stride + r * a.fast.row_stride,
                             a.shape.O, a.shape.K(), scratch + plan.fast_panels + r * plan.panels);
        task = now;
        apart = a.mix ? plan.panels : 0;
        if (!a.mix) return scratch + plan.fast_panels;
        T *mix = scratch + plan.mix;
        convert(static_cast<const S *>(a.mix) + first * a.S, mix, count * a.S);
        const int64_t used = round_up(a.shape.O, kConvColumns<T>) * a.shape.K();
        mix_rows(count, a.S, used, mix, scratch + plan.fast_panels, plan.panels, scratch + plan.mixed_panels, apart);
        return scratch + plan.mixed_panels;
    }
};

template <typename S> void augmented_conv2d(const AugmentedConv2dArgs &a, int64_t begin, int64_t end, void *memory) {
    using T = Arith<S>;
    const ConvShape &s = a.shape;
    const AugmentedConv2dForwardPlan plan(s, a.S);
    T *scratch = static_cast<T *>(memory), *x = scratch + plan.x, *slow = scratch + plan.slow,
      *fast = scratch + plan.fast, *y = scratch + plan.y;
    int64_t *offsets = reinterpret_cast<int64_t *>(scratch + plan.offsets);
    int64_t *pixels = reinterpret_cast<int64_t *>(scratch + plan.pixels);
    const int64_t outputs = s.padded_outputs(), image = s.C * s.plane(), step = s.pool ? 2 : 1;
    for (int64_t c = 0, at = 0; c < s.C; ++c)
        for (int64_t i = 0; i < s.k; ++i)
            for (int64_t j = 0; j < s.k; ++j) offsets[at++] = c * s.plane() + i * s.padded_width() + j;
    ForwardWeights<S> weights{a, plan, scratch};
    weights.pack_slow();
    for (int64_t first = begin, count; first < end; first += count) {
        // examples of one task
        count = std::min({end - first, plan.together, a.L - first % a.L});
        int64_t apart;
        const T *panels = weights.fast_of(first, count, apart);
        for (int64_t e = 0; e < count; ++e)
            pad_image(s, static_cast<const S *>(a.x) + (first + e) * s.C * s.H * s.W, x + e * image);
        for (int64_t row = 0; row < s.height(); row += plan.band) {
            const int64_t rows = std::min(plan.band, s.height() - row), M = rows * s.width();
            for (int64_t e = 0, at = 0; e < count; ++e)
                for (int64_t i = row; i < row + rows; ++i)
                    for (int64_t j = 0; j < s.width(); ++j) pixels[at++] = e * image + i * s.padded_width() + j;
            convolve(count * M, x, pixels, offsets, s.K(), scratch + plan.slow_panels, s.O, slow, outputs);
            for (int64_t e = 0; e < count; ++e)
                convolve(M, x, pixels + e * M, offsets, s.K(), panels + e * apart, s.O, fast + e * M * outputs,
                         outputs);
            for (int64_t e = 0; e < count; ++e)
                finish_band(a, first + e, row, row / step, (row + rows + step - 1) / step, slow + e * M * outputs,
                            fast + e * M * outputs, scratch + plan.bias, y + e * s.pooled_pixels() * outputs);
        }
        for (int64_t e = 0; e < count; ++e)
            transpose(y + e * s.pooled_pixels() * outputs, outputs, s.pooled_pixels(), s.O,
                      static_cast<S *>(a.y) + (first + e) * s.O * s.pooled_pixels(), s.pooled_pixels(),
                      s.pooled_pixels());
    }
}

} // namespace mann::MANN_ISA
