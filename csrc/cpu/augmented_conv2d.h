// The shapes of augmented_conv2d, and the plans of its scratch memory, which are those of the widest registers.
#pragma once

#include <algorithm>

#include "augmented.h"
#include "kernel.h"

namespace mann {

struct ConvShape {
    int64_t C, H, W, O, k, padding;
    bool pool;

    int64_t K() const { return C * k * k; }
    // The padded image; an odd number of cache lines, so that channels do not fall on the same ones.
    int64_t padded_width() const { return W + 2 * padding; }
    int64_t padded_pixels() const { return (H + 2 * padding) * padded_width(); }
    int64_t plane() const { return round_up(padded_pixels(), 16) | 16; }
    // Before and after pooling.
    int64_t height() const { return H + 2 * padding - k + 1; }
    int64_t width() const { return W + 2 * padding - k + 1; }
    int64_t pixels() const { return height() * width(); }
    int64_t pooled_height() const { return pool ? (height() + 1) / 2 : height(); }
    int64_t pooled_width() const { return pool ? (width() + 1) / 2 : width(); }
    int64_t pooled_pixels() const { return pooled_height() * pooled_width(); }
    int64_t padded_outputs() const { return round_up(O, 64); } // whole panels of any instruction set

    // The pixels of a pooling window (one pixel, without pooling), in the order in which a saved code numbers them.
    int64_t window(int64_t h, int64_t w, int64_t *pixels) const {
        const int64_t step = pool ? 2 : 1;
        int64_t count = 0;
        for (int64_t i = h * step; i < std::min(h * step + step, height()); ++i)
            for (int64_t j = w * step; j < std::min(w * step + step, width()); ++j) pixels[count++] = i * width() + j;
        return count;
    }
};

// A saved code: which of the four pixels was the largest, and whether the slow and the fast side let a gradient
// through.
constexpr int kPixelBits = 3, kSlowBit = 4, kFastBit = 8;

struct AugmentedConv2dArgs {
    ConvShape shape;
    int64_t L, S; // examples of a task, rows of its memory
    int64_t activation;
    const void *x;      // [G, L, C, H, W]
    const void *weight; // [O, C, k, k]
    FastRows fast;      // [G, S] of [O, C, k, k]
    const void *mix;    // [G, L, S] or null (S = 1)
    const void *bias;   // [O] or null
    void *y;            // [G, L, O, pooled] out
    uint8_t *codes;     // [G, L, pooled, O] out, or null
    void *slopes;       // [2, G, L, pooled, O] of arithmetic type out, or null
    int64_t examples;   // G * L
};

struct AugmentedConv2dForwardPlan {
    // Rows of the image that are computed together, and examples: few pixels share what they read of the weights.
    int64_t band, together;
    int64_t slow_panels, fast_panels, mixed_panels; // [O / columns][K][columns]; [S] and [together] of them
    int64_t panels;                                 // numbers in one
    int64_t x, slow, fast, y, offsets, pixels, bias, mix, size;

    explicit AugmentedConv2dForwardPlan(const ConvShape &s, int64_t S) {
        const int64_t outputs = s.padded_outputs();
        band = std::min(s.height(), round_up((48 + s.width() - 1) / s.width(), 2));
        together = band < s.height() ? 1 : std::clamp<int64_t>(64 / s.pixels(), 1, 4);
        Plan plan;
        panels = s.K() * outputs;
        slow_panels = plan.take(panels);
        fast_panels = plan.take(S * panels);
        mixed_panels = plan.take(together * panels);
        x = plan.take(together * s.C * s.plane());
        slow = plan.take(together * band * s.width() * outputs);
        fast = plan.take(together * band * s.width() * outputs);
        y = plan.take(together * s.pooled_pixels() * outputs);
        offsets = plan.take(2 * s.K()); // int64
        pixels = plan.take(2 * together * band * s.width());
        bias = plan.take(outputs);
        mix = plan.take(together * S);
        size = plan.size;
    }
};

// Backward has rows of K numbers as vectors: [channel vector][tap], or, where channels are too few to fill vectors,
// [K].
struct ConvRows {
    bool unfold;
    int64_t taps, positions; // of the image that the rows are read from
    int64_t bound;           // numbers in a row, with any instruction set

    explicit ConvRows(const ConvShape &s) {
        const int64_t by_tap = round_up(s.C, 16) * s.k * s.k, in_one = round_up(s.K(), 16);
        unfold = by_tap > 2 * in_one;
        taps = s.k * s.k;
        positions = unfold ? s.pixels() : s.padded_pixels();
        bound = unfold ? in_one : by_tap;
    }
    int64_t image_bound() const { return positions * (unfold ? bound : bound / taps); }
};

struct AugmentedConv2dBackwardArgs {
    ConvShape shape;
    int64_t G, L, S;
    const void *dy;       // [G, L, O, pooled]
    const void *x;        // [G, L, C, H, W]
    const void *weight;   // [O, C, k, k]
    FastRows fast;        // [G, S] of [O, C, k, k]
    const void *mix;      // [G, L, S] or null
    const uint8_t *codes; // [G, L, pooled, O]
    const void *slopes;   // [2, G, L, pooled, O] of arithmetic type, or null
    void *dx;             // [G, L, C, H, W] out
    void *dweight;        // [O, C, k, k] out
    void *dfast;          // [G, S, O, C, k, k] out
    void *dots;           // [blocks of kTogetherOutputs outputs, G, L, S] of arithmetic type out: the parts of dmix
    void *bias_sums;      // [O] of arithmetic type out
    void *dmix;           // [G, L, S] out
    void *dbias;          // [O] out
    int64_t examples;     // G * L
};

// The gradient of the weights goes by so many outputs, whatever the number of threads.
constexpr int64_t kTogetherOutputs = 8;

struct AugmentedConv2dBackwardXPlan {
    int64_t together, row, image, weight; // numbers in a weight
    int64_t slow, fast, mixed, dx, dy, entries, lists, mix, size;

    AugmentedConv2dBackwardXPlan(const ConvShape &s, int64_t S) {
        const ConvRows rows(s);
        together = std::clamp<int64_t>(64 / s.pixels(), 1, 4);
        row = rows.bound, image = round_up(rows.image_bound(), 16);
        Plan plan;
        weight = round_up(s.O * row, 32); // pairs of vectors are mixed
        slow = plan.take(weight);
        fast = plan.take(S * weight);
        mixed = plan.take(together * weight);
        dx = plan.take(together * image);
        dy = plan.take(3 * s.pooled_pixels() * s.padded_outputs());
        entries = plan.take(together * 2 * 2 * s.pooled_pixels() * s.O + 2); // one past the last is written
        lists = plan.take(together * 2 * 4 * s.pixels());                    // a list is two int64
        mix = plan.take(together * S);
        size = plan.size;
    }
};

struct AugmentedConv2dBackwardWPlan {
    int64_t together, row, image;
    int64_t padded, x, slow, fast, dfast, entries, lists, positions, mix, rows, dots, size;

    AugmentedConv2dBackwardWPlan(const ConvShape &s, int64_t S, int64_t outputs) {
        const ConvRows r(s);
        row = r.bound, image = round_up(r.image_bound(), 16);
        together = std::clamp<int64_t>(8192 / (16 * r.positions), 1, 8); // a part of their images in 32 KiB
        Plan plan;
        padded = plan.take(s.C * s.plane());
        x = plan.take(together * image);
        slow = plan.take(outputs * row);
        fast = plan.take(S * outputs * row);
        dfast = plan.take(S * outputs * row);
        entries = plan.take(together * kTogetherOutputs * 2 * 2 * s.pooled_pixels());
        lists = plan.take(together * kTogetherOutputs * 2 * 4); // a list is two int64
        positions = plan.take(2 * 4 * s.pooled_pixels());
        mix = plan.take(together * S);
        rows = plan.take(together * 9 * 16);
        dots = plan.take(together * S * 16);
        size = plan.size;
    }
};

} // namespace mann

namespace mann::MANN_ISA {

// The image [C, H, W] with its frame of zeros, planes apart.
template <typename S> inline void pad_image(const ConvShape &s, const S *source, Arith<S> *target) {
    std::memset(target, 0, s.C * s.plane() * sizeof(Arith<S>));
    for (int64_t c = 0; c < s.C; ++c)
        for (int64_t h = 0; h < s.H; ++h)
            convert(source + (c * s.H + h) * s.W,
                    target + c * s.plane() + (h + s.padding) * s.padded_width() + s.padding, s.W);
}

} // namespace mann::MANN_ISA
