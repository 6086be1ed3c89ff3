// augmented_conv2d, backward: the gradient of the images is a convolution of the gradients of both sides; the gradient
// of the weights is taken once an example, then its mixture over the rows of the memory and its products with them.
#include "augmented_conv2d_tile.h"

namespace mann::cuda {

struct OfBackward {
    static constexpr ConvTiling tiling = backward_tiling(kShape, MANN_TENSOR != 0);
};
using Backward = Tiled<OfBackward>;

// The gradients before the two activations at a pixel; they are zero where the pixel was not the largest.
struct Sides {
    T slow, fast;
};
// Of a window (a pixel, without pooling) at its largest pixel.
MANN_INLINE Sides gradient_of(const ConvOutputGradient<S> &a, int64_t example, int o, int window, int &code) {
    const int64_t at = (example * kPooled + window) * kShape.O + o;
    code = a.codes[at];
    const T dy = to_arith(a.dy[(example * kShape.O + o) * kPooled + window]);
    const T slow = a.slopes ? dy * a.slopes[at] : dy, fast = a.slopes ? dy * a.slopes[a.side + at] : dy;
    return {code & kSlowBit ? slow : T(0), code & kFastBit ? fast : T(0)};
}

// An example, and a tile of windows of its image and of inputs.
MANN_INLINE void convolve_gradient(const ConvBackwardX<S> &a, int64_t example, int number, T *shared) {
    using D = Backward;
    const int tile = number % D::kTiles, c0 = number / D::kTiles * 8 * D::kTogether;
    const int h0 = tile / D::kTilesWide * D::kTileHeight, w0 = tile % D::kTilesWide * D::kTileWidth;
    constexpr int64_t kWeight = int64_t(kShape.O) * kTaps * 2 * D::kPadded;
    const T *slow = a.packed + c0, *fast = slow + (1 + example / a.per_weight) * kWeight;
    const auto load = [&](T *images, T *weights, int first, int count) {
        for_each<D::kChunk * kTaps * 2 * D::kTogether, D::kThreads, 2>([&](uint32_t i) { // channel: output and side
            const int four = i % (2 * D::kTogether), tap = i / (2 * D::kTogether) % kTaps;
            const int n = i / (2 * D::kTogether) / kTaps;
            T *target = weights + n * D::kWeights + (tap * 2 * D::kTogether + four) * 4;
            if (n < count)
                copy_four(target,
                          (n % 2 ? fast : slow) + ((first + n) / 2 * kTaps + tap) * (2 * D::kPadded) + 4 * four);
            else if (D::kTensor) clear_four(target);
        });
        for_each<D::kChunk / 2 * D::kRows * D::kColumns, D::kThreads, 2>([&](uint32_t i) {
            const int column = i % D::kColumns, row = i / D::kColumns % D::kRows, n = i / D::kColumns / D::kRows * 2;
            const int y = 2 * h0 + row - (kSide - 1 - kShape.padding);
            const int x = 2 * w0 + column - (kSide - 1 - kShape.padding);
            Sides sides{0, 0};
            if (n < count && y >= 0 && y < kHeight && x >= 0 && x < kWidth) {
                constexpr int step = kShape.pool ? 2 : 1;
                const int pixel = kShape.pool ? y % 2 * 2 + x % 2 : 0;
                int code;
                sides = gradient_of(a.gradient, example, (first + n) / 2, y / step * kPooledWidth + x / step, code);
                if ((code & kPixelBits) != pixel) sides = {0, 0};
            }
            T *target = images + n * D::kPlane + row * D::kRowStride + column;
            target[0] = operand(sides.slow), target[D::kPlane] = operand(sides.fast);
        });
    };
    convolve<D>(shared, load, [&](int window, int group, int q, const T(&numbers)[2][4]) {
        const int h = 2 * (h0 + window / D::kTileWidth), w = 2 * (w0 + window % D::kTileWidth);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int c = c0 + (i / 4 * D::kTogether + group) * 4 + q, y = h + i % 4 / 2, x = w + i % 2;
            if (c < kShape.C && y < kShape.H && x < kShape.W)
                a.dx[((example * kShape.C + c) * kShape.H + y) * kShape.W + x] = to_storage<S>(numbers[i / 4][i % 4]);
        }
    });
}

struct OfWeights {
    static constexpr ConvGradTiling t{kShape};
    static constexpr int kTileHeight = t.tiles.height, kTileWidth = t.tiles.width, kTilesWide = t.tiles.tiles_wide;
    static constexpr int kTiles = t.tiles.count(), kInputs = t.together_c, kOutputs = t.together_o;
    static constexpr int kPhases = t.phases, kRows = t.rows, kColumns = t.columns, kEntries = t.entries;
    static constexpr int kThreads = ConvGradTiling::kThreads, kStride = t.stride(), kImage = t.image();
    static constexpr int kTilesC = t.tiles_c(kShape), kTilesBoth = kTilesC * t.tiles_o(kShape);
    static constexpr int kBusy = kInputs * kOutputs * kPhases;
};

// A gradient that is not known to be zero, and where its patch of the image begins.
struct alignas(16) Entry {
    T slow, fast;
    int patch;
};

// The image and the gradients of a tile to shared memory.
MANN_INLINE void load_tile(const ConvBackwardW<S> &a, int64_t example, int tile, int o0, int c0, T *image,
                           Entry *entries) {
    using W = OfWeights;
    const int h0 = tile / W::kTilesWide * W::kTileHeight, w0 = tile % W::kTilesWide * W::kTileWidth;
    const S *x = a.x + (example * kShape.C + c0) * (kShape.H * kShape.W);
    for_each<W::kInputs * W::kRows * W::kColumns, W::kThreads, 3>([&](uint32_t i) {
        const int column = i % W::kColumns, row = i / W::kColumns % W::kRows, c = i / W::kColumns / W::kRows;
        const int y = 2 * h0 + row - kShape.padding, z = 2 * w0 + column - kShape.padding;
        const bool inside = c0 + c < kShape.C && y >= 0 && y < kShape.H && z >= 0 && z < kShape.W;
        image[(row * W::kColumns + column) * W::kStride + c] =
            inside ? to_arith(x[(c * kShape.H + y) * kShape.W + z]) : T(0);
    });
    for_each<W::kOutputs * W::kEntries, W::kThreads, 2>([&](uint32_t i) {
        const int o = i / W::kEntries, at = i % W::kEntries; // a window of the tile, or a pixel
        constexpr int kWide = kShape.pool ? W::kTileWidth : 2 * W::kTileWidth, kStep = kShape.pool ? 2 : 1;
        int y = at / kWide * kStep, z = at % kWide * kStep;
        Entry entry{0, 0, 0};
        if (o0 + o < kShape.O && 2 * h0 + y < kHeight && 2 * w0 + z < kWidth) {
            const int window = (2 * h0 + y) / kStep * kPooledWidth + (2 * w0 + z) / kStep;
            int code;
            const Sides sides = gradient_of(a.gradient, example, o0 + o, window, code);
            if (kShape.pool) y += code / 2 % 2, z += code % 2;
            entry = {sides.slow, sides.fast, (y * W::kColumns + z) * W::kStride};
        }
        entries[i] = entry;
    });
}

// The sums of all phases to the first, in order.
template <int count> MANN_INLINE void add_phases(T (&sum)[count], T *shared) {
    using W = OfWeights;
    constexpr int kPairs = W::kInputs * W::kOutputs;
    const int tid = int(threadIdx.x);
    if (W::kPhases == 1) return;
#pragma unroll
    for (int first = 0; first < count; first += ConvGradTiling::kSums) {
        const int last = int(at_most(first + ConvGradTiling::kSums, count));
        __syncthreads();
        if (tid < W::kBusy) {
#pragma unroll
            for (int i = first; i < last; ++i) shared[(i - first) * W::kBusy + tid] = sum[i];
        }
        __syncthreads();
        if (tid < kPairs)
            for (int phase = 1; phase < W::kPhases; ++phase) {
#pragma unroll
                for (int i = first; i < last; ++i) sum[i] += shared[(i - first) * W::kBusy + phase * kPairs + tid];
            }
    }
}

// A group of examples, and a tile of outputs and inputs. A thread has an output, an input and a share of the pixels.
MANN_INLINE void gradient_of_weights(const ConvBackwardW<S> &a, int64_t group, int number, T *shared) {
    using W = OfWeights;
    const int64_t groups = (a.L + a.group - 1) / a.group, task = group / groups, first = group % groups * a.group;
    const int64_t last = first + a.group < a.L ? first + a.group : a.L;
    const int tid = int(threadIdx.x), c0 = number % W::kTilesC * W::kInputs, o0 = number / W::kTilesC * W::kOutputs;
    const int c = tid % W::kInputs, o = tid / W::kInputs % W::kOutputs, phase = tid / W::kInputs / W::kOutputs;
    T *image = shared;
    Entry *entries = reinterpret_cast<Entry *>(shared + W::kImage);
    const bool is_mine = tid < W::kInputs * W::kOutputs && o0 + o < kShape.O && c0 + c < kShape.C;
    const int64_t at = int64_t(o0 + o) * kK + c0 + c; // of [O][tap][C]
    const auto store = [&](T *target, const T *numbers) {
        if (!is_mine) return;
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) target[at + tap * kShape.C] = numbers[tap];
    };
    T slow[kTaps + 1] = {}, fast[kTaps] = {}; // the last is of the bias
    for (int64_t l = first; l < last; ++l) {
        const int64_t example = task * a.L + l;
#pragma unroll 1
        for (int tile = 0; tile < W::kTiles; ++tile) {
            __syncthreads();
            load_tile(a, example, tile, o0, c0, image, entries);
            __syncthreads();
            if (tid >= W::kBusy) continue;
#pragma unroll 2
            for (int i = phase; i < W::kEntries; i += W::kPhases) {
                const Entry entry = entries[o * W::kEntries + i];
                const T *patch = image + entry.patch + c;
                slow[kTaps] += entry.slow;
#pragma unroll
                for (int tap = 0; tap < kTaps; ++tap) {
                    const T x = patch[(tap / kSide * W::kColumns + tap % kSide) * W::kStride];
                    slow[tap] += entry.slow * x, fast[tap] += entry.fast * x;
                }
            }
        }
        if (!a.own) continue;
        add_phases(fast, shared);
        store(a.fast + example * (int64_t(kShape.O) * kK), fast);
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) fast[tap] = 0;
    }
    add_phases(slow, shared);
    store(a.slow + group * (int64_t(kShape.O) * kK), slow);
    if (is_mine && c0 + c == 0) a.bias[group * kShape.O + o0 + o] = slow[kTaps];
    if (a.own) return;
    add_phases(fast, shared);
    store(a.fast + group * (int64_t(kShape.O) * kK), fast);
}

// Number e of [O][tap][C] as it stands in [O][C][tap].
MANN_INLINE int natural(int e) { return e / kK * kK + e % kShape.C * kTaps + e / kShape.C % kTaps; }

// Each of a warp's 32 lanes has 32 numbers; lane i gets the sum of those with index i.
template <int half = 16> MANN_INLINE T sum_across(T (&numbers)[2 * half]) {
    const bool upper = threadIdx.x & half;
    T kept[half];
#pragma unroll
    for (int i = 0; i < half; ++i) {
        const T given = upper ? numbers[i] : numbers[i + half];
        kept[i] = (upper ? numbers[i + half] : numbers[i]) + __shfl_xor_sync(0xffffffffu, given, half);
    }
    if constexpr (half > 1) return sum_across<half / 2>(kept);
    return kept[0];
}

// A part of a weight, of a task: dfast_s = sum_l mix_ls own_l, and this part's share of dmix_ls = <own_l, fast_s>.
MANN_INLINE void gradient_of_rows(const ConvBackwardRows<S> &a, int64_t g, int part, T *shared) {
    constexpr int kRows = 8, kTogether = 4, kBatch = ConvGradTiling::kBatch, kThreads = Backward::kThreads;
    constexpr int kWarps = kThreads / 32, kCount = kShape.O * kK;
    T *mixes = shared, *dots = shared + kBatch * kRows;
    const int tid = int(threadIdx.x), warp = tid / 32, lane = tid % 32;
    const int e = part * kThreads + tid, at = e < kCount ? natural(e) : 0;
    const int64_t L = a.layer.L, rows = a.layer.rows;
    const T *own = a.own + g * L * kCount + e;
    for (int64_t s0 = 0; s0 < rows; s0 += kRows) {
        const int some = int(rows - s0 < kRows ? rows - s0 : kRows);
        T sum[kRows] = {}, fast[kRows];
#pragma unroll
        for (int s = 0; s < kRows; ++s)
            fast[s] = s < some && e < kCount && a.dots
                          ? to_arith(a.layer.fast[g * a.layer.task_stride + (s0 + s) * a.layer.row_stride + at])
                          : T(0);
        for (int64_t l0 = 0; l0 < L; l0 += kBatch) {
            const int batch = int(L - l0 < kBatch ? L - l0 : kBatch);
            __syncthreads();
            for (int i = tid; i < kBatch * kRows; i += kThreads) {
                const bool exists = i / kRows < batch && i % kRows < some;
                mixes[i] = !exists       ? T(0)
                           : a.layer.mix ? to_arith(a.layer.mix[(g * L + l0 + i / kRows) * rows + s0 + i % kRows])
                                         : T(1);
            }
            __syncthreads();
#pragma unroll 2
            for (int l = 0; l < batch; l += kTogether) {
                T value[kTogether], products[32];
#pragma unroll
                for (int j = 0; j < kTogether; ++j)
                    value[j] = l + j < batch && e < kCount ? own[(l0 + l + j) * kCount] : T(0);
#pragma unroll
                for (int j = 0; j < kTogether; ++j)
#pragma unroll
                    for (int s = 0; s < kRows; ++s) {
                        sum[s] += mixes[(l + j) * kRows + s] * value[j];
                        products[j * kRows + s] = fast[s] * value[j];
                    }
                if (a.dots) dots[warp * (kBatch * kRows) + l * kRows + lane] = sum_across(products);
            }
            __syncthreads();
            if (!a.dots) continue;
            for (int i = tid; i < batch * kRows; i += kThreads) {
                if (i % kRows >= some) continue;
                T dot = 0;
                for (int w = 0; w < kWarps; ++w) dot += dots[w * (kBatch * kRows) + i];
                a.dots[part * a.dots_stride + (g * L + l0 + i / kRows) * rows + s0 + i % kRows] = dot;
            }
        }
        for (int s = 0; s < some; ++s) // an index that is not constant would put the sums into local memory
#pragma unroll
            for (int i = 0; i < kRows; ++i)
                if (i == s && e < kCount) a.dfast[(g * rows + s0 + s) * kCount + at] = to_storage<S>(sum[i]);
    }
}

// A warp for a number of dmix in the last blocks, else a thread for a number of the slow weight or the bias.
MANN_INLINE void sum_parts(const ConvBackwardSums<S> &a) {
    constexpr int kCount = kShape.O * kK, kBlocks = (kCount + kShape.O + kSumThreads - 1) / kSumThreads;
    const int tid = int(threadIdx.x), lane = tid % 32;
    if (int(blockIdx.x) >= kBlocks) {
        const int64_t dot = int64_t(int(blockIdx.x) - kBlocks) * (kSumThreads / 32) + tid / 32;
        if (dot >= a.dots) return;
        T sum = 0;
        for (int64_t part = lane; part < a.parts; part += 32) sum += a.dot_parts[part * a.dots + dot];
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (lane == 0) a.dmix[dot] = to_storage<S>(sum);
        return;
    }
    const int e = int(blockIdx.x) * kSumThreads + tid;
    if (e >= kCount + kShape.O) return;
    const bool of_bias = e >= kCount;
    const T *parts = of_bias ? a.bias + (e - kCount) : a.slow + e;
    const int64_t stride = of_bias ? kShape.O : kCount;
    T sum = 0;
#pragma unroll 8
    for (int64_t group = 0; group < a.groups; ++group) sum += parts[group * stride];
    (of_bias ? a.dbias + (e - kCount) : a.dweight + natural(e))[0] = to_storage<S>(sum);
}

} // namespace mann::cuda

using namespace mann::cuda;

// Blocks for the gradients of weights, the others for the weights as a convolution reads them. Two to a multiprocessor.
MANN_KERNEL(augmented_conv2d_backward_first, MANN_BOUNDS(OfWeights::kThreads, 2), ConvBackwardFirst<S>) {
    MANN_DYNAMIC_SHARED(bytes);
    T *shared = reinterpret_cast<T *>(bytes);
    if (blockIdx.x < args.w_blocks) {
        gradient_of_weights(args.w, blockIdx.x / OfWeights::kTilesBoth, int(blockIdx.x) % OfWeights::kTilesBoth,
                            shared);
    } else {
        const int64_t block = blockIdx.x - args.w_blocks;
        pack_weights<false, 2 * Backward::kPadded, OfWeights::kThreads>(args.pack, int(block / args.pack.batches),
                                                                        block % args.pack.batches, shared);
    }
}

// To a multiprocessor: so many of the blocks with few threads.
constexpr int kSecondBlocks = Backward::kTensor || Backward::kThreads > 256 ? 1 : 2;
// Blocks for the gradient of the images, the others for that of the rows of the memory.
MANN_KERNEL(augmented_conv2d_backward_second, MANN_BOUNDS(Backward::kThreads, kSecondBlocks), ConvBackwardSecond<S>) {
    MANN_DYNAMIC_SHARED(bytes);
    T *shared = reinterpret_cast<T *>(bytes);
    if (blockIdx.x < args.x_blocks) {
        convolve_gradient(args.x, blockIdx.x % args.examples, int(blockIdx.x / args.examples), shared);
    } else {
        constexpr int kParts = (kShape.O * kK + Backward::kThreads - 1) / Backward::kThreads;
        const int64_t block = blockIdx.x - args.x_blocks;
        gradient_of_rows(args.rows, block / kParts, int(block % kParts), shared);
    }
}

MANN_KERNEL(augmented_conv2d_backward_sums, kSumThreads, ConvBackwardSums<S>) { sum_parts(args); }
