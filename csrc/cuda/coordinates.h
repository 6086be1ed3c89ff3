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

template <typename X> struct alignas(2 * sizeof(X)) Two {
    X at[2];
};

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

// d += the products of a's and b's n operands.
template <int n> MANN_INLINE void multiply(T d[4], const Left (&a)[n], const Right (&b)[n]) {
    if constexpr (kPasses == 3)
#pragma unroll
        for (int i = 0; i < n; ++i) mma(d, a[i].small, b[i].big), mma(d, a[i].big, b[i].small);
#pragma unroll
    for (int i = 0; i < n; ++i) mma(d, a[i].big, b[i].big);
}

struct Lane {
    int lane, row, part;
    MANN_INLINE Lane() : lane(threadIdx.x % 32), row(lane / 4), part(lane % 4) {}
    MANN_INLINE int unit(int i) const { return part + 4 * i; }
};

// Fills `count` right operands of all lanes: weight(i, row, part, e) is the number in row e (of a pair) of `part`, in
// column `row`, times `scale(i, row)`.
template <typename Weight> MANN_INLINE void fill_operands(T *operands, int count, Weight &&weight) {
    for (int i = threadIdx.x; i < count * 32; i += blockDim.x) {
        T *at = operands + i * kFragment;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const T w = weight(i / 32, i % 32 / 4, i % 4, e);
            if constexpr (kApart) take_apart(w, at[e], at[2 + e]);
            else at[e] = w;
        }
    }
}
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

// The gradient preprocessing; eps is that of float32 in every type.
struct Preprocessing {
    T per_log2, inverse, scale; // ln 2 / p, 1 / p, e^p
    MANN_INLINE Preprocessing(double p, double scale)
        : per_log2(T(0.6931471805599453 / p)), inverse(T(1 / p)), scale(T(scale)) {}

    MANN_INLINE static T size(T g) { return absolute(g) + T(1.1920928955078125e-07); }
    // What a part has beside its units: 1, max(log(|g| + eps) / p, -1), clip(g e^p, -1, 1), nothing. NaN passes;
    // infinity becomes so much that it is the same behind any gate.
    MANN_INLINE T beside(T g, int part) const {
        const T magnitude = minimum(maximum(fast_logarithm2(size(g)) * per_log2, T(-1)), T(1e30));
        const T sign = minimum(maximum(g * scale, T(-1)), T(1));
        return part == 0 ? T(1) : part == 1 ? magnitude : part == 2 ? sign : T(0);
    }
    // What gradients of the two features are to g.
    MANN_INLINE T backward(T g, T dmagnitude, T dsign) const {
        const T slope = dmagnitude * fast_reciprocal(size(g)) * inverse;
        const T through_log = fast_logarithm2(size(g)) * per_log2 >= T(-1) ? (g > 0   ? slope
                                                                              : g < 0 ? -slope
                                                                                      : T(0))
                                                                           : T(0);
        return through_log + (absolute(g) * scale <= T(1) ? dsign * scale : T(0));
    }
};

// What came back to the inputs beside the units, parts 1 and 2 of the lanes of a row: each of the two parts stores one
// coordinate's gradient.
MANN_INLINE void store_dgrads(S *dgrads, const Coordinates &here, const Lane &lane, const Preprocessing &preprocessing,
                              const T g[2], const T dbeside[2]) {
    const bool first = lane.part == 1; // has the magnitude's of both, the other the sign's
    const T other = __shfl_xor_sync(~0u, first ? dbeside[1] : dbeside[0], 3);
    const T dmagnitude = first ? dbeside[0] : other, dsign = first ? other : dbeside[1];
    if ((first && here.there[0]) || (lane.part == 2 && here.there[1]))
        dgrads[first ? here.at[0] : here.at[1]] =
            to_storage<S>(preprocessing.backward(first ? g[0] : g[1], dmagnitude, dsign));
}

// Entry i of the sum of `parts` rows of `length` numbers, for blocks of kSumThreads threads that make 32 sums each; of
// use to the first 32 threads.
constexpr int kSumThreads = 256;
MANN_INLINE T sum_of_parts(const T *sums, int64_t parts, int length, int i) {
    MANN_SHARED(T, partial, kSumThreads);
    constexpr int slices = kSumThreads / 32;
    const int slice = threadIdx.x / 32;
    T sum = 0;
    if (i < length)
        for (int64_t part = slice; part < parts; part += slices) sum += sums[part * length + i];
    partial[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
#pragma unroll
    for (int k = 0; k < slices; ++k) sum += partial[k * 32 + threadIdx.x % 32];
    return sum;
}

} // namespace mann::cuda
