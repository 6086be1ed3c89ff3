// All that kernels need beside CUDA's own language: storage types, scalar functions for cells.h, shared memory,
// clusters, messages between the blocks of a cluster, tensor cores, asynchronous copies. Includes nothing: NVRTC has no
// files.
//
// With MANN_CUDA_ON_CPU the same names come from cuda_on_cpu.h, which runs the kernels on the CPU, one fiber per
// thread.
#pragma once

#if defined(MANN_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
// The one parameter of a kernel is a struct, by value; `bounds` is the number of threads, or that and how many blocks a
// multiprocessor has room for. With CUDA on the CPU it is a function that the harness can find.
#define MANN_BOUNDS(threads, blocks) threads, blocks
#define MANN_KERNEL(name, bounds, Args)                                                                                \
    extern "C" __global__ void __launch_bounds__(bounds) name(const __grid_constant__ Args args)
#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif
#endif

// The namespace of everything that runs on the GPU.
#define MANN_ISA cuda
#define MANN_INLINE __device__ __forceinline__
#define MANN_CONSTEXPR __host__ __device__ constexpr

namespace mann::cuda {

// bfloat16: the upper half of a float.
struct Bf16 {
    uint16_t bits;
};

// The type that numbers stored as S are computed in.
template <typename S> struct ArithOf {
    using type = S;
};
template <> struct ArithOf<Bf16> {
    using type = float;
};
template <typename S> using Arith = typename ArithOf<S>::type;

MANN_INLINE float to_arith(float x) { return x; }
MANN_INLINE double to_arith(double x) { return x; }
MANN_INLINE float to_arith(Bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
template <typename S> MANN_INLINE S to_storage(Arith<S> x) { return x; }
template <> MANN_INLINE Bf16 to_storage<Bf16>(float x) {
    Bf16 rounded;
#if defined(MANN_CUDA_ON_CPU)
    const uint32_t wide = __float_as_uint(x); // to the nearest, ties to even
    rounded.bits = uint16_t(x != x ? 0x7FFF : (wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
#endif
    return rounded;
}
// As it comes back from storage.
template <typename S> MANN_INLINE Arith<S> rounded_to(Arith<S> x) { return to_arith(to_storage<S>(x)); }

// Clamped where the result would leave the exponent range; NaN stays NaN.
MANN_INLINE float exponential(float x) { return expf(x > 88.0f ? 88.0f : x); }
MANN_INLINE double exponential(double x) { return exp(x > 709.0 ? 709.0 : x); }
MANN_INLINE float exponential_minus_one(float x) { return expm1f(x > 88.0f ? 88.0f : x); }
MANN_INLINE double exponential_minus_one(double x) { return expm1(x > 709.0 ? 709.0 : x); }
MANN_INLINE float square_root(float x) { return sqrtf(x); }
MANN_INLINE double square_root(double x) { return sqrt(x); }
MANN_INLINE float inverse_square_root(float x) { return rsqrtf(x); } // to 2 ulp
MANN_INLINE double inverse_square_root(double x) { return 1 / sqrt(x); }
// Of what is at most 0 or near it: to 2 ulp and |x| more.
MANN_INLINE float quick_exponential(float x) { return __expf(x); }
MANN_INLINE double quick_exponential(double x) { return exp(x); }
MANN_INLINE float log_one_plus(float x) { return log1pf(x); }
MANN_INLINE double log_one_plus(double x) { return log1p(x); }
// ln(1 + e^x)
template <typename T> MANN_INLINE T softplus(T x) { return x > 20 ? x : log_one_plus(exponential(x)); }

#if !defined(MANN_CUDA_ON_CPU)
// Of the unit for such functions: 2^x and 1 / x to two units in the last place, the logarithm to 2^-22 (of 1, of the
// result where that is more). What is below the normal numbers counts as zero.
MANN_INLINE float fast_exponential2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
MANN_INLINE float fast_logarithm2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
MANN_INLINE float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif
// In place of those of cells.h: without a division, to 4 units in the last place.
MANN_INLINE float sigmoid(float x) { return fast_reciprocal(1 + exponential(-x)); }
MANN_INLINE float hyperbolic_tangent(float x) { return tanhf(x); }

MANN_INLINE float infinity() { return __uint_as_float(0x7f800000u); }

// Four numbers that are loaded and stored together.
template <typename T> struct alignas(16) Four {
    T at[4];
    MANN_INLINE T &operator[](int i) { return at[i]; }
    MANN_INLINE const T &operator[](int i) const { return at[i]; }
};

// Or two.
template <typename T> struct alignas(2 * sizeof(T)) Two {
    T at[2];
};

} // namespace mann::cuda

#include "../cells.h" // needs the functions above

#if !defined(MANN_CUDA_ON_CPU)

// Once per kernel: the dynamic shared memory of the launch as char *name, aligned to 16 bytes.
#define MANN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
// T name[N] in shared memory.
#define MANN_SHARED(T, name, N) __shared__ T name[N]

namespace mann::cuda {

// threadIdx.x, read anew: what is made of it is not kept in registers from one use to the next.
MANN_INLINE int thread_again() {
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return int(thread);
}

MANN_INLINE uint32_t shared_address(const void *shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

// 16 bytes of shared memory, loaded where it stands: the compiler moves it out of no loop.
MANN_INLINE Four<float> load_shared4(const float *shared) {
    Four<float> v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.at[0]), "=f"(v.at[1]), "=f"(v.at[2]), "=f"(v.at[3])
                 : "r"(shared_address(shared)));
    return v;
}

// One number, likewise.
MANN_INLINE float load_shared(const float *shared) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(shared_address(shared)));
    return x;
}

// NaN passes.
MANN_INLINE float maximum(float a, float b) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
}
MANN_INLINE float minimum(float a, float b) {
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
    return least;
}

// *at in global memory, or zero where that does not exist. There is no branch around the load and nothing waits for it,
// so several are on their way at once; a load inside an `if` is waited for before the next. Of memory that the thread
// has not written to: the compiler keeps no order with its stores.
#define MANN_LOAD_IF(type, ptx, bits, constraint)                                                                      \
    asm volatile("{\n.reg .pred exists;\nsetp.ne.u32 exists, %2, 0;\nmov." bits " %0, 0;\n"                            \
                 "@exists ld.global." ptx " %0, [%1];\n}"                                                              \
                 : "=" constraint(type)                                                                                \
                 : "l"(at), "r"(uint32_t(exists)))
MANN_INLINE uint32_t load_if(bool exists, const uint32_t *at) {
    uint32_t bits;
    MANN_LOAD_IF(bits, "u32", "u32", "r");
    return bits;
}
MANN_INLINE float load_if(bool exists, const float *at) {
    return __uint_as_float(load_if(exists, reinterpret_cast<const uint32_t *>(at)));
}
MANN_INLINE int32_t load_if(bool exists, const int32_t *at) {
    return int32_t(load_if(exists, reinterpret_cast<const uint32_t *>(at)));
}
MANN_INLINE Bf16 load_if(bool exists, const Bf16 *at) {
    Bf16 x;
    MANN_LOAD_IF(x.bits, "u16", "u16", "h");
    return x;
}
MANN_INLINE uint8_t load_if(bool exists, const uint8_t *at) {
    uint32_t bits;
    MANN_LOAD_IF(bits, "u8", "u32", "r");
    return uint8_t(bits);
}
#undef MANN_LOAD_IF

// Clusters exist from sm_90 on; before, a block is alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
MANN_INLINE int cluster_rank() { return 0; }
MANN_INLINE int cluster_size() { return 1; }
MANN_INLINE void cluster_arrive() {}
MANN_INLINE void cluster_wait() { __syncthreads(); }
template <typename T> MANN_INLINE T *of_rank(T *shared, int) { return shared; }
#else
MANN_INLINE int cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}
MANN_INLINE int cluster_size() {
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return int(size);
}
// A barrier of all threads of all blocks of the cluster, in two halves: what was written before the first is seen after
// the second.
MANN_INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
MANN_INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The same shared variable in another block of the cluster.
template <typename T> MANN_INLINE T *of_rank(T *shared, int rank) {
    uint64_t there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
    return reinterpret_cast<T *>(there);
}

// Messages between the blocks of a cluster. A mailbox counts the bytes that arrive for a block; its memory is shared
// and stands at the same place in every block.
//
//     one thread:  mailbox_open(&box, bytes)        before the cluster's first barrier, for the first message
//     any thread:  send(&value, rank, &box, x)      x to `value` of that block, and its bytes to its mailbox
//     all threads: mailbox_wait(&box, phase)        until the bytes of message number `phase` (0, 1, ...) are there
//     one thread:  mailbox_expect(&box, bytes)      after waiting, for the next message
//
// A sender must know that what it overwrites was read, and that the mailbox was waited for.
struct Mailbox {
    alignas(8) uint64_t barrier;
};
MANN_INLINE void mailbox_expect(Mailbox *box, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(box)), "r"(bytes)
                 : "memory");
}
MANN_INLINE void mailbox_open(Mailbox *box, uint32_t bytes) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(box)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    mailbox_expect(box, bytes);
}
MANN_INLINE void mailbox_wait(const Mailbox *box, int phase) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(shared_address(box)),
                 "r"(phase & 1)
                 : "memory");
}
// The address of a shared variable in another block, as send() takes it.
MANN_INLINE uint32_t address_of_rank(const void *shared, int rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(shared)), "r"(rank));
    return there;
}
MANN_INLINE void send(float *target, int rank, Mailbox *box, float x) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                     address_of_rank(target, rank)),
                 "r"(__float_as_uint(x)), "r"(address_of_rank(box, rank))
                 : "memory");
}
// Two numbers, to a target on 8 bytes.
MANN_INLINE void send(float *target, int rank, Mailbox *box, const Two<float> &x) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                     address_of_rank(target, rank)),
                 "r"(__float_as_uint(x.at[0])), "r"(__float_as_uint(x.at[1])), "r"(address_of_rank(box, rank))
                 : "memory");
}
MANN_INLINE void send(uint32_t *target, int rank, Mailbox *box, const Two<uint32_t> &x) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                     address_of_rank(target, rank)),
                 "r"(x.at[0]), "r"(x.at[1]), "r"(address_of_rank(box, rank))
                 : "memory");
}
// Four numbers, to a target on 16 bytes.
MANN_INLINE void send(float *target, int rank, Mailbox *box, const Four<float> &x) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            address_of_rank(target, rank)),
        "r"(__float_as_uint(x.at[0])), "r"(__float_as_uint(x.at[1])), "r"(__float_as_uint(x.at[2])),
        "r"(__float_as_uint(x.at[3])), "r"(address_of_rank(box, rank))
        : "memory");
}
#endif
MANN_INLINE void cluster_barrier() {
    cluster_arrive();
    cluster_wait();
}

// Of a kernel that is launched as one that follows another (Grid::follows): lets the next start; waits until what it
// follows has ended, and sees what that wrote. Before, it may read what was there before the first of them alone.
MANN_INLINE void start_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
MANN_INLINE void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// d += a b by a warp, on tensor cores: [16, 8] += [16, 16] [16, 8] in bfloat16, each thread with its share of the three
// as in PTX's mma.m16n8k16.
MANN_INLINE void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same in TF32, [16, 8] += [16, 8] [8, 8]: mma.m16n8k8.
MANN_INLINE void mma_tf32(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes, aligned, from global to shared memory while the thread goes on; seen by it after copy_async_wait<n>(),
// which waits for all but the last n committed groups.
MANN_INLINE void copy_async16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// One number likewise, zero where it does not exist.
MANN_INLINE void copy_async(float *shared, const float *global, bool exists) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(exists ? 4 : 0)
                 : "memory");
}
MANN_INLINE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n> MANN_INLINE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"); }

} // namespace mann::cuda

#endif

namespace mann::cuda {

// The sum of *at(i) for i = first, first + step, ... < count, in this order; so many are loaded at once. (NVRTC unrolls
// no loop of unknown length into loads that go out together: each copy has the loop's test before it.)
template <int at_once, typename At> MANN_INLINE auto sum_of(int first, int count, int step, At &&at) {
    decltype(to_arith(*at(0))) sum = 0;
#pragma unroll 1
    for (int i = first; i < count; i += at_once * step) {
        decltype(load_if(true, at(0))) loaded[at_once];
#pragma unroll
        for (int j = 0; j < at_once; ++j) loaded[j] = load_if(i + j * step < count, at(i + j * step));
#pragma unroll
        for (int j = 0; j < at_once; ++j) sum += to_arith(loaded[j]);
    }
    return sum;
}

// A stored number to shared memory as it is computed with, zero where it does not exist: seen after copy_async_wait.
template <typename T> MANN_INLINE void copy_number(T *shared, const T *at, bool exists) {
    copy_async(shared, at, exists);
}
MANN_INLINE void copy_number(float *shared, const Bf16 *at, bool exists) { *shared = to_arith(load_if(exists, at)); }

} // namespace mann::cuda
