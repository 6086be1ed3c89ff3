// What both passes of augmented_conv2d share, device code: the weights mixed and laid out as a convolution reads them,
// and the convolution of an example.
#pragma once

#include "device.h"

#include "augmented_conv2d.h"

namespace mann::cuda {

using S = MANN_STORAGE;
using T = Arith<S>;

constexpr ConvShape kShape{MANN_C, MANN_H, MANN_W, MANN_O, MANN_TAPS_SIDE, MANN_PADDING, MANN_POOL != 0, MANN_ROOM};
constexpr int kSide = kShape.k, kTaps = kShape.taps(), kK = kShape.K();
constexpr int kHeight = kShape.height(), kWidth = kShape.width();
constexpr int kPooledWidth = kShape.pooled_width(), kPooled = kShape.pooled();

// f(i) for every i < count, shared out over the threads, several at once.
template <int count, int threads, int at_once = 4, typename F> MANN_INLINE void for_each(F &&f) {
#pragma unroll at_once
    for (uint32_t first = 0; first < uint32_t(count); first += threads)
        if (first + threads <= uint32_t(count) || first + threadIdx.x < uint32_t(count)) f(first + threadIdx.x);
}

// As a convolution takes it: for tensor cores to the nearest number of TF32.
MANN_INLINE T operand(T x) {
    if constexpr (MANN_TENSOR) return x != x ? x : __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
    return x;
}

// The constants of a ConvPacking.
template <bool inner_is_o, int threads> struct Packed {
    static constexpr ConvPacking p{kShape, inner_is_o};
    static constexpr int kTileO = p.tile_o, kTileC = p.tile_c, kRun = p.run(kShape), kStride = p.stride(kShape);
    static constexpr int kElements = p.elements(kShape), kTogether = ConvPacking::kTogether;
    static constexpr int kOwn = (kElements + threads - 1) / threads;
    static constexpr int kTilesC = (kShape.C + kTileC - 1) / kTileC;
};

// Tile of outputs and inputs, for a batch of examples of a task; the last batch is the slow weight.
template <bool inner_is_o, int kPaddedInner, int kThreads>
MANN_INLINE void pack_weights(const ConvPack<S> &a, int tile, int batch, T *shared) {
    using P = Packed<inner_is_o, kThreads>;
    constexpr int kTogether = P::kTogether, kTileO = P::kTileO, kTileC = P::kTileC;
    constexpr int kRun = P::kRun, kStride = P::kStride, kElements = P::kElements, kOwn = P::kOwn;
    constexpr int kTilesC = P::kTilesC, kOuter = inner_is_o ? kShape.C : kShape.O, kRowsAtOnce = ConvPacking::kRows;
    constexpr int kAhead = kOwn > 3 ? 4 : 2; // rows that are loaded at once
    static_assert(kRowsAtOnce % kAhead == 0);
    MANN_SHARED(T, mixes, kRowsAtOnce * kTogether);
    const int tid = int(threadIdx.x), o0 = tile / kTilesC * kTileO, c0 = tile % kTilesC * kTileC;
    // weights that are made of rows: an example's with a mixture, else the row itself
    const AugmentedLayer<S> &layer = a.layer;
    const int L = layer.mix ? int(layer.L) : 1, batches = (L + kTogether - 1) / kTogether;
    const bool is_slow = batch == int(a.batches) - 1;
    const int g = is_slow ? 0 : batch / batches, l0 = is_slow ? 0 : batch % batches * kTogether;
    const int rows = is_slow ? 1 : int(layer.rows), count = is_slow ? 1 : int(at_most(L - l0, kTogether));
    const S *source = is_slow ? layer.weight : layer.fast + g * layer.task_stride;

    T sum[kTogether][kOwn] = {};
    int places[kOwn]; // of this thread's numbers in a row, -1 where there is none
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int at = tid + i * kThreads, o = o0 + at / kRun, k = c0 * kTaps + at % kRun;
        places[i] = at < kElements && o < kShape.O && k < kK ? o * kK + k : -1;
    }
    for (int s0 = 0; s0 < rows; s0 += kRowsAtOnce) {
        const int some = int(at_most(rows - s0, kRowsAtOnce));
        S values[kAhead][kOwn]; // of the next rows
        const auto load = [&](int s) {
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                const S *row = source + int64_t(s0 + s + j) * layer.row_stride;
#pragma unroll
                for (int i = 0; i < kOwn; ++i) values[j][i] = load_if(s + j < some && places[i] >= 0, row + places[i]);
            }
        };
        __syncthreads();
        for_each<kRowsAtOnce * kTogether, kThreads>([&](uint32_t i) {
            const int s = i / kTogether, e = i % kTogether;
            const bool exists = s < some && e < count, is_mixed = layer.mix && !is_slow;
            const S mix = load_if(exists && is_mixed, layer.mix + int64_t(g * L + l0 + e) * rows + s0 + s);
            mixes[i] = is_mixed ? to_arith(mix) : exists ? T(1) : T(0);
        });
        load(0);
        __syncthreads();
        for (int s = 0; s < some; s += kAhead) {
            if (s > 0) load(s);
#pragma unroll
            for (int j = 0; j < kAhead; ++j)
#pragma unroll
                for (int e = 0; e < kTogether; ++e)
#pragma unroll
                    for (int i = 0; i < kOwn; ++i) sum[e][i] += mixes[(s + j) * kTogether + e] * to_arith(values[j][i]);
        }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int at = thread_again() + i * kThreads;
#pragma unroll
        for (int e = 0; e < kTogether; ++e)
            if (at < kElements) shared[(e * kTileO + at / kRun) * kStride + at % kRun] = sum[e][i];
    }
    __syncthreads();
    T *target = a.packed + (is_slow ? 0 : 1 + g * L + l0) * (int64_t(kOuter) * kTaps * kPaddedInner);
    for (int at = tid; at < kElements; at += kThreads) {
        int o, c, tap, to;
        if constexpr (inner_is_o) {
            o = at % kTileO, tap = at / kTileO % kTaps, c = at / kTileO / kTaps;
            to = ((c0 + c) * kTaps + tap) * kPaddedInner + o0 + o;
            if (c0 + c >= kShape.C || o0 + o >= kPaddedInner) continue;
        } else { // the last tap first
            c = at % kTileC, tap = kTaps - 1 - at / kTileC % kTaps, o = at / kTileC / kTaps;
            to = ((o0 + o) * kTaps + kTaps - 1 - tap) * kPaddedInner + c0 + c;
            if (o0 + o >= kShape.O || c0 + c >= kPaddedInner) continue;
        }
        for (int e = 0; e < count; ++e)
            target[e * (int64_t(kOuter) * kTaps * kPaddedInner) + to] =
                operand(shared[(e * kTileO + o) * kStride + c * kTaps + tap]);
    }
}

// The constants of a ConvTiling Of::tiling.
template <typename Of> struct Tiled {
    static constexpr ConvTiling t = Of::tiling;
    static constexpr int kTileHeight = t.tiles.height, kTileWidth = t.tiles.width, kTilesWide = t.tiles.tiles_wide;
    static constexpr int kTiles = t.tiles.count(), kWindows = t.tiles.windows(), kTogether = t.together;
    static constexpr int kSlices = t.slices, kUnits = t.units(), kThreads = t.threads();
    static constexpr int kRows = t.rows, kColumns = 2 * kTileWidth + t.k - 1, kRowStride = t.row_stride;
    static constexpr int kPlane = t.plane, kWeights = t.weights, kChunk = t.chunk, kChunks = t.chunks();
    static constexpr int kStage = t.stage(), kChannels = t.channels, kGroupTiles = t.group_tiles();
    static constexpr int kPadded = 4 * t.padded_groups(); // groups of 4, with those that fill up the last tile
    static constexpr bool kTensor = t.tensor;
    static constexpr int kQuads = t.quads, kQuadGroups = t.quad_groups, kRowTiles = t.together / 4;
    static constexpr int kWarps = t.warps();                          // of a slice
    static constexpr int kBlocks = kTensor || kThreads > 256 ? 1 : 2; // to a multiprocessor, at least
};

// Four numbers to shared memory, seen after copy_async_wait.
MANN_INLINE void copy_four(float *shared, const float *global) { copy_async16(shared, global); }
MANN_INLINE void copy_four(double *shared, const double *global) {
    copy_async16(shared, global);
    copy_async16(shared + 2, global + 2);
}

template <typename X> MANN_INLINE void clear_four(X *shared) { *reinterpret_cast<Four<X> *>(shared) = {}; }

// sum[v][q][pixel of the window] += the channel's image under the taps with vector v of its weights, number q.
template <typename D> MANN_INLINE void add_channel(T (&sum)[2][4][4], const T *image, const T *weights) {
    struct alignas(2 * sizeof(T)) Pair {
        T at[2];
    };
    T patch[kSide + 1][kSide + 2];
#pragma unroll
    for (int i = 0; i <= kSide; ++i)
#pragma unroll
        for (int j = 0; j <= kSide; j += 2) {
            const Pair pair = *reinterpret_cast<const Pair *>(image + i * D::kRowStride + j);
            patch[i][j] = pair.at[0], patch[i][j + 1] = pair.at[1];
        }
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            const Four<T> w = *reinterpret_cast<const Four<T> *>(weights + (2 * tap + v) * 4 * D::kTogether);
#pragma unroll
            for (int q = 0; q < 4; ++q)
#pragma unroll
                for (int p = 0; p < 4; ++p) sum[v][q][p] += w[q] * patch[tap / kSide + p / 2][tap % kSide + p % 2];
        }
}

// Fills stages of shared memory and takes them: take(images, weights, count) runs when one is there. Of `load`:
// weights(target, first, count) starts to copy those of `count` channels, [channel][tap][2][groups][4];
// number(i, first, count) loads number i of kNumbers of the tile's images, zero behind `count` channels, and
// put(images, i, number) stores it. The first kHeld of a thread are on their way while it takes the stage before.
template <typename D, typename Load, typename Take>
MANN_INLINE void in_chunks(T *shared, const Load &load, Take &&take) {
    constexpr int kEach = (Load::kNumbers + D::kThreads - 1) / D::kThreads, kHeld = at_most(kEach, Load::kMostHeld);
    const int tid = int(threadIdx.x);
    typename Load::Number held[kHeld];
    const auto left = [](int chunk) {
        const int channels = D::kChannels - chunk * D::kChunk;
        return channels < D::kChunk ? channels : D::kChunk;
    };
    const auto stage = [&](int chunk) { return shared + chunk % 2 * D::kStage; };
    const auto start = [&](int chunk) {
#pragma unroll
        for (int j = 0; j < kHeld; ++j) held[j] = load.number(tid + j * D::kThreads, chunk * D::kChunk, left(chunk));
        if (chunk == 0) wait_for_previous(); // it laid out the weights
        load.weights(stage(chunk) + D::kChunk * D::kPlane, chunk * D::kChunk, left(chunk));
        copy_async_commit();
    };
    const auto finish = [&](int chunk) {
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
            const int i = tid + j * D::kThreads;
            if ((j + 1) * D::kThreads <= Load::kNumbers || i < Load::kNumbers) load.put(stage(chunk), i, held[j]);
        }
        if constexpr (kEach > kHeld) {
#pragma unroll 2
            for (int i = tid + kHeld * D::kThreads; i < Load::kNumbers; i += D::kThreads)
                load.put(stage(chunk), i, load.number(i, chunk * D::kChunk, left(chunk)));
        }
    };
    start(0);
    finish(0);
#pragma unroll 1
    for (int chunk = 0; chunk < D::kChunks; ++chunk) {
        copy_async_wait<0>();
        __syncthreads();
        if (chunk + 1 < D::kChunks) start(chunk + 1);
        take(stage(chunk), stage(chunk) + D::kChunk * D::kPlane, left(chunk));
        if (chunk + 1 < D::kChunks) finish(chunk + 1);
    }
}

// f(window, group, q, numbers [2][4]) for all of the block, from the parts [slice][q][2][unit] of the slices, in order.
template <typename D, typename F> MANN_INLINE void for_parts(const Four<T> *parts, F &&f) {
    __syncthreads();
    for (int at = int(threadIdx.x); at < 4 * D::kUnits; at += D::kThreads) {
        const int q = at % 4, unit = at / 4;
        T numbers[2][4] = {};
#pragma unroll 4
        for (int slice = 0; slice < D::kSlices; ++slice)
#pragma unroll
            for (int i = 0; i < 8; ++i)
                numbers[i / 4][i % 4] += parts[(slice * 8 + 2 * q + i / 4) * D::kUnits + unit][i % 4];
        f(unit % D::kWindows, unit / D::kWindows, q, numbers);
    }
}

// The convolution of a block, exactly in arithmetic type: f as for_parts has it.
template <typename D, typename Load, typename F> MANN_INLINE void convolve_exactly(T *shared, const Load &load, F &&f) {
    const int tid = int(threadIdx.x), unit = tid % D::kUnits, slice = tid / D::kUnits;
    const int window = unit % D::kWindows, group = unit / D::kWindows;
    const int pixel = window / D::kTileWidth * 2 * D::kRowStride + window % D::kTileWidth * 2;
    T sum[2][4][4] = {};
    in_chunks<D>(shared, load, [&](const T *images, const T *weights, int count) {
        if (slice >= D::kSlices) return;
#pragma unroll 1
        for (int c = slice; c < count; c += D::kSlices)
            add_channel<D>(sum, images + c * D::kPlane + pixel, weights + c * D::kWeights + 4 * group);
    });
    if constexpr (D::kSlices == 1) {
        if (tid >= D::kUnits) return;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            T numbers[2][4];
#pragma unroll
            for (int i = 0; i < 8; ++i) numbers[i / 4][i % 4] = sum[i / 4][q][i % 4];
            f(window, group, q, numbers);
        }
    } else {
        Four<T> *parts = reinterpret_cast<Four<T> *>(shared);
        __syncthreads();
        if (slice < D::kSlices) {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                parts[(slice * 8 + i) * D::kUnits + unit] = {
                    {sum[i % 2][i / 2][0], sum[i % 2][i / 2][1], sum[i % 2][i / 2][2], sum[i % 2][i / 2][3]}};
        }
        for_parts<D>(parts, f);
    }
}

// The same on tensor cores, operands in TF32: rows are the numbers of four groups, columns the pixels of four windows,
// the upper two of each in one product, the lower two in another; deep are eight channels under a tap.
template <typename D, typename Load, typename F>
MANN_INLINE void convolve_tensor(float *shared, const Load &load, F &&f) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, slice = warp / D::kWarps;
    const int row_tile = warp % D::kRowTiles, quad0 = warp / D::kRowTiles % D::kQuadGroups * D::kQuads;
    const int row = 16 * row_tile + lane / 4, channel = lane % 4;
    int pixel[D::kQuads]; // of this lane's column
#pragma unroll
    for (int i = 0; i < D::kQuads; ++i) {
        const int window = 4 * (quad0 + i) + lane / 8;
        const int place = window / D::kTileWidth * 2 * D::kRowStride + window % D::kTileWidth * 2 + lane / 4 % 2;
        pixel[i] = channel * D::kPlane + (window < D::kWindows ? place : 0);
    }
    float sum[D::kQuads][2][2][4] = {}; // [quad][vector][upper, lower]
    in_chunks<D>(shared, load, [&](const float *images, const float *weights, int count) {
        if (slice >= D::kSlices) return;
#pragma unroll 1
        for (int c = 8 * slice; c < count; c += 8 * D::kSlices) {
            const float *image = images + c * D::kPlane, *weight = weights + (c + channel) * D::kWeights + row;
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) {
                uint32_t a[2][4];
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    a[i / 4][i % 4] = __float_as_uint(
                        weight[(2 * tap + i / 4) * 4 * D::kTogether + i % 2 * 8 + i % 4 / 2 * 4 * D::kWeights]);
#pragma unroll
                for (int i = 0; i < 2 * D::kQuads; ++i) {
                    const float *at = image + pixel[i / 2] + (i % 2 + tap / kSide) * D::kRowStride + tap % kSide;
                    const uint32_t b[2] = {__float_as_uint(at[0]), __float_as_uint(at[4 * D::kPlane])};
                    mma_tf32(sum[i / 2][0][i % 2], a[0], b);
                    mma_tf32(sum[i / 2][1][i % 2], a[1], b);
                }
            }
        }
    });
    Four<float> *parts = reinterpret_cast<Four<float> *>(shared);
    if (D::kSlices > 1) __syncthreads();
#pragma unroll
    for (int i = 0; i < D::kQuads; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int window = 4 * (quad0 + i) + lane % 4, number = row + 8 * half, group = number / 4, q = number % 4;
            if (window >= D::kWindows || slice >= D::kSlices) continue;
            float numbers[2][4];
#pragma unroll
            for (int j = 0; j < 8; ++j) numbers[j / 4][j % 4] = sum[i][j / 4][j % 4 / 2][2 * half + j % 2];
            if constexpr (D::kSlices == 1) {
                f(window, group, q, numbers);
            } else {
#pragma unroll
                for (int v = 0; v < 2; ++v)
                    parts[(slice * 8 + 2 * q + v) * D::kUnits + window + D::kWindows * group] = {
                        {numbers[v][0], numbers[v][1], numbers[v][2], numbers[v][3]}};
            }
        }
    if constexpr (D::kSlices > 1) for_parts<D>(parts, f);
}

template <typename D, typename Load, typename F> MANN_INLINE void convolve(T *shared, const Load &load, F &&f) {
    if constexpr (D::kTensor) convolve_tensor<D>(shared, load, f);
    else convolve_exactly<D>(shared, load, f);
}

} // namespace mann::cuda
