// CUDA device code as plain C++: what csrc/cuda includes in place of the CUDA headers under MANN_CUDA_ON_CPU.
//
// Every CUDA thread is a fiber that runs until it waits, at a barrier or for its warp; which one goes on is drawn from
// a seed. The blocks of a cluster run together, clusters one after the other. What a GPU would not forgive is an error
// that names the place: threads at different barriers, a thread that others wait for and that has ended, a misaligned
// vector, a pointer to shared memory of no block. Shared memory is NaN at the start of its block, and again when its
// block has ended. The runtime is cuda_on_cpu.cpp, compiled without sanitizers; kernels compile with them or without.
#pragma once

#include "cuda_on_cpu_types.h"

#include <algorithm>
#include <functional>
#include <math.h>
#include <source_location>
#include <string.h>
#include <tuple>
#include <vector>

namespace mann::on_cpu {

struct Copy {
    void *to;
    const void *from; // null: zeros
    size_t bytes;
    int group;
    void make() const {
        if (from) memcpy(to, from, bytes);
        else memset(to, 0, bytes);
    }
};

// What a CUDA thread knows of itself.
struct Thread {
    uint3 thread, block;
    dim3 block_size, grid;
    int lane, cluster_rank, cluster_size;
    int groups = 0;           // of asynchronous copies, committed
    std::vector<Copy> copies; // not waited for yet
};
extern Thread *current; // the one that runs

using Place = std::source_location;
void block_barrier(Place place);
int block_count(bool predicate, Place place);
void cluster_arrive(Place place);
void cluster_wait(Place place);
void *of_rank(void *shared, int rank);
void *dynamic_shared();
void *static_shared(const void *key, size_t bytes);
void warp_barrier(unsigned mask, Place place);
uint64_t shuffle(unsigned mask, uint64_t value, int from, Place place);
unsigned ballot(unsigned mask, bool predicate, Place place);
void multiply(bool tf32, float *d, const uint32_t *a, const uint32_t *b, Place place);
void mailbox_open(void *box, int64_t bytes);
void mailbox_expect(void *box, int64_t bytes, Place place);
void mailbox_wait(const void *box, int phase, Place place);
void send(void *target, int rank, void *box, const void *data, int64_t bytes);
void wait_for_previous(Place place);
bool is_ahead(); // of the launch that this one follows
void launch(const char *name, dim3 grid, dim3 block, int cluster, size_t shared, const std::function<void()> &body,
            bool follows = false);

template <typename T, size_t N, typename Key>
T (&static_array(Key))
[N] {
    static const char key = 0; // its address is the array's name
    return *static_cast<T(*)[N]>(static_shared(&key, N * sizeof(T)));
}

template <typename T>
T shuffle_value(unsigned mask, T value, int from, Place place) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = shuffle(mask, bits, from, place);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

// Which lane a shuffle of width w reads from; its own where the partner is outside.
inline int at_lane(int lane, int w) { return (current->lane & ~(w - 1)) + (lane & (w - 1)); }
inline int inside(int lane, int w) { return (lane & ~(w - 1)) == (current->lane & ~(w - 1)) ? lane : current->lane; }

} // namespace mann::on_cpu

// What the compiler of CUDA knows without a header

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ const
#define threadIdx (::mann::on_cpu::current->thread)
#define blockIdx (::mann::on_cpu::current->block)
#define blockDim (::mann::on_cpu::current->block_size)
#define gridDim (::mann::on_cpu::current->grid)
inline constexpr int warpSize = 32;

inline void __syncthreads(mann::on_cpu::Place place = mann::on_cpu::Place::current()) {
    mann::on_cpu::block_barrier(place);
}
inline int __syncthreads_count(int predicate, mann::on_cpu::Place place = mann::on_cpu::Place::current()) {
    return mann::on_cpu::block_count(predicate, place);
}
inline int __syncthreads_or(int predicate, mann::on_cpu::Place place = mann::on_cpu::Place::current()) {
    return mann::on_cpu::block_count(predicate, place) != 0;
}
inline int __syncthreads_and(int predicate, mann::on_cpu::Place place = mann::on_cpu::Place::current()) {
    return mann::on_cpu::block_count(!predicate, place) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, mann::on_cpu::Place place = mann::on_cpu::Place::current()) {
    mann::on_cpu::warp_barrier(mask, place);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              mann::on_cpu::Place place = mann::on_cpu::Place::current()) {
    return mann::on_cpu::shuffle_value(mask, value, mann::on_cpu::at_lane(lane, width), place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32,
                  mann::on_cpu::Place place = mann::on_cpu::Place::current()) {
    const int from = mann::on_cpu::inside(mann::on_cpu::current->lane ^ with, width);
    return mann::on_cpu::shuffle_value(mask, value, from, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   mann::on_cpu::Place place = mann::on_cpu::Place::current()) {
    const int from = mann::on_cpu::inside(mann::on_cpu::current->lane + by, width);
    return mann::on_cpu::shuffle_value(mask, value, from, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                 mann::on_cpu::Place place = mann::on_cpu::Place::current()) {
    const int from = mann::on_cpu::inside(mann::on_cpu::current->lane - by, width);
    return mann::on_cpu::shuffle_value(mask, value, from, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              mann::on_cpu::Place place = mann::on_cpu::Place::current()) {
    return mann::on_cpu::ballot(mask, predicate, place);
}
inline int __any_sync(unsigned mask, int predicate, mann::on_cpu::Place place = mann::on_cpu::Place::current()) {
    return mann::on_cpu::ballot(mask, predicate, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, mann::on_cpu::Place place = mann::on_cpu::Place::current()) {
    return mann::on_cpu::ballot(mask, predicate, place) == mask;
}
// A fence orders a thread's own accesses; fibers of one thread of the CPU see each other's in order anyway.
inline void __threadfence() {}
inline void __threadfence_block() {}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
template <typename T> T __ldg(const T *from) { return *from; }
template <typename T> T __ldcg(const T *from) { return *from; }
template <typename T> T __ldcs(const T *from) { return *from; }
template <typename T> void __stcs(T *to, T value) { *to = value; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
using std::max;
using std::min;

// The contract of csrc/cuda/device.h

#define MANN_DYNAMIC_SHARED(name) char *name = static_cast<char *>(::mann::on_cpu::dynamic_shared())
#define MANN_SHARED(T, name, N) T(&name)[N] = ::mann::on_cpu::static_array<T, N>([] {})
// A kernel is a function that the harness finds by its name, called once for every thread.
#define MANN_KERNEL(name, threads, Args)                                                                               \
    static void name##_thread(const Args &args);                                                                       \
    extern "C" __attribute__((visibility("default"))) void name(const void *args) {                                    \
        name##_thread(*static_cast<const Args *>(args));                                                               \
    }                                                                                                                  \
    static void name##_thread([[maybe_unused]] const Args &args)

namespace mann::cuda {

inline int thread_again() { return int(threadIdx.x); }

template <typename T> struct Four;
template <typename T> struct Two;

// 16 bytes on a GPU.
template <typename T> Four<T> load_shared4(const T *shared) {
    on_cpu::check_aligned(shared, 16, "load of four numbers");
    return *reinterpret_cast<const Four<T> *>(shared);
}

template <typename T> T load_shared(const T *shared) { return *shared; }

template <typename T> T maximum(T a, T b) { return a != a || b != b ? a + b : a > b ? a : b; }
template <typename T> T minimum(T a, T b) { return a != a || b != b ? a + b : a < b ? a : b; }
template <typename T> T fast_exponential2(T x) { return std::exp2(x); }
template <typename T> T fast_logarithm2(T x) { return std::log2(x); }
template <typename T> T fast_reciprocal(T x) { return 1 / x; }

// Messages arrive at any time after they were sent: at the latest when nobody can go on without them.
struct Mailbox {
    alignas(8) uint64_t barrier;
};
inline void mailbox_open(Mailbox *box, int64_t bytes) { on_cpu::mailbox_open(box, bytes); }
inline void mailbox_expect(Mailbox *box, int64_t bytes, on_cpu::Place place = on_cpu::Place::current()) {
    on_cpu::mailbox_expect(box, bytes, place);
}
inline void mailbox_wait(const Mailbox *box, int phase, on_cpu::Place place = on_cpu::Place::current()) {
    on_cpu::mailbox_wait(box, phase, place);
}
template <typename T> void send(T *target, int rank, Mailbox *box, T x) {
    on_cpu::send(target, rank, box, &x, sizeof(T));
}
template <typename T> void send(T *target, int rank, Mailbox *box, const Two<T> &x) {
    on_cpu::check_aligned(target, 8, "message of two numbers");
    on_cpu::send(target, rank, box, &x, sizeof(x));
}
template <typename T> void send(T *target, int rank, Mailbox *box, const Four<T> &x) {
    on_cpu::check_aligned(target, 16, "message of four numbers");
    on_cpu::send(target, rank, box, &x, sizeof(x));
}

inline int cluster_rank() { return on_cpu::current->cluster_rank; }
inline int cluster_size() { return on_cpu::current->cluster_size; }
inline void cluster_arrive(on_cpu::Place place = on_cpu::Place::current()) { on_cpu::cluster_arrive(place); }
inline void cluster_wait(on_cpu::Place place = on_cpu::Place::current()) { on_cpu::cluster_wait(place); }
inline void cluster_barrier(on_cpu::Place place = on_cpu::Place::current()) {
    on_cpu::cluster_arrive(place);
    on_cpu::cluster_wait(place);
}
template <typename T> T *of_rank(T *shared, int rank) {
    return static_cast<T *>(on_cpu::of_rank(const_cast<void *>(static_cast<const void *>(shared)), rank));
}

// Launches follow one another as it is; but see mann_cuda_on_cpu_early.
inline void start_next() {}
inline void wait_for_previous(on_cpu::Place place = on_cpu::Place::current()) { on_cpu::wait_for_previous(place); }

// d += a b, by all threads of the warp.
inline void mma_bf16(float *d, const uint32_t *a, const uint32_t *b, on_cpu::Place place = on_cpu::Place::current()) {
    on_cpu::multiply(false, d, a, b, place);
}
inline void mma_tf32(float *d, const uint32_t *a, const uint32_t *b, on_cpu::Place place = on_cpu::Place::current()) {
    on_cpu::multiply(true, d, a, b, place);
}

// The same product of numbers that no tensor core takes there: for gradcheck.
inline void mma_double(double d[4], const double a[4], const double b[2]) {
    const int row = on_cpu::current->lane / 4, part = on_cpu::current->lane % 4;
    for (int k = 0; k < 8; ++k) {
        const double low = __shfl_sync(~0u, a[k / 4 * 2], row * 4 + k % 4);
        const double high = __shfl_sync(~0u, a[k / 4 * 2 + 1], row * 4 + k % 4);
        for (int column = 0; column < 2; ++column) {
            const double right = __shfl_sync(~0u, b[k / 4], (2 * part + column) * 4 + k % 4);
            d[column] += low * right, d[2 + column] += high * right;
        }
    }
}

template <typename X> X load_if(bool exists, const X *at) { return exists ? *at : X{}; }

// A copy takes place when it is waited for, the latest that a GPU may do it; ahead of another launch at once.
inline void make_or_keep(void *shared, const void *global, size_t bytes) {
    on_cpu::Copy copy{shared, global, bytes, on_cpu::current->groups};
    if (on_cpu::is_ahead()) copy.make();
    else on_cpu::current->copies.push_back(copy);
}
inline void copy_async16(void *shared, const void *global) {
    on_cpu::check_aligned(shared, 16, "asynchronous copy");
    on_cpu::check_aligned(global, 16, "asynchronous copy");
    make_or_keep(shared, global, 16);
}
template <typename X> void copy_async(X *shared, const X *global, bool exists) {
    make_or_keep(shared, exists ? global : nullptr, sizeof(X));
}
inline void copy_async_commit() { ++on_cpu::current->groups; }
template <int left> void copy_async_wait() {
    auto &copies = on_cpu::current->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group < on_cpu::current->groups - left; ++done) copies[done].make();
    copies.erase(copies.begin(), copies.begin() + done);
}

} // namespace mann::cuda
