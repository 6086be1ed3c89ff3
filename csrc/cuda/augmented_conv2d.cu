// augmented_conv2d, forward: the weight of every example once, then one convolution an example in which both sides
// share what is loaded of the image; activation, sum and pooling at its end.
#include "activations.h"
#include "augmented_conv2d_tile.h"

namespace mann::cuda {

struct OfForward {
    static constexpr ConvTiling tiling = forward_tiling(kShape, MANN_TENSOR != 0);
};
using Forward = Tiled<OfForward>;

// What a window (or a pixel, without pooling) leaves.
struct Outcome {
    T value, slow_slope, fast_slope;
    int code;
};
MANN_INLINE Outcome outcome(T slow, T fast, int pixel) {
    const Activated<T> a = activate<MANN_ACTIVATION>(slow), b = activate<MANN_ACTIVATION>(fast);
    const int through = (a.slope != 0 ? kSlowBit : 0) + (b.slope != 0 ? kFastBit : 0);
    return {a.value + b.value, a.slope, b.slope, pixel + through};
}
// The largest of a window's pixels that exist, of equal ones the first; NaN is the largest.
MANN_INLINE Outcome pooled(const T (&slow)[4], const T (&fast)[4], bool has_right, bool has_below) {
    Outcome best = outcome(slow[0], fast[0], 0);
#pragma unroll
    for (int pixel = 1; pixel < 4; ++pixel) {
        const Outcome next = outcome(slow[pixel], fast[pixel], pixel);
        const bool exists = (pixel % 2 == 0 || has_right) && (pixel / 2 == 0 || has_below);
        if (exists && (next.value > best.value || next.value != next.value)) best = next;
    }
    return best;
}
// A code is stored where `word` is null, else put into it as byte `o` of four.
MANN_INLINE void keep(const ConvForward<S> &a, int64_t example, int o, int pixel, const Outcome &result,
                      uint32_t *word = nullptr) {
    a.y[(example * kShape.O + o) * kPooled + pixel] = to_storage<S>(result.value);
    const int64_t at = (example * kPooled + pixel) * kShape.O + o;
    if (word) *word |= uint32_t(result.code) << o % 4 * 8;
    else if (a.codes) a.codes[at] = uint8_t(result.code);
    if (a.slopes) a.slopes[at] = result.slow_slope, a.slopes[a.side + at] = result.fast_slope;
}

// What a block loads: of an example, a tile of windows and of outputs.
struct ForwardLoad {
    using D = Forward;
    using Number = S;
    static constexpr int kNumbers = D::kChunk * D::kRows * D::kColumns, kMostHeld = ConvTiling::kForwardHeld;
    const S *x;
    const T *slow, *fast;
    int h0, w0;

    MANN_INLINE void weights(T *target, int first, int count) const {
        for_each<D::kChunk * kTaps * 2 * D::kTogether, D::kThreads>([&](uint32_t i) {
            const int group = i % D::kTogether, v = i / D::kTogether % 2;
            const int row = i / D::kTogether / 2; // of [channel][tap]
            T *at = target + row / kTaps * D::kWeights + (row % kTaps * 2 + v) * 4 * D::kTogether + 4 * group;
            if (row < count * kTaps) copy_four(at, (v ? fast : slow) + (first * kTaps + row) * D::kPadded + 4 * group);
            else if (D::kTensor) clear_four(at);
        });
    }
    MANN_INLINE Number number(int i, int first, int count) const {
        const int column = i % D::kColumns, row = i / D::kColumns % D::kRows, c = i / D::kColumns / D::kRows;
        const int y = 2 * h0 + row - kShape.padding, z = 2 * w0 + column - kShape.padding;
        const bool exists = c < count && y >= 0 && y < kShape.H && z >= 0 && z < kShape.W;
        return load_if(exists, x + ((first + c) * kShape.H + y) * kShape.W + z);
    }
    MANN_INLINE void put(T *images, int i, Number number) const {
        const int column = i % D::kColumns, row = i / D::kColumns % D::kRows, c = i / D::kColumns / D::kRows;
        images[c * D::kPlane + row * D::kRowStride + column] = operand(to_arith(number));
    }
};

// Block (example, tile of windows and of outputs).
MANN_INLINE void convolve_example(const ConvForward<S> &a, T *shared) {
    using D = Forward;
    const int64_t example = blockIdx.x;
    const int tile = int(blockIdx.y) % D::kTiles, o0 = int(blockIdx.y) / D::kTiles * 4 * D::kTogether;
    const int h0 = tile / D::kTilesWide * D::kTileHeight, w0 = tile % D::kTilesWide * D::kTileWidth;
    constexpr int64_t kWeight = int64_t(kShape.C) * kTaps * D::kPadded;
    const T *slow = a.packed + o0, *fast = slow + (1 + example / a.per_weight) * kWeight;
    const ForwardLoad load{a.x + example * (kShape.C * kShape.H * kShape.W), slow, fast, h0, w0};
    constexpr bool kWords =
        !D::kTensor && D::kSlices == 1 && kShape.O % 4 == 0 && kShape.pool; // a thread has four outputs in turn
    uint32_t word = 0;
    convolve<D>(shared, load, [&](int window, int group, int q, T(&numbers)[2][4]) {
        const int o = o0 + 4 * group + q, h = h0 + window / D::kTileWidth, w = w0 + window % D::kTileWidth;
        const bool has_right = 2 * w + 1 < kWidth, has_below = 2 * h + 1 < kHeight;
        if (o >= kShape.O || 2 * h >= kHeight || 2 * w >= kWidth) return;
        const T bias = a.bias ? to_arith(a.bias[o]) : T(0);
#pragma unroll
        for (int pixel = 0; pixel < 4; ++pixel) numbers[0][pixel] += bias;
        if constexpr (kShape.pool) {
            const int pixel = h * kPooledWidth + w;
            keep(a, example, o, pixel, pooled(numbers[0], numbers[1], has_right, has_below), kWords ? &word : nullptr);
            if (kWords && q == 3 && a.codes)
                *reinterpret_cast<uint32_t *>(a.codes + (example * kPooled + pixel) * kShape.O + o - 3) = word;
        } else {
#pragma unroll
            for (int pixel = 0; pixel < 4; ++pixel)
                if ((pixel % 2 == 0 || has_right) && (pixel / 2 == 0 || has_below))
                    keep(a, example, o, (2 * h + pixel / 2) * kWidth + 2 * w + pixel % 2,
                         outcome(numbers[0][pixel], numbers[1][pixel], 0));
        }
    });
}

} // namespace mann::cuda

using namespace mann::cuda;

MANN_KERNEL(augmented_conv2d_pack, kPackThreads, ConvPack<S>) {
    MANN_DYNAMIC_SHARED(shared);
    start_next();
    pack_weights<true, Forward::kPadded, kPackThreads>(args, int(blockIdx.x), int(blockIdx.y),
                                                       reinterpret_cast<T *>(shared));
}

MANN_KERNEL(augmented_conv2d, MANN_BOUNDS(Forward::kThreads, Forward::kBlocks), ConvForward<S>) {
    MANN_DYNAMIC_SHARED(shared);
    convolve_example(args, reinterpret_cast<T *>(shared));
}
