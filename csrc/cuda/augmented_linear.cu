// augmented_linear, forward: products with the slow weight and with every row of the memory, mixed where they are made.
#include "activations.h"
#include "augmented_linear_tile.h"

namespace mann::cuda {

// Block (task, tile of its examples and of outputs).
MANN_INLINE void multiply_examples(const LinearForward<S> &a, T *shared) {
    const AugmentedLayer<S> &layer = a.layer;
    constexpr int kTilesO = (kO + Tile::kColumns - 1) / Tile::kColumns;
    const int64_t tiles_l = (layer.L + Tile::kRows - 1) / Tile::kRows, block = blockIdx.x / kTilesO;
    const int64_t g = block / tiles_l, l0 = block % tiles_l * Tile::kRows;
    const int o0 = int(blockIdx.x % kTilesO) * Tile::kColumns;
    T *rows = shared, *columns = rows + Tile::kA, *shares = columns + Tile::kWeights * Tile::kB;
    const Place place;
    T sums[2][4][4] = {}; // slow and fast
    for (int i0 = 0; i0 < kI; i0 += kLinearDepth)
        for (int64_t s0 = 0; s0 <= layer.rows; s0 += Tile::kWeights) {
            const int count = int(layer.rows + 1 - s0 < Tile::kWeights ? layer.rows + 1 - s0 : Tile::kWeights);
            __syncthreads();
            if (s0 == 0)
                for_operand<true, Tile::kRows>([&](int k, int l) {
                    copy_number(rows + k * Tile::kRowStride + l, layer.x + (g * layer.L + l0 + l) * kI + i0 + k,
                                l0 + l < layer.L && i0 + k < kI);
                });
            copy_weights<true>(layer, g, s0, count, columns, [&](T *target, const S *weight, int k, int o) {
                copy_number(target, weight + int64_t(o0 + o) * kI + i0 + k, o0 + o < kO && i0 + k < kI);
            });
            copy_async_commit();
            load_shares(layer, g, l0, s0, count, shares);
            copy_async_wait<0>();
            __syncthreads();
            for (int s = 0; s < count; ++s) {
                T product[4][4] = {};
                add_product(product, place, rows, columns + s * Tile::kB);
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    const T part = product[i / 4][i % 4];
                    if (s0 + s == 0) sums[0][i / 4][i % 4] += part;
                    else sums[1][i / 4][i % 4] += shares[s * Tile::kRows + place.row + i / 4] * part;
                }
            }
        }
    for_sums(sums, shared, [&](int l, int o, const T(&numbers)[2]) {
        if (l0 + l >= layer.L || o0 + o >= kO) return;
        const int64_t at = (g * layer.L + l0 + l) * kO + o0 + o;
        const auto slow = activate<MANN_ACTIVATION>(numbers[0] + (a.bias ? to_arith(a.bias[o0 + o]) : T(0)));
        const auto fast = activate<MANN_ACTIVATION>(numbers[1]);
        a.y[at] = to_storage<S>(slow.value + fast.value);
        if (a.slopes) a.slopes[at] = slow.slope, a.slopes[layer.G * layer.L * kO + at] = fast.slope;
    });
}

} // namespace mann::cuda

using namespace mann::cuda;

MANN_KERNEL(augmented_linear, kLinearThreads, LinearForward<S>) {
    MANN_DYNAMIC_SHARED(shared);
    multiply_examples(args, reinterpret_cast<T *>(shared));
}
