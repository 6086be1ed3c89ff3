// MetaNet's d: gradient preprocessing and an LSTM over the support gradients at every coordinate, on tensor cores.
#include "coordinates.h"
#include "summarize_gradients.h"

namespace mann::cuda {

constexpr SummarizeSizes kSizes(D);
constexpr bool kInShared = MANN_STATES_IN_SHARED; // the states of all steps
constexpr int kStateX = 64 * kInputs;             // of a state, the inputs; then c
// A warp of the forward pass takes so many tiles at once: they share the loads of weights.
constexpr int kTiles = D <= 24 ? 2 : 1;

// What a part has beside its units: 1, the features, nothing. Infinity becomes so much that it is the same behind a
// gate.
MANN_INLINE T beside(const Features &features, int part) {
    return part == 0 ? T(1) : part == 1 ? minimum(features.magnitude, T(1e30)) : part == 2 ? features.sign : T(0);
}
MANN_INLINE Features features_of(T beside, int part) { return {part == 1 ? beside : T(0), part == 2 ? beside : T(0)}; }

// Where the weight of an input (number i of `part`) in a gate of a unit is. Units beyond D have none: their state stays
// zero.
MANN_INLINE const S *weight_of(const SummarizeWeights<S> &weights, int gate, int unit, int part, int i) {
    const int row = gate * D + unit, from = part + 4 * i;
    if (unit >= D || i > kUnits || (i < kUnits ? from >= D : part == 3)) return nullptr;
    return i < kUnits  ? weights.weight_hh + row * D + from
           : part == 0 ? weights.bias + row
                       : weights.weight_ih + 2 * row + part - 1;
}

// Sigmoids are of 1 / (1 + 2^x): their weights are by -log2 e larger. Columns: gates 2s, 2s + 1 of four units.
MANN_INLINE void fill_forward(T *operands, const SummarizeWeights<S> &weights) {
    const auto gate = [](int i, int row) { return i / kPairs % 2 * 2 + row % 2; };
    fill_operands<2 * kUnits * kPairs>(
        operands,
        [&](int i, int row, int part, int e) {
            return weight_of(weights, gate(i, row), 4 * (i / kPairs / 2) + row / 2, part, 2 * (i % kPairs) + e);
        },
        [&](int i, int row) { return gate(i, row) == 2 ? T(1) : T(-1.4426950408889634); });
}
// Columns: inputs 2p, 2p + 1 of the four parts.
MANN_INLINE void fill_backward(T *operands, const SummarizeWeights<S> &weights) {
    fill_operands<2 * kUnits * kPairs>(
        operands,
        [&](int i, int row, int part, int e) {
            const int p = i % kPairs, s = i / kPairs % 2, j = i / kPairs / 2;
            return weight_of(weights, 2 * s + e, 4 * j + part, row / 2, 2 * p + row % 2);
        },
        unscaled);
}

// Operand i of those, for gates 2s and 2s + 1. Where weights are not apart it is taken from the operands of
// fill_forward, which has the same numbers in other places, the sigmoids' times -log2 e.
MANN_INLINE Right load_backward(const T *operands, int i, int s, const Lane &lane) {
    if constexpr (kApart) {
        return load_operand(operands + kSizes.fragments, i, lane.lane);
    } else {
        Right b;
        const T *at = operands + (i * 32 + 8 * lane.part + lane.row / 2) * kFragment + lane.row % 2;
#pragma unroll
        for (int e = 0; e < 2; ++e)
            b.set(e, load_shared(at + 4 * kFragment * e) * (2 * s + e == 2 ? T(1) : T(-0.6931471805599453)));
        return b;
    }
}

// tanh x as a fraction, to 2e-8 of it and what rounding adds; NaN passes.
template <typename X> struct Fraction {
    X above, below;
};
MANN_INLINE Fraction<float> hyperbolic_tangent_fraction(float x) {
    x = minimum(maximum(x, -9.0f), 9.0f);
    const float y = x * x;
    const float above = (((1.33544496e-8f * y + 2.06089254e-5f) * y + 3.49557854e-3f) * y + 1.33810176e-1f) * y + 1;
    const float below = (((7.77647020e-7f * y + 3.28561915e-4f) * y + 2.58769458e-2f) * y + 4.67143332e-1f) * y + 1;
    return {x * above, below};
}
MANN_INLINE Fraction<double> hyperbolic_tangent_fraction(double x) { return {tanh(x), 1}; }

// The gates of unit j of every part, before their activations; sigmoids' times -log2 e.
template <int tiles>
MANN_INLINE void gates_of(const T *operands, int j, int lane, const Left (&x)[tiles][kPairs], T (&gate)[tiles][2][4]) {
    Right w[2][kPairs];
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int p = 0; p < kPairs; ++p) w[s][p] = load_operand(operands, (2 * j + s) * kPairs + p, lane);
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 8; ++i) gate[tile][i / 4][i % 4] = 0;
        multiply_each(gate[tile], x[tile], w);
    }
}

// A lane's part of the state of a tile: inputs of the next step, which begin with h, as left operands; and c.
struct State {
    T x[kPairs][4], c[2][kUnits];

    MANN_INLINE T &input(int r, int i) { return x[i / 2][r + i % 2 * 2]; } // of coordinate r
    MANN_INLINE void clear() {
#pragma unroll
        for (int i = 0; i < 4 * kPairs; ++i) x[i / 4][i % 4] = 0;
#pragma unroll
        for (int i = 0; i < 2 * kUnits; ++i) c[i % 2][i / 2] = 0;
    }
};

// A step of the LSTM: from the inputs x and c to h, in their place, and c.
template <int tiles> MANN_INLINE void step(const T *operands, int lane, State (&state)[tiles]) {
    Left x[tiles][kPairs];
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) take_apart(state[tile].x, x[tile]);
#pragma unroll(kUnroll)
    for (int j = 0; j < kUnits; ++j) {
        T gate[tiles][2][4];
        gates_of(operands, j, lane, x, gate);
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const T in = fast_exponential2(gate[tile][0][2 * r]), out = fast_exponential2(gate[tile][1][2 * r + 1]);
                const T forget = fast_reciprocal(1 + fast_exponential2(gate[tile][0][2 * r + 1]));
                const auto cell = hyperbolic_tangent_fraction(gate[tile][1][2 * r]);
                T &c = state[tile].c[r][j];
                c = forget * c + cell.above * fast_reciprocal(in * cell.below + cell.below);
                const auto squashed = hyperbolic_tangent_fraction(c);
                state[tile].input(r, j) = squashed.above * fast_reciprocal(out * squashed.below + squashed.below);
            }
    }
}

MANN_INLINE void load_weight_out(const SummarizeWeights<S> &weights, const Lane &lane, T (&weight_out)[kUnits]) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i)
        weight_out[i] = lane.unit(i) < D ? to_arith(weights.weight_out[lane.unit(i)]) : T(0);
}

MANN_KERNEL(summarize_gradients_forward, kSizes.forward_threads, SummarizeForward<S>) {
    MANN_DYNAMIC_SHARED(shared);
    T *operands = reinterpret_cast<T *>(shared);
    fill_forward(operands, args.weights);
    const Lane lane;
    const Preprocessing preprocessing(args.p, args.scale);
    __syncthreads();
    const int groups = (args.count + kTile * kTiles - 1) / (kTile * kTiles), warps = blockDim.x / 32;
    for (int group = threadIdx.x / 32 * gridDim.x + blockIdx.x; group < groups; group += warps * gridDim.x) {
        State state[kTiles];
        T next[kTiles][2];
        const auto load = [&](const S *grads) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    next[tile][r] = Coordinates(group * kTiles + tile, lane, args.count).load(grads, r);
        };
        load(args.grads);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) state[tile].clear();
#pragma unroll 1
        for (int t = 0; t < args.steps; ++t) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    state[tile].input(r, kUnits) = beside(preprocessing.features(next[tile][r]), lane.part);
            if (t + 1 < args.steps) load(args.grads + int64_t(t + 1) * args.count);
            step(operands, lane.lane, state);
        }
        T weight_out[kUnits];
        load_weight_out(args.weights, lane, weight_out);
        const T bias_out = to_arith(args.weights.bias_out[0]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const Coordinates here(group * kTiles + tile, lane, args.count);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                T sum = 0;
#pragma unroll
                for (int i = 0; i < kUnits; ++i) sum += weight_out[i] * state[tile].input(r, i);
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                if (lane.part == 0 && here.there[r]) args.fast[here.at[r]] = to_storage<S>(sum + bias_out);
            }
        }
    }
}

// A state in shared or global memory: the inputs, then c.
MANN_INLINE Two<T> *c_of(T *state, const Lane &lane, int j) {
    return reinterpret_cast<Two<T> *>(state + kStateX + (lane.lane * kUnits + j) * 2);
}
MANN_INLINE void store(T *to, const Lane &lane, const State &state) {
    store_inputs(to, lane, state.x);
#pragma unroll
    for (int i = 0; i < kUnits; ++i) *c_of(to, lane, i) = {{state.c[0][i], state.c[1][i]}};
}

// Of the gates' weights, the four gates of unit j in each part at a time; of weight_out and of bias_out.
using GradientSums = Sums<kUnits, kUnits + 1, kSizes.sums_of_warps>;
static_assert(GradientSums::kNumbers == kSizes.sums);

// What a step back needs of a tile.
struct Back {
    T dh[2][kInputs], dc[2][kUnits]; // dh: of the step's output; after it, of all its inputs
};

// One unit of each part, a step back: gates and c again, their gradients, and dc of before the step. c becomes the h of
// after the step.
MANN_INLINE void unit_back(const T (&gate)[2][4], Two<T> &c, int j, Back &back, T (&dgate)[2][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        // 2^100 is enough, and times another such still a number
        const T in = 1 + fast_exponential2(minimum(gate[0][2 * r], T(100)));
        const T out = 1 + fast_exponential2(minimum(gate[1][2 * r + 1], T(100)));
        const T forget = fast_reciprocal(1 + fast_exponential2(gate[0][2 * r + 1]));
        const auto cell = hyperbolic_tangent_fraction(gate[1][2 * r]);
        const T in_and_cell = fast_reciprocal(in * cell.below);
        const T gate_in = cell.below * in_and_cell, candidate = cell.above * (in * in_and_cell);
        const auto squashed = hyperbolic_tangent_fraction(forget * c.at[r] + gate_in * candidate);
        const T out_and_squashed = fast_reciprocal(out * squashed.below);
        const T gate_out = squashed.below * out_and_squashed, bounded = squashed.above * (out * out_and_squashed);
        const auto grad =
            lstm_cell_backward(gate_in, forget, candidate, gate_out, c.at[r], bounded, back.dh[r][j], back.dc[r][j]);
        dgate[0][2 * r] = grad.gate_in, dgate[0][2 * r + 1] = grad.gate_forget;
        dgate[1][2 * r] = grad.cell, dgate[1][2 * r + 1] = grad.gate_out;
        back.dc[r][j] = grad.c;
        c.at[r] = gate_out * bounded;
    }
}

// Some units of each part from j on, a step back of a tile: from their state before the step to dc, what they add to
// the gradients dx of the inputs, and the gates' gradients to `stage`. The state's c becomes the h of after the step.
template <int units>
MANN_INLINE void units_back(const T *operands, T *stage, const Lane &lane, T *before, int j, const Left (&x)[kPairs],
                            Back &back, T (&dx)[kPairs][4]) {
    Results<2 * units> gates;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
        Right w[2 * units];
#pragma unroll
        for (int k = 0; k < 2 * units; ++k) w[k] = load_operand(operands, (2 * j + k) * kPairs + p, lane.lane);
        gates.add(x[p], w);
    }
    Results<kPairs> more;
#pragma unroll
    for (int u = 0; u < units; ++u) {
        T gate[2][4], dgate[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) gate[i / 4][i % 4] = gates.at(2 * u + i / 4, i % 4);
        Two<T> *c = c_of(before, lane, j + u), found = *c;
        unit_back(gate, found, j + u, back, dgate);
        *c = found;
        stage_results(stage + (j + u) * 256, lane, dgate);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            Left left;
#pragma unroll
            for (int i = 0; i < 4; ++i) left.set(i, dgate[s][i % 2 * 2 + i / 2]);
            Right w[kPairs];
#pragma unroll
            for (int p = 0; p < kPairs; ++p) w[p] = load_backward(operands, (2 * (j + u) + s) * kPairs + p, s, lane);
            more.add(left, w);
        }
    }
#pragma unroll
    for (int i = 0; i < 4 * kPairs; ++i) dx[i / 4][i % 4] += more.at(i / 4, i % 4);
}

// A step back of a tile: dh and dc, and what units_back says.
MANN_INLINE void step_back(const T *operands, T *stage, const Lane &lane, T *before, Back &back) {
    Left x[kPairs];
    load_inputs(before, lane, x);
    T dx[kPairs][4] = {};
    constexpr int kGroup = kUnroll == 1 ? 1 : 2; // so many that a warp has enough to do
#pragma unroll(kUnroll)
    for (int j = 0; j + kGroup <= kUnits; j += kGroup)
        units_back<kGroup>(operands, stage, lane, before, j, x, back, dx);
    if constexpr (kUnits % kGroup != 0) units_back<1>(operands, stage, lane, before, kUnits - 1, x, back, dx);
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
#pragma unroll
        for (int i = 0; i < 4; ++i) back.dh[i / 2][2 * p + i % 2] = dx[p][i];
}

// The gradients of the gates' weights, products over the coordinates of the tile.
MANN_INLINE void add_weight_gradients(const T *stage, const Lane &lane, const T *before, GradientSums &sums) {
    Right columns[kPairs][2];
    load_columns(before, lane, columns);
#pragma unroll(kUnroll)
    for (int j = 0; j < kUnits; ++j) {
        Left gates[2];
        load_rows(stage + j * 256, lane, gates);
        T more[kPairs][4] = {};
        multiply_each(more, gates, columns);
#pragma unroll
        for (int p = 0; p < kPairs; ++p) sums.add(j, p, more[p]);
    }
}

MANN_KERNEL(summarize_gradients_backward, kSizes.backward_threads, SummarizeBackward<S>) {
    MANN_DYNAMIC_SHARED(shared);
    start_next();
    T *operands = reinterpret_cast<T *>(shared), *stages = operands + kSizes.both;
    fill_forward(operands, args.weights);
    if constexpr (kApart) fill_backward(operands + kSizes.fragments, args.weights);
    const Lane lane;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int64_t of_grid = int64_t(blockIdx.x) * warps + warp, of_states = int64_t(args.steps) * kSizes.state;
    T *stage = stages + warp * kSizes.stage;
    T *states = kInShared ? stages + warps * kSizes.stage + warp * of_states : args.states + of_grid * of_states;
    const Preprocessing preprocessing(args.p, args.scale);
    GradientSums sums(args.sums, lane);
    __syncthreads();
    const int tiles = (args.count + kTile - 1) / kTile;
    for (int tile = warp * gridDim.x + blockIdx.x; tile < tiles; tile += warps * gridDim.x) {
        const Coordinates here(tile, lane, args.count);
        const auto gradient = [&](int t, int r) { return here.load(args.grads + int64_t(t) * args.count, r); };
        Back back;
        {
            State state[1];
            state[0].clear();
            T next[2] = {gradient(0, 0), gradient(0, 1)};
#pragma unroll 1
            for (int t = 0;; ++t) {
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    state[0].input(r, kUnits) = beside(preprocessing.features(next[r]), lane.part);
                store(states + int64_t(t) * kSizes.state, lane, state[0]);
                if (t + 1 == args.steps) break;
                next[0] = gradient(t + 1, 0), next[1] = gradient(t + 1, 1);
                step(operands, lane.lane, state);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const T dfast = here.load(args.dfast, r);
            sums.beside[kUnits] += dfast;
#pragma unroll
            for (int i = 0; i < kUnits; ++i) {
                back.dh[r][i] = lane.unit(i) < D ? dfast * to_arith(args.weights.weight_out[lane.unit(i)]) : T(0);
                back.dc[r][i] = 0;
            }
        }
        __syncwarp(); // the states are there, for other lanes too
#pragma unroll 1
        for (int t = args.steps - 1; t >= 0; --t) {
            T *before = states + int64_t(t) * kSizes.state;
            step_back(operands, stage, lane, before, back);
            if (t + 1 == args.steps) {
                const T dfast[2] = {here.load(args.dfast, 0), here.load(args.dfast, 1)};
#pragma unroll
                for (int j = 0; j < kUnits; ++j) {
                    const Two<T> h = *c_of(before, lane, j);
                    sums.beside[j] += dfast[0] * h.at[0] + dfast[1] * h.at[1];
                }
            }
            const T g[2] = {gradient(t, 0), gradient(t, 1)};
            __syncwarp(); // what is staged is there
            add_weight_gradients(stage, lane, before, sums);
            __syncwarp(); // nobody reads it any more
            const Features d[2] = {features_of(back.dh[0][kUnits], lane.part),
                                   features_of(back.dh[1][kUnits], lane.part)};
            store_dgrads(args.dgrads + int64_t(t) * args.count, here, lane, preprocessing, g, d);
            sums.first = false;
        }
    }
    finish_sums(sums, lane, operands, args.sums);
}

// The parts added up, and each sum put where it belongs.
MANN_KERNEL(summarize_gradients_total, kSumThreads, SummarizeTotal<S>) {
    wait_for_previous();
    const int i = blockIdx.x * 32 + threadIdx.x % 32;
    const T sum = sum_of_parts(args.sums, args.parts, kSizes.sums, i);
    if (threadIdx.x >= 32 || i >= kSizes.sums) return;
    const int row = i % 32 / 4, part = i % 4, of_gates = 4 * kPairs * kUnits * 32;
    if (i < of_gates) {
        const int e = i / 32 % 4, p = i / 128 % kPairs, j = i / 128 / kPairs;
        const int unit = 4 * j + row / 2, at = (2 * (row % 2) + e / 2) * D + unit, input = 2 * p + e % 2;
        if (unit >= D) return;
        if (input < kUnits) {
            if (part + 4 * input < D) args.dweight_hh[at * D + part + 4 * input] = to_storage<S>(sum);
        } else if (input == kUnits && part < 3) {
            if (part == 0) args.dbias[at] = to_storage<S>(sum);
            else args.dweight_ih[2 * at + part - 1] = to_storage<S>(sum);
        }
    } else if (row == 0) {
        const int j = (i - of_gates) / 32;
        if (j < kUnits && part + 4 * j < D) args.dweight_out[part + 4 * j] = to_storage<S>(sum);
        if (j == kUnits && part == 0) args.dbias_out[0] = to_storage<S>(sum);
    }
}

} // namespace mann::cuda
