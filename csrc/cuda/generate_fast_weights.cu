// MetaNet's m: gradient preprocessing and a network of two hidden layers at every coordinate, on tensor cores.
#include "coordinates.h"
#include "generate_fast_weights.h"

namespace mann::cuda {

constexpr GenerateSizes kSizes(D);
constexpr int kTiles = D <= 24 ? 2 : 1; // that a warp takes at once, forward: they share the loads of weights

// Of unit u of a part: (weight1[0], weight1[1], bias1, weight3). Units beyond D have zeros.
MANN_INLINE void fill_first(T *first, const GenerateWeights<S> &weights) {
    for (int u = threadIdx.x; u < 4 * kUnits; u += blockDim.x) {
        const S *const from[4] = {weights.weight1 + 2 * u, weights.weight1 + 2 * u + 1, weights.bias1 + u,
                                  weights.weight3 + u};
        S stored[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) stored[i] = load_if(u < D && (i < 3 || weights.weight3), from[i]);
#pragma unroll
        for (int i = 0; i < 4; ++i) first[4 * u + i] = to_arith(stored[i]);
    }
}

// Where the second layer's weight from an input (number i of `part`; beside the units, the constant 1) to a unit is.
MANN_INLINE const S *weight_of(const GenerateWeights<S> &weights, int unit, int part, int i) {
    const int from = part + 4 * i;
    if (unit >= D || i > kUnits || (i < kUnits ? from >= D : part != 0)) return nullptr;
    return i < kUnits ? weights.weight2 + unit * D + from : weights.bias2 + unit;
}
// Columns: units 2q, 2q + 1 of the four parts.
MANN_INLINE void fill_forward(T *operands, const GenerateWeights<S> &weights) {
    fill_operands<kPairs * kPairs>(
        operands,
        [&](int i, int row, int part, int e) {
            const int q = i / kPairs, p = i % kPairs;
            return weight_of(weights, row / 2 + 4 * (2 * q + row % 2), part, 2 * p + e);
        },
        unscaled);
}
// Columns: inputs 2p, 2p + 1 of the four parts.
MANN_INLINE void fill_backward(T *operands, const GenerateWeights<S> &weights) {
    fill_operands<kPairs * kPairs>(
        operands,
        [&](int i, int row, int part, int e) {
            const int p = i / kPairs, q = i % kPairs;
            return weight_of(weights, part + 4 * (2 * q + e), row / 2, 2 * p + row % 2);
        },
        unscaled);
}

MANN_INLINE T relu(T x) { return maximum(x, T(0)); }

// A tile's first hidden layer, as inputs of the second: coordinate r's unit i is hidden[i / 2][r + i % 2 * 2].
MANN_INLINE void first_layer(const T *first, const Lane &lane, const Features (&features)[2], T (&hidden)[kPairs][4]) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
        const Four<T> w = i < kUnits ? load_four(first + 4 * lane.unit(i)) : Four<T>{};
#pragma unroll
        for (int r = 0; r < 2; ++r)
            hidden[i / 2][r + i % 2 * 2] = i < kUnits
                                               ? relu(w[0] * features[r].magnitude + (w[1] * features[r].sign + w[2]))
                                               : T(i == kUnits && lane.part == 0);
    }
}

// result[q] of a product: coordinate r's columns 2q, 2q + 1 of the lane's part at [2r], [2r + 1].
template <int tiles>
MANN_INLINE void multiply_all(const T *operands, int lane, const Left (&left)[tiles][kPairs],
                              T (&result)[tiles][kPairs][4]) {
    Results<kPairs> results[tiles];
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
        Right w[kPairs];
#pragma unroll
        for (int q = 0; q < kPairs; ++q) w[q] = load_operand(operands, q * kPairs + p, lane);
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) results[tile].add(left[tile][p], w);
    }
#pragma unroll
    for (int i = 0; i < 4 * tiles * kPairs; ++i)
        result[i / 4 / kPairs][i / 4 % kPairs][i % 4] = results[i / 4 / kPairs].at(i / 4 % kPairs, i % 4);
}

MANN_KERNEL(generate_fast_weights_forward, kSizes.forward_threads, GenerateForward<S>) {
    MANN_DYNAMIC_SHARED(shared);
    T *operands = reinterpret_cast<T *>(shared), *first = operands + kSizes.fragments;
    fill_forward(operands, args.weights);
    fill_first(first, args.weights);
    const Lane lane;
    const Preprocessing preprocessing(args.p, args.scale);
    const T bias3 = to_arith(args.weights.bias3[0]);
    __syncthreads();
    const int groups = (args.count + kTile * kTiles - 1) / (kTile * kTiles), warps = blockDim.x / 32;
    T next[kTiles][2];
    const auto load = [&](int group) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const Coordinates there(group * kTiles + tile, lane, args.count);
            next[tile][0] = there.load(args.grads, 0), next[tile][1] = there.load(args.grads, 1);
        }
    };
    int group = threadIdx.x / 32 * gridDim.x + blockIdx.x;
    load(group);
    for (; group < groups; group += warps * gridDim.x) {
        Left left[kTiles][kPairs];
        Features features[kTiles][2];
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) features[i / 2][i % 2] = preprocessing.features(next[i / 2][i % 2]);
        load(group + warps * gridDim.x); // they take their time
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            T hidden[kPairs][4];
            first_layer(first, lane, features[tile], hidden);
            take_apart(hidden, left[tile]);
        }
        T second[kTiles][kPairs][4];
        multiply_all(operands, lane.lane, left, second);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            T sum[2] = {};
#pragma unroll
            for (int i = 0; i < kUnits; ++i) {
                const T w = load_shared(first + 4 * lane.unit(i) + 3);
#pragma unroll
                for (int r = 0; r < 2; ++r) sum[r] += w * relu(second[tile][i / 2][2 * r + i % 2]);
            }
            const Coordinates here(group * kTiles + tile, lane, args.count);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
                sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
                if (lane.part == 0 && here.there[r]) args.fast[here.at[r]] = to_storage<S>(sum[r] + bias3);
            }
        }
    }
}

MANN_KERNEL(generate_fast_weights_sides, kSizes.forward_threads, GenerateSides<S>) {
    MANN_DYNAMIC_SHARED(shared);
    T *operands = reinterpret_cast<T *>(shared), *first = operands + kSizes.fragments;
    if (args.hidden > 0) fill_forward(operands, args.weights), fill_first(first, args.weights);
    const Lane lane;
    const Preprocessing preprocessing(args.p, args.scale);
    __syncthreads();
    const int tiles = (args.count + kTile - 1) / kTile, warps = blockDim.x / 32;
    for (int tile = threadIdx.x / 32 * gridDim.x + blockIdx.x; tile < tiles; tile += warps * gridDim.x) {
        const Coordinates here(tile, lane, args.count);
        const T g[2] = {here.load(args.grads, 0), here.load(args.grads, 1)};
        const auto put = [&](int row, int r, bool passes) {
            if (here.there[r]) args.sides[int64_t(row) * args.count + here.at[r]] = passes;
        };
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (lane.part == 0)
                put(0, r, preprocessing.magnitude_passes(g[r])), put(1, r, preprocessing.sign_passes(g[r]));
        if (args.hidden == 0) continue;
        const Features features[2] = {preprocessing.features(g[0]), preprocessing.features(g[1])};
        T hidden[kPairs][4], second[1][kPairs][4];
        first_layer(first, lane, features, hidden);
        Left left[1][kPairs];
        take_apart(hidden, left[0]);
        multiply_all(operands, lane.lane, left, second);
#pragma unroll
        for (int i = 0; i < kUnits; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                if (lane.unit(i) < D) {
                    put(2 + lane.unit(i), r, !(hidden[i / 2][r + i % 2 * 2] <= 0));
                    put(2 + D + lane.unit(i), r, !(second[0][i / 2][2 * r + i % 2] <= 0));
                }
    }
}

// Of the second layer's weights, four units of each part at a time; of weight1 (two), bias1, weight3 for each unit, and
// of bias3.
using GradientSums = Sums<kSizes.groups, 4 * kUnits + 1, kSizes.sums_of_warps>;
static_assert(GradientSums::kNumbers == kSizes.sums && kSizes.pairs == kPairs);

// From what comes back to a tile's first hidden layer, [kPairs][4] as a product leaves it, to the gradients of weight1
// and bias1 and of the features.
MANN_INLINE void first_layer_back(const T *first, const Lane &lane, const T (&hidden)[kPairs][4],
                                  const T (&dhidden)[kPairs][4], const Features (&features)[2],
                                  Features (&dfeatures)[2], T *dfirst) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
        const Four<T> w = load_four(first + 4 * lane.unit(i));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const T d = hidden[i / 2][r + i % 2 * 2] <= 0 ? T(0) : dhidden[i / 2][2 * r + i % 2];
            dfirst[3 * i] += d * features[r].magnitude, dfirst[3 * i + 1] += d * features[r].sign;
            dfirst[3 * i + 2] += d;
            dfeatures[r].magnitude += d * w[0], dfeatures[r].sign += d * w[1];
        }
    }
}

MANN_KERNEL(generate_fast_weights_backward, kSizes.backward_threads, GenerateBackward<S>) {
    MANN_DYNAMIC_SHARED(shared);
    start_next();
    T *forward = reinterpret_cast<T *>(shared), *backward = forward + kSizes.fragments;
    T *first = backward + kSizes.fragments, *inputs = first + kSizes.first + threadIdx.x / 32 * kSizes.stage;
    T *stage = inputs + 128 * kPairs;
    fill_forward(forward, args.weights);
    fill_backward(backward, args.weights);
    fill_first(first, args.weights);
    const Lane lane;
    const Preprocessing preprocessing(args.p, args.scale);
    GradientSums sums(args.sums, lane);
    __syncthreads();
    const int tiles = (args.count + kTile - 1) / kTile, warps = blockDim.x / 32;
    T next_g[2], next_dfast[2];
    const auto load = [&](int tile) {
        const Coordinates there(tile, lane, args.count);
#pragma unroll
        for (int r = 0; r < 2; ++r) next_g[r] = there.load(args.grads, r), next_dfast[r] = there.load(args.dfast, r);
    };
    int tile = threadIdx.x / 32 * gridDim.x + blockIdx.x;
    load(tile);
    for (; tile < tiles; tile += warps * gridDim.x) {
        const Coordinates here(tile, lane, args.count);
        const T g[2] = {next_g[0], next_g[1]}, dfast[2] = {next_dfast[0], next_dfast[1]};
        load(tile + warps * gridDim.x); // they take their time
        const Features features[2] = {preprocessing.features(g[0]), preprocessing.features(g[1])};
        T hidden[kPairs][4];
        first_layer(first, lane, features, hidden);
        store_inputs(inputs, lane, hidden);
        // The second layer, and what comes back to it.
        T second[1][2 * kSizes.groups][4] = {};
        {
            Left left[1][kPairs];
            take_apart(hidden, left[0]);
            multiply_all(forward, lane.lane, left, reinterpret_cast<T(&)[1][kPairs][4]>(second));
        }
        Left left[1][kPairs];
#pragma unroll
        for (int i = 0; i < kInputs; ++i) {
            const T w = i < kUnits ? load_shared(first + 4 * lane.unit(i) + 3) : T(0);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                T &x = second[0][i / 2][2 * r + i % 2];
                if (i < kUnits) sums.beside[3 * kUnits + i] += dfast[r] * relu(x);
                x = x <= 0 ? T(0) : dfast[r] * w;
                left[0][i / 2].set(r + i % 2 * 2, x);
            }
        }
        sums.beside[4 * kUnits] += dfast[0] + dfast[1];
#pragma unroll
        for (int group = 0; group < kSizes.groups; ++group)
            stage_results(stage + group * 256, lane, reinterpret_cast<const T(&)[2][4]>(second[0][2 * group]));
        __syncwarp(); // all that is staged is there
        // To the first layer, and to the gradient.
        T dhidden[1][kPairs][4];
        multiply_all(backward, lane.lane, left, dhidden);
        Features dfeatures[2] = {};
        first_layer_back(first, lane, hidden, dhidden[0], features, dfeatures, sums.beside);
        store_dgrads(args.dgrads, here, lane, preprocessing, g, dfeatures);
        // The gradients of the second layer's weights, products over the coordinates of the tile.
        Right columns[kPairs][2];
        load_columns(inputs, lane, columns);
#pragma unroll
        for (int group = 0; group < kSizes.groups; ++group) {
            Left rows[2];
            load_rows(stage + group * 256, lane, rows);
            T more[kPairs][4] = {};
            multiply_each(more, rows, columns);
#pragma unroll
            for (int p = 0; p < kPairs; ++p) sums.add(group, p, more[p]);
        }
        sums.first = false;
        __syncwarp(); // nobody reads it any more
    }
    finish_sums(sums, lane, forward, args.sums);
}

// The parts added up, and each sum put where it belongs.
MANN_KERNEL(generate_fast_weights_total, kSumThreads, GenerateTotal<S>) {
    wait_for_previous();
    const int i = blockIdx.x * 32 + threadIdx.x % 32;
    const T sum = sum_of_parts(args.sums, args.parts, kSizes.sums, i);
    if (threadIdx.x >= 32 || i >= kSizes.sums) return;
    const int row = i % 32 / 4, part = i % 4, number = i / 32;
    const S x = to_storage<S>(sum);
    if (number < GradientSums::kOfGroups) {
        const int e = number % 4, p = number / 4 % kPairs, group = number / 4 / kPairs;
        const int unit = row / 2 + 4 * (4 * group + 2 * (row % 2) + e / 2), input = 2 * p + e % 2;
        if (unit >= D) return;
        if (input < kUnits && part + 4 * input < D) args.dweight2[unit * D + part + 4 * input] = x;
        if (input == kUnits && part == 0) args.dbias2[unit] = x;
    } else if (row == 0) {
        const int other = number - GradientSums::kOfGroups, of_first = other / 3, of_third = other - 3 * kUnits;
        if (other < 3 * kUnits) {
            const int unit = part + 4 * of_first;
            if (unit < D && other % 3 < 2) args.dweight1[2 * unit + other % 3] = x;
            if (unit < D && other % 3 == 2) args.dbias1[unit] = x;
        } else if (of_third < kUnits) {
            if (part + 4 * of_third < D) args.dweight3[part + 4 * of_third] = x;
        } else if (part == 0) {
            args.dbias3[0] = x;
        }
    }
}

} // namespace mann::cuda
