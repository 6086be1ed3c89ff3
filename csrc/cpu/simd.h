// Vectors of the widest register of one instruction set. Every kernel source is compiled once per instruction set into
// the namespace MANN_ISA, and the entry points choose among them at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define MANN_VECTOR_BYTES 64
#define MANN_VECTOR_REGISTERS 32
#elif defined(__AVX2__)
#define MANN_VECTOR_BYTES 32
#define MANN_VECTOR_REGISTERS 16
#else
#define MANN_VECTOR_BYTES 16
#define MANN_VECTOR_REGISTERS 16
#endif

namespace mann::MANN_ISA {

// bfloat16 is a storage type: everything is computed in float32.
struct Bf16 {
    uint16_t bits;
};

template <typename S> using Arith = std::conditional_t<std::is_same_v<S, double>, double, float>;

inline float to_arith(float value) { return value; }
inline double to_arith(double value) { return value; }
inline float to_arith(Bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

template <typename S> inline S to_storage(Arith<S> value) {
    if constexpr (std::is_same_v<S, Bf16>) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        if (value != value) return Bf16{0x7fc0};
        return Bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)}; // round to nearest even
    } else {
        return value;
    }
}

template <typename T> struct VectorOf {
    typedef T type __attribute__((vector_size(MANN_VECTOR_BYTES)));
    typedef T unaligned __attribute__((vector_size(MANN_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <typename T> using Vec = typename VectorOf<T>::type;
template <typename V> using Lane = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V>()[0])>>;
template <typename T> constexpr int kLanes = MANN_VECTOR_BYTES / sizeof(T);

template <typename T> inline Vec<T> load(const T *source) {
    return *reinterpret_cast<const typename VectorOf<T>::unaligned *>(source);
}
template <typename T> inline void store(T *target, Vec<T> value) {
    *reinterpret_cast<typename VectorOf<T>::unaligned *>(target) = value;
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// The first `count` lanes: for float eight, for double four.
template <typename T> inline __m256i first_lanes(int64_t count) {
    alignas(32) static constexpr int64_t kDoubles[8] = {-1, -1, -1, -1}; // then zeros
    alignas(32) static constexpr int32_t kFloats[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    const void *from = kFloats + 8 - count;
    if constexpr (sizeof(T) == 8) from = kDoubles + 4 - count;
    return _mm256_loadu_si256(static_cast<const __m256i *>(from));
}
#endif
// The first `count` lanes; the others are zero.
template <typename T> inline Vec<T> load_some(const T *source, int64_t count) {
    if (count >= kLanes<T>) return load(source);
#if defined(__AVX512F__)
    const auto first = static_cast<unsigned>((1u << count) - 1);
    if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first), source);
    else return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first), source);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return _mm256_maskload_ps(source, first_lanes<T>(count));
    else return _mm256_maskload_pd(source, first_lanes<T>(count));
#else
    Vec<T> result{};
    std::memcpy(&result, source, count * sizeof(T));
    return result;
#endif
}
template <typename T> inline void store_some(T *target, Vec<T> value, int64_t count) {
    if (count >= kLanes<T>) return store(target, value);
#if defined(__AVX512F__)
    const auto first = static_cast<unsigned>((1u << count) - 1);
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(target, static_cast<__mmask16>(first), value);
    else _mm512_mask_storeu_pd(target, static_cast<__mmask8>(first), value);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) _mm256_maskstore_ps(target, first_lanes<T>(count), value);
    else _mm256_maskstore_pd(target, first_lanes<T>(count), value);
#else
    std::memcpy(target, &value, count * sizeof(T));
#endif
}
// Asks for the cache line of an address, which need not be a valid one, as far as the second-level cache: many more of
// these than of loads can be under way. A line that is asked for to read is this core's to write as well, if no other
// has it.
inline void prefetch(const void *address) { __builtin_prefetch(address, 0, 2); }

// x - 0 is x for every x, -0 and NaN included, so this is one broadcast instruction.
template <typename T> inline Vec<T> broadcast(T value) { return value - Vec<T>{}; }

// Calls f with the size of each group of up to `largest` as a compile-time constant, and the first element of the
// group.
template <int largest, typename F> inline void in_groups(int64_t count, F &&f, int64_t first = 0) {
    for (; count - first >= largest; first += largest) f(std::integral_constant<int, largest>{}, first);
    if constexpr (largest > 1) {
        if (count > first) in_groups<largest - 1>(count, f, first);
    }
}

// a < b ? a : b and a > b ? a : b, so b where one is NaN: one instruction, which the compiler does not find by itself.
// The masks of all lanes are for GCC, which takes the unmasked form for a use of what is not initialised.
template <typename V> inline V minimum(V a, V b) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Lane<V>, float>) return _mm512_maskz_min_ps(0xffff, a, b);
    else return _mm512_maskz_min_pd(0xff, a, b);
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<Lane<V>, float>) return _mm256_min_ps(a, b);
    else return _mm256_min_pd(a, b);
#else
    return a < b ? a : b;
#endif
}
template <typename V> inline V maximum(V a, V b) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Lane<V>, float>) return _mm512_maskz_max_ps(0xffff, a, b);
    else return _mm512_maskz_max_pd(0xff, a, b);
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<Lane<V>, float>) return _mm256_max_ps(a, b);
    else return _mm256_max_pd(a, b);
#else
    return a > b ? a : b;
#endif
}

namespace detail {
template <int by, typename V, int... lane> inline V rotate(V v, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(v, v, ((lane + by) % static_cast<int>(sizeof...(lane)))...);
}
// One of the two halves of every block of `block` lanes, from a and from b: (a0 b0 a1 b1 ...).
template <int block, int half, int lanes> constexpr int half_index(int lane) {
    const int pair = lane / block, inside = lane % block;
    return pair * block + half * (block / 2) + inside % (block / 2) + (inside >= block / 2 ? lanes : 0);
}
template <int block, int half, typename V, int... lane> inline V halves(V a, V b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, half_index<block, half, sizeof...(lane)>(lane)...);
}
template <typename V, int stride, int block> inline V sum_tree(const V *values) {
    constexpr int lanes = sizeof(V) / sizeof(Lane<V>);
    if constexpr (block == lanes * 2) {
        return values[0];
    } else {
        const V a = sum_tree<V, stride * 2, block * 2>(values);
        const V b = sum_tree<V, stride * 2, block * 2>(values + stride);
        using Lanes = std::make_integer_sequence<int, lanes>;
        return halves<block, 0>(a, b, Lanes{}) + halves<block, 1>(a, b, Lanes{});
    }
}
} // namespace detail

// Lane i of the result is the sum of the lanes of values[i]: three operations a sum, where one alone takes about eight.
template <typename V> inline V sum_each(const V *values) { return detail::sum_tree<V, 1, 2>(values); }

// out[i] = sum of the lanes of values[i], i < count.
template <int count, typename T> inline void sum_lanes(const Vec<T> *values, T *out) {
    constexpr int lanes = kLanes<T>;
#pragma GCC unroll 16
    for (int first = 0; first < count; first += lanes) {
        Vec<T> group[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) group[i] = first + i < count ? values[first + i] : Vec<T>{};
        store_some(out + first, sum_each(group), count - first < lanes ? count - first : lanes);
    }
}
// f of all lanes, taken in halves; every lane of the result holds it.
template <int width, typename V, typename F> inline V fold_lanes(V value, F &&f) {
    if constexpr (width == 0) {
        return value;
    } else {
        using Lanes = std::make_integer_sequence<int, sizeof(V) / sizeof(Lane<V>)>;
        return fold_lanes<width / 2>(f(value, detail::rotate<width>(value, Lanes{})), f);
    }
}
template <typename T> inline T sum_lanes(Vec<T> value) {
    return fold_lanes<kLanes<T> / 2>(value, [](Vec<T> a, Vec<T> b) { return a + b; })[0];
}
template <typename T> inline T largest_lane(Vec<T> value) {
    return fold_lanes<kLanes<T> / 2>(value, [](Vec<T> a, Vec<T> b) { return a < b ? b : a; })[0];
}

namespace detail {
template <int s, bool second, int lanes> constexpr int swap_index(int lane) {
    return (lane & s) ? lanes + lane - (second ? 0 : s) : lane + (second ? s : 0);
}
template <int s, bool second, typename V, int... lane>
inline V swap_blocks(V a, V b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, swap_index<s, second, sizeof...(lane)>(lane)...);
}
// Exchanges the off-diagonal s x s blocks of every 2s x 2s block, from the largest to single elements.
template <typename V, int s> inline void transpose_square(V *rows) {
    constexpr int lanes = sizeof(V) / sizeof(Lane<V>);
    using Lanes = std::make_integer_sequence<int, lanes>;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
        if (i & s) continue;
        const V a = rows[i], b = rows[i + s];
        rows[i] = swap_blocks<s, false>(a, b, Lanes{});
        rows[i + s] = swap_blocks<s, true>(a, b, Lanes{});
    }
    if constexpr (s > 1) transpose_square<V, s / 2>(rows);
}
} // namespace detail

namespace detail {
typedef uint16_t Bits16 __attribute__((vector_size(MANN_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Bits32 __attribute__((vector_size(MANN_VECTOR_BYTES)));
inline Vec<float> widen(const Bf16 *source) {
    const auto bits = __builtin_convertvector(*reinterpret_cast<const Bits16 *>(source), Bits32);
    return reinterpret_cast<Vec<float>>(bits << 16);
}
inline void narrow(Vec<float> value, Bf16 *target) {
    const Bits32 bits = reinterpret_cast<Bits32>(value);
    const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; // to nearest even
    const Bits32 nan = reinterpret_cast<Bits32>(value != value);
    *reinterpret_cast<Bits16 *>(target) = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Bits16);
}
} // namespace detail

template <typename S> inline Vec<Arith<S>> load_arith(const S *source, int64_t count) {
    if constexpr (std::is_same_v<S, Bf16>) {
        if (count >= kLanes<float>) return detail::widen(source);
        Bf16 some[kLanes<float>] = {};
        for (int64_t i = 0; i < count; ++i) some[i] = source[i];
        return detail::widen(some);
    } else {
        return load_some(source, count);
    }
}
template <typename S> inline void store_storage(S *target, Vec<Arith<S>> value, int64_t count) {
    if constexpr (std::is_same_v<S, Bf16>) {
        if (count >= kLanes<float>) return detail::narrow(value, target);
        Bf16 some[kLanes<float>];
        detail::narrow(value, some);
        for (int64_t i = 0; i < count; ++i) target[i] = some[i];
    } else {
        store_some(target, value, count);
    }
}

// Copies n numbers from one of storage and arithmetic type to the other (or the same).
template <typename From, typename To> inline void convert(const From *source, To *target, int64_t n) {
    if constexpr (std::is_same_v<From, To>) {
        std::memcpy(target, source, n * sizeof(To));
    } else if constexpr (std::is_same_v<To, Bf16>) {
        for (int64_t i = 0; i < n; ++i) target[i] = to_storage<Bf16>(source[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) target[i] = to_arith(source[i]);
    }
}
// Rows of N numbers become rows of P, filled with zeros.
template <typename From, typename To>
inline void convert_rows(const From *source, To *target, int64_t rows, int64_t N, int64_t P) {
    for (int64_t i = 0; i < rows; ++i) {
        convert(source + i * N, target + i * P, N);
        for (int64_t n = N; n < P; ++n) target[i * P + n] = 0;
    }
}

// The other way: rows of P numbers, of which N are kept.
template <typename From, typename To>
inline void take_rows(const From *source, To *target, int64_t rows, int64_t N, int64_t P) {
    for (int64_t i = 0; i < rows; ++i) convert(source + i * P, target + i * N, N);
}

// target[j * target_stride + i] = source[i * source_stride + j] for i < rows, j < columns; the target's rows are filled
// with zeros up to `padded`, a multiple of the lanes. Types may differ.
template <typename From, typename To>
inline void transpose(const From *source, int64_t source_stride, int64_t rows, int64_t columns, To *target,
                      int64_t target_stride, int64_t padded) {
    using T = Arith<From>;
    constexpr int lanes = kLanes<T>;
    for (int64_t i0 = 0; i0 < padded; i0 += lanes) {
        for (int64_t j0 = 0; j0 < columns; j0 += lanes) {
            Vec<T> square[lanes];
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i)
                square[i] = i0 + i < rows ? load_arith(source + (i0 + i) * source_stride + j0, columns - j0) : Vec<T>{};
            detail::transpose_square<Vec<T>, lanes / 2>(square);
            const int64_t last = columns - j0 < lanes ? columns - j0 : lanes;
            for (int64_t j = 0; j < last; ++j)
                store_storage(target + (j0 + j) * target_stride + i0, square[j], padded - i0);
        }
    }
}

// e^x - 1 = (2^n - 1) + 2^n p(r), x = n ln 2 + r, |r| <= ln(2)/2. p is e^r - 1 to a quarter of its last bit: for float
// a polynomial fitted to its relative error, for double the Taylor polynomial up to r^14/14!. Arguments beyond the
// exponent range are clamped.
template <typename V> struct ExpParts {
    V scale, p;
};
template <typename V> inline ExpParts<V> exp_parts(V x) {
    using T = Lane<V>;
    constexpr bool is_float = std::is_same_v<T, float>;
    using Int = std::conditional_t<is_float, int32_t, int64_t>;
    using IntVec = typename VectorOf<Int>::type;
    constexpr T highest = is_float ? T(88.0) : T(709.0), lowest = is_float ? T(-87.0) : T(-708.0);
    x = maximum(broadcast(lowest), minimum(broadcast(highest), x)); // NaN passes both
    // Adding 1.5 * 2^mantissa leaves the rounded integer in the low bits, from where it is shifted into the exponent.
    constexpr T shifter = is_float ? T(12582912.0) : T(6755399441055744.0);
    constexpr int mantissa = is_float ? 23 : 52;
    const V shifted = x * T(1.4426950408889634) + shifter;
    const V n = shifted - shifter;
    const V scale = reinterpret_cast<V>((reinterpret_cast<IntVec>(shifted) << mantissa) +
                                        reinterpret_cast<IntVec>(broadcast(T(1))));
    constexpr T ln2_high = is_float ? T(0.693145751953125) : T(0.69314718036912382);
    constexpr T ln2_low = is_float ? T(1.4286068203094173e-06) : T(1.9082149292705877e-10);
    const V r = (x - n * ln2_high) - n * ln2_low;
    static constexpr float fitted[] = {1, 0.49999997f, 0.16666543f, 0.0416672f, 0.00836658f, 0.00138825f};
    static constexpr double taylor[] = {
        1.,         1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,        1. / 5040,
        1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800, 1. / 87178291200};
    constexpr auto coefficient = [](int i) { return is_float ? T(fitted[i < 6 ? i : 0]) : T(taylor[i]); };
    constexpr int degree = is_float ? 6 : 14;
    V p = broadcast(coefficient(degree - 1));
#pragma GCC unroll 16
    for (int i = degree - 2; i >= 0; --i) p = p * r + coefficient(i);
    return {scale, p * r};
}
template <typename V> inline V exponential(V x) {
    const ExpParts<V> e = exp_parts(x);
    return e.scale + e.scale * e.p;
}
template <typename V> inline V exponential_minus_one(V x) {
    const ExpParts<V> e = exp_parts(x);
    return (e.scale - Lane<V>(1)) + e.scale * e.p;
}
// log x = n ln 2 + 2 (s + s^3/3 + s^5/5 + ...), x = 2^n m, sqrt(1/2) <= m < sqrt(2), s = (m - 1) / (m + 1): |s| <
// 0.1716, and the first dropped term is below a quarter of the last bit of s. For positive x that are not denormal;
// infinity and NaN come out as they went in.
template <typename V> inline V natural_log(V x) {
    using T = Lane<V>;
    constexpr bool is_float = std::is_same_v<T, float>;
    using Int = std::conditional_t<is_float, int32_t, int64_t>;
    using IntVec = typename VectorOf<Int>::type;
    constexpr int mantissa = is_float ? 23 : 52;
    constexpr Int root_half = is_float ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcd);
    constexpr T largest = std::numeric_limits<T>::max();
    const IntVec bits = reinterpret_cast<IntVec>(x);
    const IntVec exponent = (bits - root_half) >> mantissa;
    const V m = reinterpret_cast<V>(bits - (exponent << mantissa));
    const V n = __builtin_convertvector(exponent, V), s = (m - 1) / (m + 1), square = s * s;
    constexpr int terms = is_float ? 5 : 11;
    V p = broadcast(T(1) / (2 * terms - 1));
#pragma GCC unroll 16
    for (int i = terms - 1; i >= 1; --i) p = p * square + T(1) / (2 * i - 1);
    const V result = n * T(0.69314718055994531) + 2 * s * p;
    return x <= largest ? result : x;
}
template <typename V> inline V square_root(V x) {
    V result;
    for (size_t i = 0; i < sizeof(V) / sizeof(Lane<V>); ++i) {
        if constexpr (std::is_same_v<Lane<V>, float>) result[i] = __builtin_sqrtf(x[i]);
        else result[i] = __builtin_sqrt(x[i]);
    }
    return result;
}

} // namespace mann::MANN_ISA
