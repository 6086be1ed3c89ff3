// augmented_conv2d, backward: the gradient of the images is a convolution of the gradients of both sides; the gradient
// of the weights is taken once an example, then its mixture over the rows of the memory and its products with them.
#include "augmented_conv2d_tile.h"

namespace mann::cuda {

struct OfBackward {
    static constexpr ConvTiling tiling = backward_tiling(kShape, MANN_TENSOR != 0);
};
using Backward = Tiled<OfBackward>;

// Of a window (a pixel, without pooling): what the gradients before its two activations are made of.
constexpr bool kSlopes = MANN_SLOPES != 0; // they were saved, or all are 1
struct Loaded {
    S dy;
    uint8_t code;
    T slopes[kSlopes ? 2 : 1];
};
MANN_INLINE Loaded load_gradient(const ConvOutputGradient<S> &a, int64_t example, int o, int window, bool exists) {
    const int64_t at = (example * kPooled + window) * kShape.O + o;
    Loaded loaded{
        load_if(exists, a.dy + (example * kShape.O + o) * kPooled + window), load_if(exists, a.codes + at), {}};
    for (int side = 0; side < 2 && kSlopes; ++side)
        loaded.slopes[side] = load_if(exists, a.slopes + side * a.side + at);
    return loaded;
}
// The gradients at its largest pixel; they are zero at the others, and where nothing was loaded.
struct Sides {
    T slow, fast;
};
MANN_INLINE Sides sides_of(const Loaded &loaded) {
    const T dy = to_arith(loaded.dy), slow = kSlopes ? dy * loaded.slopes[0] : dy;
    const T fast = kSlopes ? dy * loaded.slopes[kSlopes] : dy;
    return {loaded.code & kSlowBit ? slow : T(0), loaded.code & kFastBit ? fast : T(0)};
}

// What a block of convolve_gradient loads. A channel is an output's slow or fast side.
struct BackwardLoad {
    using D = Backward;
    using Number = Loaded; // of both sides
    static constexpr int kNumbers = D::kChunk / 2 * D::kRows * D::kColumns, kMostHeld = ConvTiling::kBackwardHeld / 2;
    const ConvOutputGradient<S> &gradient;
    const T *slow, *fast;
    int64_t example;
    int h0, w0;

    MANN_INLINE void weights(T *target, int first, int count) const {
        for_each<D::kChunk * kTaps * 2 * D::kTogether, D::kThreads, 2>([&](uint32_t i) {
            const int four = i % (2 * D::kTogether), tap = i / (2 * D::kTogether) % kTaps;
            const int n = i / (2 * D::kTogether) / kTaps;
            T *at = target + n * D::kWeights + (tap * 2 * D::kTogether + four) * 4;
            if (n < count)
                copy_four(at, (n % 2 ? fast : slow) + ((first + n) / 2 * kTaps + tap) * (2 * D::kPadded) + 4 * four);
            else if (D::kTensor) clear_four(at);
        });
    }
    // Where number i belongs: a pixel of the result, from the tile's first; and an output.
    struct Place {
        int row, column, n, y, x;
        MANN_INLINE Place(const BackwardLoad &of, int i)
            : row(i / D::kColumns % D::kRows), column(i % D::kColumns), n(i / D::kColumns / D::kRows * 2),
              y(2 * of.h0 + row - (kSide - 1 - kShape.padding)), x(2 * of.w0 + column - (kSide - 1 - kShape.padding)) {}
    };
    MANN_INLINE Loaded number(int i, int first, int count) const {
        constexpr int kStep = kShape.pool ? 2 : 1;
        const Place p(*this, i);
        const bool exists = p.n < count && p.y >= 0 && p.y < kHeight && p.x >= 0 && p.x < kWidth;
        return load_gradient(gradient, example, (first + p.n) / 2, p.y / kStep * kPooledWidth + p.x / kStep, exists);
    }
    MANN_INLINE void put(T *images, int i, const Loaded &loaded) const {
        const Place p(*this, i);
        const int pixel = kShape.pool ? p.y % 2 * 2 + p.x % 2 : 0;
        const Sides sides = sides_of(loaded);
        const bool is_largest = (loaded.code & kPixelBits) == pixel;
        T *at = images + p.n * D::kPlane + p.row * D::kRowStride + p.column;
        at[0] = operand(is_largest ? sides.slow : T(0)), at[D::kPlane] = operand(is_largest ? sides.fast : T(0));
    }
};

// An example, and a tile of windows of its image and of inputs.
MANN_INLINE void convolve_gradient(const ConvBackwardX<S> &a, int64_t example, int number, T *shared) {
    using D = Backward;
    const int tile = number % D::kTiles, c0 = number / D::kTiles * 8 * D::kTogether;
    const int h0 = tile / D::kTilesWide * D::kTileHeight, w0 = tile % D::kTilesWide * D::kTileWidth;
    constexpr int64_t kWeight = int64_t(kShape.O) * kTaps * 2 * D::kPadded;
    const T *slow = a.packed + c0, *fast = slow + (1 + example / a.per_weight) * kWeight;
    convolve<D>(shared, BackwardLoad{a.gradient, slow, fast, example, h0, w0},
                [&](int window, int group, int q, const T(&numbers)[2][4]) {
                    const int h = 2 * (h0 + window / D::kTileWidth), w = 2 * (w0 + window % D::kTileWidth);
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const int c = c0 + (i / 4 * D::kTogether + group) * 4 + q, y = h + i % 4 / 2, x = w + i % 2;
                        if (c < kShape.C && y < kShape.H && x < kShape.W)
                            a.dx[((example * kShape.C + c) * kShape.H + y) * kShape.W + x] =
                                to_storage<S>(numbers[i / 4][i % 4]);
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
    static_assert(kInputs * kOutputs * kPhases <= kThreads && 32 % kPhases == 0);
};

// Gradients of a window, and where the patch of the image begins that they belong to.
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
    for_each<W::kInputs * W::kRows * W::kColumns, W::kThreads>([&](uint32_t i) {
        const int column = i % W::kColumns, row = i / W::kColumns % W::kRows, c = i / W::kColumns / W::kRows;
        const int y = 2 * h0 + row - kShape.padding, z = 2 * w0 + column - kShape.padding;
        copy_number(image + (row * W::kColumns + column) * W::kStride + c, x + (c * kShape.H + y) * kShape.W + z,
                    c0 + c < kShape.C && y >= 0 && y < kShape.H && z >= 0 && z < kShape.W);
    });
    copy_async_commit();
    constexpr int kWide = kShape.pool ? W::kTileWidth : 2 * W::kTileWidth, kStep = kShape.pool ? 2 : 1;
    constexpr int kCount = W::kOutputs * W::kEntries, kAtOnce = at_most((kCount + W::kThreads - 1) / W::kThreads, 4);
#pragma unroll 1
    for (int i0 = int(threadIdx.x); i0 < kCount; i0 += kAtOnce * W::kThreads) {
        Loaded loaded[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int i = i0 + j * W::kThreads, o = i / W::kEntries, at = i % W::kEntries; // a window of the tile
            const int y = 2 * h0 + at / kWide * kStep, z = 2 * w0 + at % kWide * kStep;
            const bool exists = i < kCount && o0 + o < kShape.O && y < kHeight && z < kWidth;
            loaded[j] = load_gradient(a.gradient, example, o0 + o, y / kStep * kPooledWidth + z / kStep, exists);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int i = i0 + j * W::kThreads, at = i % W::kEntries, code = loaded[j].code;
            const Sides sides = sides_of(loaded[j]);
            int y = at / kWide * kStep, z = at % kWide * kStep;
            if (kShape.pool) y += code / 2 % 2, z += code % 2;
            if (i < kCount) entries[i] = {sides.slow, sides.fast, (y * W::kColumns + z) * W::kStride};
        }
    }
    copy_async_wait<0>();
}

// The sums over all phases, to each of them.
template <int count> MANN_INLINE void add_phases(T (&sum)[count]) {
#pragma unroll
    for (int distance = OfWeights::kPhases / 2; distance > 0; distance /= 2)
#pragma unroll
        for (int i = 0; i < count; ++i) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], distance);
}

// A group of examples, and a tile of outputs and inputs. A thread has an output, an input and a share of the pixels.
MANN_INLINE void gradient_of_weights(const ConvBackwardW<S> &a, int group, int number, T *shared) {
    using W = OfWeights;
    const int L = int(a.L), size = int(a.group), groups = (L + size - 1) / size, task = group / groups;
    const int first = group % groups * size, last = int(at_most(first + size, L));
    const int tid = int(threadIdx.x), c0 = number % W::kTilesC * W::kInputs, o0 = number / W::kTilesC * W::kOutputs;
    const int phase = tid % W::kPhases, c = tid / W::kPhases % W::kInputs, o = tid / W::kPhases / W::kInputs;
    T *image = shared;
    Entry *entries = reinterpret_cast<Entry *>(shared + W::kImage);
    const bool is_mine = phase == 0 && o < W::kOutputs && o0 + o < kShape.O && c0 + c < kShape.C;
    const int64_t at = int64_t(o0 + o) * kK + c0 + c; // of [O][tap][C]
    const auto store = [&](T *target, const T *numbers) {
        if (!is_mine) return;
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) target[at + tap * kShape.C] = numbers[tap];
    };
    T slow[kTaps + 1] = {}, fast[kTaps] = {}; // the last is of the bias
    for (int l = first; l < last; ++l) {
        const int64_t example = int64_t(task) * L + l;
#pragma unroll 1
        for (int tile = 0; tile < W::kTiles; ++tile) {
            __syncthreads();
            load_tile(a, example, tile, o0, c0, image, entries);
            __syncthreads();
#pragma unroll 2
            for (int i = o < W::kOutputs ? phase : W::kEntries; i < W::kEntries; i += W::kPhases) {
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
        add_phases(fast);
        store(a.fast + example * (int64_t(kShape.O) * kK), fast);
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) fast[tap] = 0;
    }
    add_phases(slow);
    store(a.slow + group * (int64_t(kShape.O) * kK), slow);
    if (is_mine && c0 + c == 0) a.bias[int64_t(group) * kShape.O + o0 + o] = slow[kTaps];
    if (a.own) return;
    add_phases(fast);
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

// A part of a weight, of a task: dfast_s = sum_l mix_ls own_l, and this part's share of dmix_ls = <own_l, fast_s>. A
// warp has 32 numbers, a strip, and a share of the examples.
MANN_INLINE void gradient_of_rows(const ConvBackwardRows<S> &a, int64_t g, int part, T *shared) {
    constexpr ConvRowsTiling t{kShape, Backward::kThreads};
    constexpr int kRows = t.kRows, kTogether = 4, kBatch = t.kBatch, kThreads = Backward::kThreads;
    constexpr int kSlices = t.slices, kStrips = t.strips, kCount = kShape.O * kK;
    T *mixes = shared, *dots = shared + kBatch * kRows, *sums = shared; // [kBatch][kRows]; [kStrips] of these
    const int tid = int(threadIdx.x), lane = tid % 32, strip = tid / 32 / kSlices, slice = tid / 32 % kSlices;
    const int e = strip < kStrips ? (part * kStrips + strip) * 32 + lane : kCount, at = e < kCount ? natural(e) : 0;
    const int64_t L = a.layer.L, rows = a.layer.rows;
    const T *own = a.own + g * L * kCount + e;
    if (L == 0) wait_for_previous(); // else below
    for (int64_t s0 = 0; s0 < rows; s0 += kRows) {
        const int some = int(rows - s0 < kRows ? rows - s0 : kRows);
        T sum[kRows] = {}, fast[kRows];
#pragma unroll
        for (int s = 0; s < kRows; ++s)
            fast[s] = to_arith(load_if(s < some && e < kCount && a.dots,
                                       a.layer.fast + g * a.layer.task_stride + (s0 + s) * a.layer.row_stride + at));
        for (int64_t l0 = 0; l0 < L; l0 += kBatch) {
            const int batch = int(L - l0 < kBatch ? L - l0 : kBatch);
            __syncthreads();
            for_each<kBatch * kRows, kThreads>([&](uint32_t i) {
                const bool exists = i / kRows < batch && i % kRows < some;
                const S mix =
                    load_if(exists && a.layer.mix, a.layer.mix + (g * L + l0 + i / kRows) * rows + s0 + i % kRows);
                mixes[i] = a.layer.mix ? to_arith(mix) : exists ? T(1) : T(0);
            });
            wait_for_previous(); // it made the gradients of the examples' own weights
            T next[kTogether];
            const auto load = [&](int l) {
#pragma unroll
                for (int j = 0; j < kTogether; ++j)
                    next[j] = load_if(l + j < batch && e < kCount, own + (l0 + l + j) * kCount);
            };
            load(slice * kTogether);
            __syncthreads();
            for (int l = slice * kTogether; l < batch; l += kSlices * kTogether) {
                T value[kTogether], products[32];
#pragma unroll
                for (int j = 0; j < kTogether; ++j) value[j] = next[j];
                load(l + kSlices * kTogether);
#pragma unroll
                for (int j = 0; j < kTogether; ++j)
#pragma unroll
                    for (int s = 0; s < kRows; ++s) {
                        sum[s] += mixes[(l + j) * kRows + s] * value[j];
                        products[j * kRows + s] = fast[s] * value[j];
                    }
                if (a.dots && strip < kStrips) dots[(strip * kBatch + l) * kRows + lane] = sum_across(products);
            }
            __syncthreads();
            if (!a.dots) continue;
#pragma unroll 1
            for (int i = tid; i < batch * kRows; i += kThreads) {
                if (i % kRows >= some) continue;
                T dot = 0;
                for (int n = 0; n < kStrips; ++n) dot += dots[n * kBatch * kRows + i];
                a.dots[part * a.dots_stride + (g * L + l0 + i / kRows) * rows + s0 + i % kRows] = dot;
            }
        }
        if (kSlices > 1) { // the sums of all slices to the first, in order
            __syncthreads();
#pragma unroll
            for (int s = 0; s < kRows; ++s) sums[s * kThreads + tid] = sum[s];
            __syncthreads();
#pragma unroll
            for (int s = 0; s < kRows; ++s)
                for (int other = 1; other < kSlices && slice == 0; ++other)
                    sum[s] += sums[s * kThreads + tid + 32 * other];
        }
        for (int s = 0; s < some; ++s) // an index that is not constant would put the sums into local memory
#pragma unroll
            for (int i = 0; i < kRows; ++i)
                if (i == s && e < kCount && slice == 0)
                    a.dfast[(g * rows + s0 + s) * kCount + at] = to_storage<S>(sum[i]);
    }
}

// A warp for a number of dmix in the last blocks, else a block for kSumNumbers of the slow weight and the bias, with
// several threads for each.
MANN_INLINE void sum_parts(const ConvBackwardSums<S> &a) {
    constexpr int kCount = kShape.O * kK, kBlocks = (kCount + kShape.O + kSumNumbers - 1) / kSumNumbers;
    constexpr int kSlices = kSumThreads / kSumNumbers;
    MANN_SHARED(T, sums, kSumThreads);
    const int tid = int(threadIdx.x), lane = tid % 32;
    if (int(blockIdx.x) >= kBlocks) {
        const int64_t dot = int64_t(int(blockIdx.x) - kBlocks) * (kSumThreads / 32) + tid / 32;
        if (dot >= a.dots) return;
        T sum = sum_of<6>(lane, int(a.parts), 32, [&](int part) { return a.dot_parts + part * a.dots + dot; });
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (lane == 0) a.dmix[dot] = to_storage<S>(sum);
        return;
    }
    const int e = int(blockIdx.x) * kSumNumbers + tid % kSumNumbers;
    const bool exists = e < kCount + kShape.O, of_bias = e >= kCount;
    const T *parts = of_bias ? a.bias + (e - kCount) : a.slow + e;
    const int64_t stride = of_bias ? kShape.O : kCount;
    T sum = sum_of<16>(tid / kSumNumbers, exists ? int(a.groups) : 0, kSlices,
                       [&](int group) { return parts + group * stride; });
    sums[tid] = sum;
    __syncthreads();
    if (!exists || tid >= kSumNumbers) return;
    for (int slice = 1; slice < kSlices; ++slice) sum += sums[slice * kSumNumbers + tid];
    (of_bias ? a.dbias + (e - kCount) : a.dweight + natural(e))[0] = to_storage<S>(sum);
}

} // namespace mann::cuda

using namespace mann::cuda;

// Blocks for the gradients of weights, the others for the weights as a convolution reads them. Two to a multiprocessor.
MANN_KERNEL(augmented_conv2d_backward_first, MANN_BOUNDS(OfWeights::kThreads, 2), ConvBackwardFirst<S>) {
    MANN_DYNAMIC_SHARED(bytes);
    T *shared = reinterpret_cast<T *>(bytes);
    start_next();
    if (blockIdx.x < args.w_blocks) {
        gradient_of_weights(args.w, int(blockIdx.x) / OfWeights::kTilesBoth, int(blockIdx.x) % OfWeights::kTilesBoth,
                            shared);
    } else {
        const int block = int(blockIdx.x) - int(args.w_blocks), batches = int(args.pack.batches);
        pack_weights<false, 2 * Backward::kPadded, OfWeights::kThreads>(args.pack, block / batches, block % batches,
                                                                        shared);
    }
}

// Blocks for the gradient of the images, the others for that of the rows of the memory.
MANN_KERNEL(augmented_conv2d_backward_second, MANN_BOUNDS(Backward::kThreads, Backward::kBlocks),
            ConvBackwardSecond<S>) {
    MANN_DYNAMIC_SHARED(bytes);
    T *shared = reinterpret_cast<T *>(bytes);
    start_next();
    if (blockIdx.x < args.x_blocks) {
        convolve_gradient(args.x, int(blockIdx.x) % int(args.examples), int(blockIdx.x) / int(args.examples), shared);
    } else {
        constexpr int kParts = ConvRowsTiling(kShape, Backward::kThreads).parts;
        const int block = int(blockIdx.x) - int(args.x_blocks);
        gradient_of_rows(args.rows, block / kParts, block % kParts, shared);
    }
}

MANN_KERNEL(augmented_conv2d_backward_sums, kSumThreads, ConvBackwardSums<S>) {
    wait_for_previous();
    sum_parts(args);
}
