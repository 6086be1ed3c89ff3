// The shapes and tilings of augmented_conv2d, constants in its kernels, and what its launches are given.
#pragma once

#include "augmented.h"

namespace mann::cuda {

struct ConvShape {
    int C, H, W, O, k, padding;
    bool pool;
    int room; // numbers of shared memory that a block may have, static ones aside

    MANN_CONSTEXPR int taps() const { return k * k; }
    MANN_CONSTEXPR int K() const { return C * k * k; }
    // Before and after pooling.
    MANN_CONSTEXPR int height() const { return H + 2 * padding - k + 1; }
    MANN_CONSTEXPR int width() const { return W + 2 * padding - k + 1; }
    MANN_CONSTEXPR int pooled_height() const { return pool ? (height() + 1) / 2 : height(); }
    MANN_CONSTEXPR int pooled_width() const { return pool ? (width() + 1) / 2 : width(); }
    MANN_CONSTEXPR int pooled() const { return pooled_height() * pooled_width(); }
};

// A saved code: which of the four pixels was the largest, and whether the slow and the fast side let a gradient
// through.
constexpr int kPixelBits = 3, kSlowBit = 4, kFastBit = 8;

// An image of so many windows of 2 x 2 pixels in tiles of about the same size.
struct WindowTiles {
    int height, width, tiles_high, tiles_wide;                                 // of a tile in windows, and how many
    MANN_CONSTEXPR WindowTiles(int pixels_high, int pixels_wide, int most = 8) // high and wide
        : height((pixels_high + 1) / 2), width((pixels_wide + 1) / 2), tiles_high((height + most - 1) / most),
          tiles_wide((width + most - 1) / most) {
        height = (height + tiles_high - 1) / tiles_high;
        width = (width + tiles_wide - 1) / tiles_wide;
    }
    MANN_CONSTEXPR int windows() const { return height * width; }
    MANN_CONSTEXPR int count() const { return tiles_high * tiles_wide; }
};

// A convolution of `channels` images whose result is taken in groups of 8 numbers for each of the pixels of a window:
// the two sides of 4 outputs in the forward pass, 8 inputs in the backward pass. A thread has a window and a group; on
// tensor cores a warp has 4 groups and some quads of 4 windows.
struct ConvTiling {
    WindowTiles tiles;
    bool tensor;
    int k, channels, groups;
    int together;                         // groups of a block
    int quads, quad_groups;               // of a warp, and how many warps share the windows
    int slices;                           // of the channels, summed at the end
    int rows, row_stride, plane, weights; // of a tile of the image; numbers of a channel
    int chunk;                            // channels in shared memory at once
    int least;                            // threads of a block

    MANN_CONSTEXPR ConvTiling(int height, int width, int kernel, int channel_count, int group_count, bool tensor_cores,
                              int least_threads, int room, int most_held)
        : tiles(height, width), tensor(tensor_cores), k(kernel), channels(channel_count), groups(group_count),
          together(1), quads(1), quad_groups(1), slices(1), rows(2 * tiles.height + kernel - 1), row_stride(0),
          plane(0), weights(0), chunk(1), least(least_threads) {
        const int windows = tiles.windows(), stage = int(at_most(kStage, room / 2));
        together = int(ceil_div(groups, windows >= 32 ? 2 : 4));
        if (tensor) together = int(at_most(round_up(together, 4), 16));
        while (windows * together > kThreads && !tensor) together = (together + 1) / 2;
        quad_groups = int(ceil_div(windows, 16)), quads = int(ceil_div(ceil_div(windows, 4), quad_groups));
        // rows of windows, and neighbouring channels for tensor cores, on other banks
        const int lanes = tiles.width <= 2 ? 2 : tiles.width <= 4 ? 4 : 8, columns = 2 * tiles.width + kernel - 1;
        row_stride = tiles.height == 1 ? int(round_up(columns, 2)) : columns + (16 + lanes - columns % 16) % 16;
        plane = int(tensor ? round_up(rows * row_stride - 8, 32) + 8 : round_up(rows * row_stride, 4));
        const int step = tensor ? 8 : 1, most = tensor ? 512 : kThreads, fewest = tensor ? 4 : 1;
        while (together > fewest && 2 * at_least(step, 2) * (plane + weights_of(together)) > room) together -= fewest;
        weights = weights_of(together);
        while (2 * slices * step <= channels && 2 * slices * (tensor ? 32 * warps() : units()) <= most && slices < 32 &&
               2 * slices * step * (plane + weights) <= stage && 2 * slices * 32 * units() <= room)
            slices *= 2;
        const int even = step * slices > 1 ? step * slices : 2; // both sides of an output belong together
        const int held = tensor ? channels : most_held * threads() / (rows * columns);
        const int64_t largest = at_least(at_most(stage / (plane + weights), held) / even * even, even);
        const int chunks = int(ceil_div(channels, largest));
        chunk = int(round_up(ceil_div(channels, chunks), even));
    }
    MANN_CONSTEXPR int warps() const { return together / 4 * quad_groups; } // of a slice
    MANN_CONSTEXPR int weights_of(int some) const { return 8 * some * k * k + (tensor ? 8 : 4 * some); }
    static constexpr int kThreads = 448;
    static constexpr int kForwardHeld = 9, kBackwardHeld = 10; // numbers of images that a thread has on their way
    static constexpr int kStage = 14000; // numbers in shared memory, twice: two blocks to a multiprocessor
    MANN_CONSTEXPR int units() const { return tiles.windows() * together; }
    MANN_CONSTEXPR int threads() const {
        return int(at_least(tensor ? 32 * warps() * slices : round_up(units() * slices, 32), least));
    }
    MANN_CONSTEXPR int chunks() const { return int(ceil_div(channels, chunk)); }
    MANN_CONSTEXPR int stage() const { return chunk * (plane + weights); }
    // Numbers of shared memory.
    MANN_CONSTEXPR int64_t shared() const {
        const int64_t stages = int64_t(stage()) * (chunks() > 1 ? 2 : 1);
        return slices > 1 ? at_least(stages, int64_t(32) * units() * slices) : stages;
    }
    MANN_CONSTEXPR int group_tiles() const { return int(ceil_div(groups, together)); }
    // Groups with those that fill up the last tile.
    MANN_CONSTEXPR int padded_groups() const { return group_tiles() * together; }
};

MANN_CONSTEXPR ConvTiling forward_tiling(const ConvShape &s, bool tensor) {
    return {s.height(), s.width(), s.k, s.C, int(ceil_div(s.O, 4)), tensor, 32, s.room, ConvTiling::kForwardHeld};
}
MANN_CONSTEXPR ConvTiling backward_tiling(const ConvShape &s, bool tensor) {
    return {s.H, s.W, s.k, 2 * s.O, int(ceil_div(s.C, 8)), tensor, 256, s.room, ConvTiling::kBackwardHeld};
}

// The weights as a convolution reads them, [inner][outer][taps] to [outer][tap][padded inner]: mixed, one for the slow
// weight and one for each example (without a mixture, for each row).
struct ConvPacking {
    int tile_o, tile_c; // of a block
    MANN_CONSTEXPR ConvPacking(const ConvShape &s, bool inner_is_o) : tile_o(0), tile_c(0) {
        const int taps = s.taps();
        if (inner_is_o) {
            tile_c = int(at_most(at_least(36 / taps, 1), s.C));
            tile_o = int(at_most(at_least(kElements / (tile_c * taps), 4), 64));
        } else {
            tile_c = int(at_most(at_most(at_least(2 * kElements / taps, 1), 32), s.C));
            tile_o = int(at_most(at_least(kElements / (tile_c * taps), 1), 64));
        }
    }
    static constexpr int kElements = 1152, kTogether = 8; // examples of a block
    static constexpr int kRows = 32;                      // whose mixtures are in static shared memory
    MANN_CONSTEXPR int run(const ConvShape &s) const { return tile_c * s.taps(); }
    MANN_CONSTEXPR int stride(const ConvShape &s) const { return run(s) | 1; }
    MANN_CONSTEXPR int elements(const ConvShape &s) const { return tile_o * run(s); }
    MANN_CONSTEXPR int64_t shared(const ConvShape &s) const { return int64_t(kTogether) * tile_o * stride(s); }
};

// Of the weights' gradient: a thread has all taps of an input and an output, on both sides; with few inputs
// neighbouring threads share their pixels.
struct ConvGradTiling {
    WindowTiles tiles;
    int together_c, together_o, phases; // inputs, outputs and shares of the pixels of a block
    int rows, columns;                  // of a tile of the image
    int entries;                        // pixels of a tile that may have a gradient

    MANN_CONSTEXPR ConvGradTiling(const ConvShape &s)
        : tiles(s.height(), s.width(), s.C <= 4 && s.pool ? 16 : 8), together_c(int(at_most(s.C, 32))), together_o(1),
          phases(1), rows(2 * tiles.height + s.k - 1), columns(2 * tiles.width + s.k - 1),
          entries(tiles.windows() * (s.pool ? 1 : 4)) {
        while (together_c > 1 && image() + 4 * entries > s.room) together_c = (together_c + 1) / 2;
        const int64_t most = at_most(kEntries, (s.room - image()) / 4);
        while (phases < 32 && 2 * phases * together_c * at_most(s.O, 16) <= kThreads) phases *= 2;
        together_o = int(at_most(at_most(kThreads / (together_c * phases), s.O), at_least(most / entries, 1)));
    }
    static constexpr int kThreads = 512, kEntries = 3136; // in shared memory
    MANN_CONSTEXPR int stride() const { return together_c | 1; }
    MANN_CONSTEXPR int tiles_c(const ConvShape &s) const { return int(ceil_div(s.C, together_c)); }
    MANN_CONSTEXPR int tiles_o(const ConvShape &s) const { return int(ceil_div(s.O, together_o)); }
    MANN_CONSTEXPR int image() const { return int(round_up(rows * columns * stride(), 4)); }
    MANN_CONSTEXPR int64_t shared() const { return image() + int64_t(4) * together_o * entries; }
};

// From the weights' gradients to those of the rows: a block has strips of 32 numbers of a weight, and where there are
// few of these, its warps share the examples in slices.
struct ConvRowsTiling {
    int threads, slices, strips, parts; // strips of a block; blocks
    MANN_CONSTEXPR ConvRowsTiling(const ConvShape &s, int thread_count)
        : threads(thread_count), slices(1), strips(thread_count / 32), parts(1) {
        const int all = int(ceil_div(s.O * s.K(), 32)), warps = strips;
        while (slices < warps && ceil_div(all, warps / (slices + 1)) <= kBlocks) ++slices;
        strips = warps / slices, parts = int(ceil_div(all, strips));
    }
    static constexpr int kRows = 8, kBatch = 64; // of the mixtures in shared memory, rows and examples
    static constexpr int kBlocks = 128;          // at most this many through slices
    MANN_CONSTEXPR int64_t shared() const { return at_least(kBatch * kRows * (1 + strips), kRows * threads); }
};

template <typename S> struct ConvPack {
    AugmentedLayer<S> layer;
    Arith<S> *packed; // [1 + weights of their own][outer][tap][padded inner] out
    int64_t batches;  // of examples, the last of the slow weight
};

template <typename S> struct ConvForward {
    int64_t per_weight;     // examples that share a fast weight
    const S *x;             // [GL, C, H, W]
    const Arith<S> *packed; // [1 + .][C][tap][padded O]
    const S *bias;          // [O] or null
    S *y;                   // [GL, O, pooled] out
    uint8_t *codes;         // [GL, pooled, O] out, or null
    Arith<S> *slopes;       // [2, GL, pooled, O] out, or null
    int64_t side;           // numbers from the slopes of the slow side to those of the fast
};

// Gradients before the activations, as the operator's arguments say them.
template <typename S> struct ConvOutputGradient {
    const S *dy;            // [GL, O, pooled]
    const uint8_t *codes;   // [GL, pooled, O]
    const Arith<S> *slopes; // [2, GL, pooled, O] or null
    int64_t side;           // as forward
};
template <typename S> struct ConvBackwardX {
    ConvOutputGradient<S> gradient;
    int64_t per_weight;
    const Arith<S> *packed; // [1 + .][O][tap, the last first][padded C]
    S *dx;                  // [GL, C, H, W] out
};
template <typename S> struct ConvBackwardW {
    ConvOutputGradient<S> gradient;
    int64_t L, group; // examples of a task; of a block, none of them of another task
    bool own;         // every example has a fast weight of its own
    const S *x;       // [GL, C, H, W]
    Arith<S> *slow;   // [groups][O][tap][C] out
    Arith<S> *fast;   // [GL or groups][O][tap][C] out
    Arith<S> *bias;   // [groups][O] out
};
// From the gradients of the weights of examples (or groups of them) to those of the rows and of the mixture.
template <typename S> struct ConvBackwardRows {
    AugmentedLayer<S> layer; // L: gradients of a task
    const Arith<S> *own;     // [G, L][O][tap][C]
    S *dfast;                // [G, rows, O, C, k, k] out
    Arith<S> *dots;          // [blocks of a task][G, L, rows] out; null without a mixture
    int64_t dots_stride;     // from one block's to the next
};
template <typename S> struct ConvBackwardSums {
    int64_t groups, dots, parts; // dots: G L rows, or 0
    const Arith<S> *slow, *bias; // [groups][O][tap][C], [groups][O]
    const Arith<S> *dot_parts;   // [parts][dots]
    S *dweight, *dbias, *dmix;   // [O, C, k, k], [O], [G, L, rows] out
};
// Two launches of two kinds of blocks each, then the sums.
template <typename S> struct ConvBackwardFirst {
    ConvBackwardW<S> w;
    ConvPack<S> pack;
    int64_t w_blocks;
};
template <typename S> struct ConvBackwardSecond {
    ConvBackwardX<S> x;
    ConvBackwardRows<S> rows;
    int64_t examples, x_blocks; // of which the first are for dx
};
constexpr int kPackThreads = 256, kSumThreads = 256, kSumNumbers = 64;

} // namespace mann::cuda
