// augmented_linear, backward.
#include "augmented_linear_tile.h"

namespace mann::cuda {

// Before the activation of one side: 0 the slow, 1 the fast; zero where it does not exist.
MANN_INLINE T gradient_of(const LinearBackward<S> &a, int64_t at, int side, bool exists) {
    const T dy = to_arith(load_if(exists, a.dy + at));
    const T slope = load_if(exists && a.slopes, a.slopes + side * a.layer.G * a.layer.L * kO + at);
    return a.slopes ? dy * slope : dy;
}

// Each warp's sums of 4 numbers, to sums[warp][4].
MANN_INLINE void sum_warp(T (&numbers)[4], T *sums) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        for (int distance = 16; distance > 0; distance /= 2)
            numbers[i] += __shfl_xor_sync(0xffffffffu, numbers[i], distance);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32 * 4 + i] = numbers[i];
    }
}

// dx = dslow W + sum_s mix_s dfast F_s, and this tile's share of dmix_s = <dfast F_s, x>: block (task, tile of its
// examples and of inputs).
MANN_INLINE void gradient_of_x(const LinearBackward<S> &a, T *shared) {
    const AugmentedLayer<S> &layer = a.layer;
    constexpr int kTilesI = (kI + Tile::kColumns - 1) / Tile::kColumns, kWarps = kLinearThreads / 32;
    constexpr int kWarpsOfRow = kWarps / Tile::kRowGroups; // of four rows
    const int64_t tiles_l = (layer.L + Tile::kRows - 1) / Tile::kRows, block = blockIdx.x / kTilesI;
    const int64_t g = block / tiles_l, l0 = block % tiles_l * Tile::kRows, examples = layer.G * layer.L;
    const int tile = int(blockIdx.x % kTilesI), i0 = tile * Tile::kColumns, tid = int(threadIdx.x);
    T *rows = shared, *columns = rows + 2 * Tile::kA, *shares = columns + Tile::kWeights * Tile::kB;
    T *dots = shares + Tile::kWeights * Tile::kRows; // [weight][warp][4]
    const Place place;
    T dx[1][4][4] = {}, x[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const int64_t l = l0 + place.row + i / 4;
        const int column = i0 + place.column + i % 4;
        x[i / 4][i % 4] =
            to_arith(load_if(a.dots && l < layer.L && column < kI, layer.x + (g * layer.L + l) * kI + column));
    }
    for (int o0 = 0; o0 < kO; o0 += kLinearDepth)
        for (int64_t s0 = 0; s0 <= layer.rows; s0 += Tile::kWeights) {
            const int count = int(layer.rows + 1 - s0 < Tile::kWeights ? layer.rows + 1 - s0 : Tile::kWeights);
            __syncthreads();
            copy_weights<false>(layer, g, s0, count, columns, [&](T *target, const S *weight, int k, int i) {
                copy_number(target, weight + int64_t(o0 + k) * kI + i0 + i, o0 + k < kO && i0 + i < kI);
            });
            copy_async_commit();
            if (s0 == 0) {
#pragma unroll
                for (int side = 0; side < 2; ++side)
                    for_operand<true, Tile::kRows>([&](int k, int l) {
                        rows[side * Tile::kA + k * Tile::kRowStride + l] =
                            gradient_of(a, (g * layer.L + l0 + l) * kO + o0 + k, side, l0 + l < layer.L && o0 + k < kO);
                    });
            }
            load_shares(layer, g, l0, s0, count, shares);
            copy_async_wait<0>();
            __syncthreads();
            for (int s = 0; s < count; ++s) {
                T product[4][4] = {}, dot[4] = {};
                add_product(product, place, rows + (s0 + s == 0 ? 0 : Tile::kA), columns + s * Tile::kB);
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    dx[0][i / 4][i % 4] += shares[s * Tile::kRows + place.row + i / 4] * product[i / 4][i % 4];
                    dot[i / 4] += product[i / 4][i % 4] * x[i / 4][i % 4];
                }
                if (a.dots) sum_warp(dot, dots + s * kWarps * 4);
            }
            if (!a.dots) continue;
            __syncthreads();
            for (int at = tid; at < count * Tile::kRows; at += kLinearThreads) {
                const int s = at / Tile::kRows, l = at % Tile::kRows;
                if (s0 + s == 0 || l0 + l >= layer.L) continue;
                T sum = 0;
                for (int w = 0; w < kWarpsOfRow; ++w) sum += dots[(s * kWarps + l / 4 * kWarpsOfRow + w) * 4 + l % 4];
                T &part = a.dots[((tile * examples + g * layer.L + l0 + l) * layer.rows) + s0 + s - 1];
                part = o0 == 0 ? sum : part + sum;
            }
        }
    for_sums(dx, shared, [&](int l, int i, const T(&numbers)[1]) {
        if (l0 + l < layer.L && i0 + i < kI) a.dx[(g * layer.L + l0 + l) * kI + i0 + i] = to_storage<S>(numbers[0]);
    });
}

// dweight = dslow^T x over all examples, and dbias; dfast_s = (mix_s dfast)^T x over those of a task: block (weight,
// tile of outputs and of inputs).
MANN_INLINE void gradient_of_weight(const LinearBackward<S> &a, int64_t block, T *shared) {
    const AugmentedLayer<S> &layer = a.layer;
    constexpr int kTilesI = (kI + Tile::kColumns - 1) / Tile::kColumns, kTilesO = (kO + Tile::kRows - 1) / Tile::kRows;
    const int64_t number = block / (kTilesI * kTilesO), row = number - 1; // 0 the slow one
    const bool is_slow = number == 0;
    const int i0 = int(block % kTilesI) * Tile::kColumns, o0 = int(block / kTilesI % kTilesO) * Tile::kRows;
    const int64_t g = is_slow ? 0 : row / layer.rows, s = is_slow ? 0 : 1 + row % layer.rows;
    const int64_t first = g * layer.L, examples = is_slow ? layer.G * layer.L : layer.L;
    const int tid = int(threadIdx.x);
    T *rows = shared, *columns = rows + Tile::kA;
    const Place place;
    T sum[1][4][4] = {}, bias = 0;
    for (int64_t l0 = 0; l0 < examples; l0 += kLinearDepth) {
        __syncthreads();
        for_operand<false, Tile::kColumns>([&](int k, int i) {
            copy_number(columns + k * Tile::kColumnStride + i, layer.x + (first + l0 + k) * kI + i0 + i,
                        l0 + k < examples && i0 + i < kI);
        });
        copy_async_commit();
        for_operand<false, Tile::kRows>([&](int k, int o) {
            const bool exists = l0 + k < examples && o0 + o < kO;
            const T share = share_of(layer, first + l0 + k, s, exists);
            rows[k * Tile::kRowStride + o] =
                gradient_of(a, (first + l0 + k) * kO + o0 + o, is_slow ? 0 : 1, exists) * share;
        });
        copy_async_wait<0>();
        __syncthreads();
        add_product(sum[0], place, rows, columns);
        if (is_slow && i0 == 0 && tid < Tile::kRows) {
#pragma unroll 8
            for (int k = 0; k < kLinearDepth; ++k) bias += rows[k * Tile::kRowStride + tid];
        }
    }
    S *target = is_slow ? a.dweight : a.dfast + row * (int64_t(kO) * kI);
    if (is_slow && i0 == 0 && tid < Tile::kRows && o0 + tid < kO) a.dbias[o0 + tid] = to_storage<S>(bias);
    for_sums(sum, shared, [&](int o, int i, const T(&numbers)[1]) {
        if (o0 + o < kO && i0 + i < kI) target[int64_t(o0 + o) * kI + i0 + i] = to_storage<S>(numbers[0]);
    });
}

} // namespace mann::cuda

using namespace mann::cuda;

MANN_KERNEL(augmented_linear_backward, MANN_BOUNDS(kLinearThreads, 1), LinearBackward<S>) {
    MANN_DYNAMIC_SHARED(shared);
    start_next();
    if (blockIdx.x < args.x_blocks) gradient_of_x(args, reinterpret_cast<T *>(shared));
    else gradient_of_weight(args, blockIdx.x - args.x_blocks, reinterpret_cast<T *>(shared));
}

// dmix: the sum of its parts, a thread for each number.
MANN_KERNEL(augmented_linear_backward_mix, kLinearThreads, LinearMix<S>) {
    const int64_t at = int64_t(blockIdx.x) * kLinearThreads + threadIdx.x;
    wait_for_previous();
    if (at >= args.count) return;
    const T sum = sum_of<4>(0, int(args.parts), 1, [&](int part) { return args.dots + part * args.count + at; });
    args.dmix[at] = to_storage<S>(sum);
}
