// What the kernels share that put every coordinate of a gradient through one small network, on tensor cores.
//
// A warp takes tiles of 16 coordinates. Its lane 4 * row + part holds the coordinates `row` and `row + 8`, and of each
// the hidden units part, part + 4, ..., one input beside them (the constant 1 or a feature of the gradient) and, where
// that makes an odd number, nothing: kInputs numbers. Four parts have 4 * kInputs. That is how a product of matrices
// leaves its result in registers; with the inner index in another order it is also how the next product wants its left
// operand. So layers follow layers, and steps follow steps, in registers. Shared memory holds the right operands, the
// weights; and where coordinates are summed over, it turns coordinates into the inner index.
//
// A float32 product is three passes of TF32 over two parts of each number, small ones first. What is lost is about
// 2^-23 of each term. A tensor core's own sums round toward zero: long ones are made outside, of short ones.
#pragma once

#include "device.h"

namespace mann::cuda {

using S = MANN_STORAGE;
using T = Arith<S>;

constexpr int D = MANN_D;                     // hidden units
constexpr int kUnits = (D + 3) / 4;           // of a part
constexpr int kInputs = (kUnits + 2) / 2 * 2; // of a part
constexpr int kPairs = kInputs / 2;           // products along all inputs: each takes two of every part
constexpr int kTile = 16;                     // coordinates of a warp
constexpr int kPasses = sizeof(S) == 4 ? 3 : 1;
// Weights lie in shared memory with their parts apart, where that is not too much.
constexpr bool kApart = D <= 32;
constexpr int kFragment = kApart ? 4 : 2; // numbers of a lane
// Loops over the units of a part, unrolled unless they are long.
constexpr int kUnroll = kUnits <= 8 ? kUnits : 1;

// x = big + small, to the bits that a tensor core takes of both.
MANN_INLINE void take_apart(float x, float &big, float &small) {
    big = __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xFFFFE000u); // to the nearest
    small = x - big;
}
MANN_INLINE void take_apart(double x, double &big, double &small) { big = x, small = 0; }

// A lane's share of a matrix that is multiplied.
template <int n> struct Operand {
    T big[n], small[n];

    MANN_INLINE void set(int i, T x) { take_apart(x, big[i], small[i]); }
};
using Left = Operand<4>;  // [16, 8]: inputs 2p, 2p + 1 (or gates) of coordinates row, row + 8
using Right = Operand<2>; // [8, 8]

MANN_INLINE void mma(float d[4], const float a[4], const float b[2]) {
    const uint32_t left[4] = {__float_as_uint(a[0]), __float_as_uint(a[1]), __float_as_uint(a[2]),
                              __float_as_uint(a[3])};
    const uint32_t right[2] = {__float_as_uint(b[0]), __float_as_uint(b[1])};
    mma_tf32(d, left, right);
}
#if defined(MANN_CUDA_ON_CPU)
MANN_INLINE void mma(double d[4], const double a[4], const double b[2]) { mma_double(d, a, b); }
#endif

// d += the products of a left operand and m right ones, in turn, since a product waits for the one before it.
template <int m, int n> MANN_INLINE void multiply_each(T (&d)[m][4], const Left (&a)[n], const Right (&b)[m][n]) {
    if constexpr (kPasses == 3) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
#pragma unroll
            for (int k = 0; k < m; ++k) mma(d[k], a[i].small, b[k][i].big);
#pragma unroll
            for (int k = 0; k < m; ++k) mma(d[k], a[i].big, b[k][i].small);
        }
    }
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
        for (int k = 0; k < m; ++k) mma(d[k], a[i].big, b[k][i].big);
}

// m sums of products that grow side by side: a product waits for the one before it in the same numbers. Apart, too, for
// the big parts and for the others.
template <int m> struct Results {
    T big[m][4] = {}, small[m][4] = {};

    MANN_INLINE void add(const Left &a, const Right (&b)[m]) {
        if constexpr (kPasses == 3) {
#pragma unroll
            for (int k = 0; k < m; ++k) mma(small[k], a.small, b[k].big);
#pragma unroll
            for (int k = 0; k < m; ++k) mma(small[k], a.big, b[k].small);
        }
#pragma unroll
        for (int k = 0; k < m; ++k) mma(big[k], a.big, b[k].big);
    }
    MANN_INLINE T at(int k, int i) const { return kPasses == 3 ? big[k][i] + small[k][i] : big[k][i]; }
};

struct Lane {
    int lane, row, part;
    MANN_INLINE Lane() : lane(threadIdx.x % 32), row(lane / 4), part(lane % 4) {}
    MANN_INLINE int unit(int i) const { return part + 4 * i; }
};

// Fills `count` right operands of all lanes: *source(i, row, part, e), zero where that is null, is the number in row e
// (of a pair) of `part`, in column `row`, times scale(i, row). A thread that has several loads them at once.
template <int count, typename Source, typename Scale>
MANN_INLINE void fill_operands(T *operands, Source &&source, Scale &&scale) {
    constexpr int at_once = count * 32 <= 384 ? 1 : 4;
#pragma unroll 1
    for (int first = threadIdx.x; first < count * 32; first += at_once * blockDim.x) {
        S stored[at_once][2];
#pragma unroll
        for (int j = 0; j < 2 * at_once; ++j) {
            const int i = first + j / 2 * blockDim.x;
            const S *from = i < count * 32 ? source(i / 32, i % 32 / 4, i % 4, j % 2) : nullptr;
            stored[j / 2][j % 2] = load_if(from, from);
        }
#pragma unroll
        for (int j = 0; j < 2 * at_once; ++j) {
            const int i = first + j / 2 * blockDim.x, e = j % 2;
            if (i >= count * 32) break;
            const T w = to_arith(stored[j / 2][e]) * scale(i / 32, i % 32 / 4);
            T *at = operands + i * kFragment;
            if constexpr (kApart) take_apart(w, at[e], at[2 + e]);
            else at[e] = w;
        }
    }
}
MANN_INLINE T unscaled(int, int) { return 1; }
MANN_INLINE Four<float> load_four(const float *at) { return load_shared4(at); }
#if defined(MANN_CUDA_ON_CPU)
MANN_INLINE Four<double> load_four(const double *at) { return {{at[0], at[1], at[2], at[3]}}; }
#endif
MANN_INLINE Right load_operand(const T *operands, int i, int lane) {
    Right b;
    const T *at = operands + (i * 32 + lane) * kFragment;
    if constexpr (kApart) {
        const Four<T> four = load_four(at);
        b = {{four[0], four[1]}, {four[2], four[3]}};
    } else {
        b.set(0, load_shared(at)), b.set(1, load_shared(at + 1));
    }
    return b;
}

MANN_INLINE void take_apart(const T (&x)[kPairs][4], Left (&left)[kPairs]) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
#pragma unroll
        for (int i = 0; i < 4; ++i) left[p].set(i, x[p][i]);
}

// Inputs of a tile in memory: four numbers of each lane for each pair, apart for the banks.
MANN_INLINE int inputs_at(int row, int part) { return 4 * (4 * row + (part ^ (row & 2))); }
MANN_INLINE void store_inputs(T *to, const Lane &lane, const T (&x)[kPairs][4]) {
    T *at = to + inputs_at(lane.row, lane.part);
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
        *reinterpret_cast<Four<T> *>(at + 128 * p) = {{x[p][0], x[p][1], x[p][2], x[p][3]}};
}
MANN_INLINE void load_inputs(const T *from, const Lane &lane, Left (&left)[kPairs]) {
    const T *at = from + inputs_at(lane.row, lane.part);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
        const Four<T> four = *reinterpret_cast<const Four<T> *>(at + 128 * p);
#pragma unroll
        for (int i = 0; i < 4; ++i) left[p].set(i, four[i]);
    }
}

// Where coordinates are the inner index, a product takes, for e = 0 and 1, coordinate 4 * e + part and, as the second
// of the pair, that one + 8.

// The same inputs as right operands. Columns: inputs 2p, 2p + 1 of the four parts.
MANN_INLINE void load_columns(const T *from, const Lane &lane, Right (&columns)[kPairs][2]) {
    const T *at = from + inputs_at(lane.part, lane.row / 2) + lane.row % 2 * 2;
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
            const Two<T> two = *reinterpret_cast<const Two<T> *>(at + 64 * e + 128 * p);
            columns[p][e].set(0, two.at[0]), columns[p][e].set(1, two.at[1]);
        }
}

// Two results of products, four numbers of a lane each, that turn to left operands with 16 rows: those of result s, the
// two columns of part row / 2, where s = row % 2.
MANN_INLINE int results_at(int s, int row, int part) {
    return 4 * (32 * s + 4 * row + (part ^ (row >> 1 & 1) ^ 2 * s));
}
MANN_INLINE void stage_results(T *stage, const Lane &lane, const T (&result)[2][4]) {
#pragma unroll
    for (int s = 0; s < 2; ++s)
        *reinterpret_cast<Four<T> *>(stage + results_at(s, lane.row, lane.part)) = {
            {result[s][0], result[s][1], result[s][2], result[s][3]}};
}
MANN_INLINE void load_rows(const T *stage, const Lane &lane, Left (&rows)[2]) {
    const T *at = stage + results_at(lane.row % 2, lane.part, lane.row / 2);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const Four<T> four = *reinterpret_cast<const Four<T> *>(at + 64 * e);
        rows[e].set(0, four[0]), rows[e].set(1, four[1]), rows[e].set(2, four[2]), rows[e].set(3, four[3]);
    }
}

// The two coordinates of a lane: where they are, and whether they are there.
struct Coordinates {
    int at[2];
    bool there[2];
    MANN_INLINE Coordinates(int tile, const Lane &lane, int count) {
#pragma unroll
        for (int r = 0; r < 2; ++r) at[r] = tile * kTile + lane.row + 8 * r, there[r] = at[r] < count;
    }
    MANN_INLINE T load(const S *of, int r) const { return there[r] ? to_arith(of[at[r]]) : T(0); }
};

MANN_INLINE float absolute(float x) { return fabsf(x); }
MANN_INLINE double absolute(double x) { return fabs(x); }

// What the networks see of a gradient, or gradients of it.
struct Features {
    T magnitude, sign;
};

// The gradient preprocessing; eps is that of float32 in every type.
struct Preprocessing {
    T per_log2, inverse, scale; // ln 2 / p, 1 / p, e^p
    MANN_INLINE Preprocessing(double p, double scale)
        : per_log2(T(0.6931471805599453 / p)), inverse(T(1 / p)), scale(T(scale)) {}

    MANN_INLINE static T size(T g) { return absolute(g) + T(1.1920928955078125e-07); }
    // max(log(|g| + eps) / p, -1), clip(g e^p, -1, 1); NaN passes.
    MANN_INLINE Features features(T g) const {
        return {maximum(fast_logarithm2(size(g)) * per_log2, T(-1)), minimum(maximum(g * scale, T(-1)), T(1))};
    }
    // Whether a gradient passes to g: not where the feature is cut off.
    MANN_INLINE bool magnitude_passes(T g) const { return fast_logarithm2(size(g)) * per_log2 >= T(-1); }
    MANN_INLINE bool sign_passes(T g) const { return absolute(g) * scale <= T(1); }
    // What gradients of the two features are to g.
    MANN_INLINE T backward(T g, Features d) const {
        const T slope = d.magnitude * fast_reciprocal(size(g)) * inverse;
        const T signed_slope = g > 0 ? slope : g < 0 ? -slope : T(0);
        return (magnitude_passes(g) ? signed_slope : T(0)) + (sign_passes(g) ? d.sign * scale : T(0));
    }
};

// Stores the gradients of a tile, from what each part of a lane's row has of those of the features of the two
// coordinates: part r has the sum of coordinate r.
MANN_INLINE void store_dgrads(S *dgrads, const Coordinates &here, const Lane &lane, const Preprocessing &preprocessing,
                              const T (&g)[2], const Features (&d)[2]) {
    const bool odd = lane.part & 1; // keeps the second coordinate, gives the first away
    Features mine = odd ? d[1] : d[0];
    mine.magnitude += __shfl_xor_sync(~0u, odd ? d[0].magnitude : d[1].magnitude, 1);
    mine.sign += __shfl_xor_sync(~0u, odd ? d[0].sign : d[1].sign, 1);
    mine.magnitude += __shfl_xor_sync(~0u, mine.magnitude, 2);
    mine.sign += __shfl_xor_sync(~0u, mine.sign, 2);
    if (lane.part < 2 && (odd ? here.there[1] : here.there[0]))
        dgrads[odd ? here.at[1] : here.at[0]] = to_storage<S>(preprocessing.backward(odd ? g[1] : g[0], mine));
}

// Sums over coordinates that a warp makes: `groups` of 16 rows of weight gradients, for all inputs, and `others` of
// which every lane has its own, to be added up over the rows of lanes. The former are too many for registers where
// `in_memory` says so.
template <int groups, int others, bool in_memory> struct Sums {
    static constexpr bool kInMemory = in_memory;
    static constexpr int kOfGroups = groups * kPairs * 4, kNumbers = 32 * (kOfGroups + others);
    T kept[in_memory ? 1 : groups][kPairs][4] = {}, beside[others] = {};
    T *memory; // of the warp, in memory
    bool first = true;

    MANN_INLINE Sums(T *sums, const Lane &lane)
        : memory(sums + (int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32) * kNumbers + lane.lane) {}
    MANN_INLINE void add(int group, int p, const T (&more)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (in_memory) {
                T &at = memory[((group * kPairs + p) * 4 + i) * 32];
                at = first ? more[i] : at + more[i];
            } else {
                kept[group][p][i] += more[i];
            }
        }
    }
    // What is not in memory yet, to a lane's place for it: there it is added, or is the first.
    MANN_INLINE void finish(T *to, bool add) {
        const auto put = [&](int i, T x) { to[i * 32] = add ? to[i * 32] + x : x; };
        if constexpr (in_memory) {
            for (int i = 0; first && i < kOfGroups; ++i) put(i, 0);
        } else {
#pragma unroll
            for (int i = 0; i < kOfGroups; ++i) put(i, kept[i / 4 / kPairs][i / 4 % kPairs][i % 4]);
        }
#pragma unroll
        for (int i = 0; i < others; ++i) {
#pragma unroll
            for (int by = 4; by < 32; by *= 2) beside[i] += __shfl_xor_sync(~0u, beside[i], by);
            put(kOfGroups + i, beside[i]);
        }
    }
};

// The sums of a block, its warps one after the other, to its part of `parts` [parts, numbers]; or of each of its warps,
// where they are in memory. `shared` has room for one part and is free.
template <typename Sums> MANN_INLINE void finish_sums(Sums &sums, const Lane &lane, T *shared, T *parts) {
    if constexpr (Sums::kInMemory) {
        sums.finish(sums.memory, false);
    } else {
        const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
        for (int w = 0; w < warps; ++w) {
            __syncthreads();
            if (warp == w) sums.finish(shared + lane.lane, w > 0);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < Sums::kNumbers; i += blockDim.x)
            parts[int64_t(blockIdx.x) * Sums::kNumbers + i] = shared[i];
    }
}

// Entry i of the sum of `parts` rows of `length` numbers, for blocks of kSumThreads threads that make 32 sums each; of
// use to the first 32 threads.
constexpr int kSumThreads = 256;
MANN_INLINE T sum_of_parts(const T *sums, int64_t parts, int length, int i) {
    MANN_SHARED(T, partial, kSumThreads);
    constexpr int slices = kSumThreads / 32;
    const int slice = threadIdx.x / 32;
    T sum = sum_of<16>(slice, i < length ? int(parts) : 0, slices,
                       [&](int part) { return sums + int64_t(part) * length + i; });
    partial[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
#pragma unroll
    for (int k = 0; k < slices; ++k) sum += partial[k * 32 + threadIdx.x % 32];
    return sum;
}

} // namespace mann::cuda
