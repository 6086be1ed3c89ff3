// The types of CUDA on the CPU: indices, vectors whose copies check their alignment, bfloat16.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace mann::on_cpu {

[[noreturn]] void misaligned(const void *address, size_t alignment, const char *what);

// The compiler may believe what a type says of its alignment: hide where the address comes from.
inline void check_aligned(const void *address, size_t alignment, const char *what) {
    uintptr_t bits = reinterpret_cast<uintptr_t>(address);
    asm("" : "+r"(bits));
    if (bits % alignment != 0) misaligned(address, alignment, what);
}

template <typename T> struct alignas(2 * sizeof(T)) Vector2 {
    T x, y;
    Vector2() = default;
    constexpr Vector2(T x, T y) : x(x), y(y) {}
    Vector2(const Vector2 &other) { *this = other; }
    Vector2 &operator=(const Vector2 &other) {
        check_aligned(&other, sizeof(Vector2), "load of a vector");
        check_aligned(this, sizeof(Vector2), "store of a vector");
        x = other.x, y = other.y;
        return *this;
    }
};

// Of 8-byte numbers there is none on every GPU: they go in two parts of 16 bytes.
template <typename T> struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) Vector4 {
    T x, y, z, w;
    Vector4() = default;
    constexpr Vector4(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
    Vector4(const Vector4 &other) { *this = other; }
    Vector4 &operator=(const Vector4 &other) {
        check_aligned(&other, alignof(Vector4), "load of a vector");
        check_aligned(this, alignof(Vector4), "store of a vector");
        x = other.x, y = other.y, z = other.z, w = other.w;
        return *this;
    }
};

} // namespace mann::on_cpu

using float2 = mann::on_cpu::Vector2<float>;
using float4 = mann::on_cpu::Vector4<float>;
using double2 = mann::on_cpu::Vector2<double>;
using double4 = mann::on_cpu::Vector4<double>;
using int2 = mann::on_cpu::Vector2<int>;
using int4 = mann::on_cpu::Vector4<int>;
using uint2 = mann::on_cpu::Vector2<unsigned>;
using uint4 = mann::on_cpu::Vector4<unsigned>;
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline double4 make_double4(double x, double y, double z, double w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }

// bfloat16: the upper half of a float, rounded to the nearest, ties to even.
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        const uint32_t wide = __float_as_uint(x);
        bits = static_cast<uint16_t>(x != x ? 0x7FFF : (wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
    }
    operator float() const { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
};
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    __nv_bfloat16 x;
    x.bits = bits;
    return x;
}

struct __nv_bfloat162 : mann::on_cpu::Vector2<__nv_bfloat16> {
    using Vector2::Vector2;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {pair.x, pair.y}; }
