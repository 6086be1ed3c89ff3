// All that the kernels need of CUDA beside its own language: storage types, scalar functions for cells.h, shared
// memory, clusters, tensor cores, asynchronous copies and the launch. Knows nothing of torch.
//
// With MANN_CUDA_ON_CPU the same names come from cuda_on_cpu.h, which runs the kernels on the CPU, one fiber per
// thread.
#pragma once

#include <math.h>

#include <cstdint>

#if defined(MANN_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <stdexcept>
#include <string>

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

// The namespace of everything that runs on the GPU.
#define MANN_ISA cuda
#define MANN_INLINE __device__ __forceinline__

namespace mann::cuda {

using Bf16 = __nv_bfloat16;

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
MANN_INLINE float to_arith(Bf16 x) { return __bfloat162float(x); }
template <typename S> MANN_INLINE S to_storage(Arith<S> x) { return x; }
template <> MANN_INLINE Bf16 to_storage<Bf16>(float x) { return __float2bfloat16(x); }

// Clamped where the result would leave the exponent range; NaN stays NaN.
MANN_INLINE float exponential(float x) { return expf(x > 88.0f ? 88.0f : x); }
MANN_INLINE double exponential(double x) { return exp(x > 709.0 ? 709.0 : x); }
MANN_INLINE float exponential_minus_one(float x) { return expm1f(x > 88.0f ? 88.0f : x); }
MANN_INLINE double exponential_minus_one(double x) { return expm1(x > 709.0 ? 709.0 : x); }
MANN_INLINE float square_root(float x) { return sqrtf(x); }
MANN_INLINE double square_root(double x) { return sqrt(x); }

} // namespace mann::cuda

#include "../cells.h" // needs the functions above

#if defined(MANN_CUDA_ON_CPU)
namespace mann::cuda {
inline int thread_again() { return int(threadIdx.x); }
inline int block_again() { return int(blockIdx.x); }
} // namespace mann::cuda
#endif

#if !defined(MANN_CUDA_ON_CPU)

// Once per kernel: the dynamic shared memory of the launch as char *name, aligned to 16 bytes.
#define MANN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
// T name[N] in shared memory.
#define MANN_SHARED(T, name, N) __shared__ T name[N]

namespace mann::cuda {

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
#endif
MANN_INLINE void cluster_barrier() {
    cluster_arrive();
    cluster_wait();
}

// threadIdx.x and blockIdx.x, read anew: what is made of them is not kept in registers from one use to the next.
MANN_INLINE int thread_again() {
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return int(thread);
}
MANN_INLINE int block_again() {
    uint32_t block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return int(block);
}

// d += a b by a warp, on tensor cores: [16, 8] += [16, 16] [16, 8] in bfloat16, each thread with its share of the three
// as in PTX's mma.m16n8k16.
MANN_INLINE void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes, aligned, from global to shared memory while the thread goes on; seen by it after copy_async_wait<n>(),
// which waits for all but the last n committed groups.
MANN_INLINE void copy_async16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
                 "l"(global)
                 : "memory");
}
MANN_INLINE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n> MANN_INLINE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"); }

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char *what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("mann_kernels: ") + what + ": " + cudaGetErrorString(error));
}

// Launches `grid` blocks of `block` threads with `shared_bytes` of dynamic shared memory each, `cluster_blocks` of them
// to a cluster (1: no clusters); throws with CUDA's reason where that fails. Waits for nothing: may be captured in a
// graph.
template <typename... Parameters, typename... Args>
void launch(const char *name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int cluster_blocks,
            size_t shared_bytes, Stream stream, Args &&...args) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(cluster_blocks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    config.attrs = &cluster, config.numAttrs = cluster_blocks > 1;
    check(cudaLaunchKernelEx(&config, kernel, Parameters(args)...), name);
    check(cudaGetLastError(), name);
}

} // namespace mann::cuda

// `kernel` is a variable that points to it: its name goes into error messages.
#define MANN_LAUNCH(kernel, grid, block, cluster_blocks, shared_bytes, stream, ...)                                    \
    mann::cuda::launch(#kernel, kernel, grid, block, cluster_blocks, shared_bytes, stream, __VA_ARGS__)

#endif
