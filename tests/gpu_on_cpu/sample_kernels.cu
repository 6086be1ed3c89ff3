// Small kernels, right and with one fault each: what the tests try CUDA on the CPU on.
#include "device.h"

using namespace mann::cuda;

enum Fault {
    RIGHT,
    MISSING_BARRIER,
    DIVERGENT_BARRIER,
    ENDS_BEFORE_BARRIER,
    EXITED_LANE,
    ONE_PAST_SHARED,
    ONE_PAST_GLOBAL,
    ACROSS_BLOCKS,
    MISALIGNED,
    MISSING_CLUSTER_BARRIER,
    SINGLE_BUFFER,
    NO_LAST_BARRIER,
    ONE_PAST_OF_OTHER,
    NO_WAIT,
    SHUFFLE_FOR_BARRIER,
};

// out[block] = the sum of the block's n numbers; n is a multiple of 4 threads.
template <Fault fault> __global__ void sums(const float *in, float *out, int n) {
    MANN_DYNAMIC_SHARED(bytes);
    float *of_warp = reinterpret_cast<float *>(bytes);
    const float *mine = in + blockIdx.x * n;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    float sum = 0;
    for (int i = 4 * tid; i < n; i += 4 * blockDim.x) {
        const float4 four = *reinterpret_cast<const float4 *>(mine + i + (fault == MISALIGNED && i + 8 < n));
        sum += four.x + four.y + four.z + four.w;
    }
    if (fault == ONE_PAST_GLOBAL && tid == 0 && blockIdx.x == gridDim.x - 1) sum += mine[n];
    if (fault == EXITED_LANE && tid == 33) return;
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    if (lane == 0) of_warp[warp + (fault == ONE_PAST_SHARED && warp == 1)] = sum;
    if (fault == ENDS_BEFORE_BARRIER && warp == 1) return;
    if (fault == DIVERGENT_BARRIER && warp == 1) __syncthreads();
    if (fault != MISSING_BARRIER) __syncthreads();
    if (tid != 0) return;
    float total = 0;
    for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) total += of_warp[i];
    if (fault == ACROSS_BLOCKS) out[0] += total;
    else out[blockIdx.x] = total;
}

// n times: every block's number becomes the mean of those of its cluster, plus one.
template <Fault fault> __global__ void exchange(const float *in, float *out, int n) {
    MANN_SHARED(float, numbers, 2 * 8); // two buffers of one number from each block
    const int size = cluster_size(), rank = cluster_rank(), to = threadIdx.x;
    float mine = in[blockIdx.x];
    cluster_barrier(); // all blocks are there
    for (int step = 0; step < n; ++step) {
        const int buffer = fault == SINGLE_BUFFER ? 0 : step % 2 * 8;
        if (to < size)
            of_rank(numbers + buffer, to)[rank + (fault == ONE_PAST_OF_OTHER && buffer ? 8 - size + 1 : 0)] = mine;
        if (fault != MISSING_CLUSTER_BARRIER) cluster_barrier();
        mine = 1;
        for (int i = 0; i < size; ++i) mine += numbers[buffer + i] / size;
    }
    if (fault == NO_LAST_BARRIER && to < size) of_rank(numbers, (rank + 1) % size)[rank] = mine;
    if (threadIdx.x == 0) out[blockIdx.x] = mine;
}

// The same barrier in two halves, with work between them that no other block sees.
__global__ void exchange_in_halves(const float *in, float *out, int n) {
    MANN_SHARED(float, number, 1);
    if (threadIdx.x == 0) number[0] = in[blockIdx.x];
    cluster_arrive();
    float other = n;
    cluster_wait();
    other += *of_rank(number, (cluster_rank() + 1) % cluster_size());
    cluster_barrier();
    if (threadIdx.x == 0) out[blockIdx.x] = other;
}

// out [16,8] = out + a [16,16] b, in bfloat16 by one warp; in is a, then b.
__global__ void product(const float *in, float *out, int n) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4, depth = 16;
    const float *b = in + 16 * depth;
    const auto two = [](float low, float high) {
        return static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16(low))) |
               static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16(high))) << 16;
    };
    uint32_t a_share[4], b_share[2];
    for (int i = 0; i < 4; ++i) {
        const float *row = in + (g + i % 2 * 8) * depth;
        const int column = 2 * t + i / 2 * 8;
        a_share[i] = two(row[column], row[column + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        const int row = 2 * t + i * 8;
        b_share[i] = two(b[row * 8 + g], b[(row + 1) * 8 + g]);
    }
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = out[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    for (int i = 0; i < n; ++i) mma_bf16(sums, a_share, b_share);
    for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// out = in, through shared memory by asynchronous copies in two groups; n numbers, 4 to a thread and group.
template <Fault fault> __global__ void copy(const float *in, float *out, int n) {
    MANN_DYNAMIC_SHARED(bytes);
    float *numbers = reinterpret_cast<float *>(bytes);
    const int mine = 4 * threadIdx.x, half = n / 2;
    copy_async16(numbers + mine, in + mine);
    copy_async_commit();
    copy_async16(numbers + half + mine, in + half + mine);
    copy_async_commit();
    copy_async_wait<1>();
    for (int i = 0; i < 4; ++i) out[mine + i] = numbers[mine + i];
    if (fault != NO_WAIT) copy_async_wait<0>();
    for (int i = 0; i < 4; ++i) out[half + mine + i] = numbers[half + mine + i];
    if (fault == NO_WAIT) copy_async_wait<0>();
}

// Of each thread: what it gets by shuffles of its number, and votes on whether it is positive. [8, threads]
__global__ void collectives(const float *in, float *out, int n) {
    const int tid = threadIdx.x, threads = blockDim.x;
    const float mine = in[tid];
    out[tid] = __shfl_sync(~0u, mine, 5);
    out[threads + tid] = __shfl_sync(~0u, mine, tid + 1, 8);
    out[2 * threads + tid] = __shfl_up_sync(~0u, mine, n);
    out[3 * threads + tid] = __shfl_down_sync(~0u, mine, n, 16);
    out[4 * threads + tid] = __shfl_xor_sync(~0u, mine, 3);
    out[5 * threads + tid] = static_cast<float>(__popc(__ballot_sync(~0u, mine > 0)));
    out[6 * threads + tid] = static_cast<float>(__any_sync(~0u, mine > 2) + 2 * __all_sync(~0u, mine > -9));
    out[7 * threads + tid] = static_cast<float>(__syncthreads_count(mine > 0) + 1000 * __syncthreads_or(mine > 2));
}

// Threads of a warp hand numbers on through shared memory.
template <Fault fault> __global__ void hand_on(const float *in, float *out, int n) {
    MANN_SHARED(float, numbers, 1024);
    const int tid = threadIdx.x;
    float mine = in[tid];
    for (int step = 0; step < n; ++step) {
        numbers[tid] = mine;
        if (fault == SHUFFLE_FOR_BARRIER) __any_sync(~0u, step);
        else __syncwarp();
        mine = numbers[tid / 32 * 32 + (tid + 1) % 32];
        __syncwarp();
    }
    out[tid] = mine;
}

// Numbers that name the thread, and what bfloat16 makes of others. [3, blocks, threads]
__global__ void numbers(const float *in, float *out, int n) {
    const int tid = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int threads = blockDim.x * blockDim.y * blockDim.z, blocks = gridDim.x * gridDim.y * gridDim.z;
    const int at = block * threads + tid, all = blocks * threads;
    out[at] = static_cast<float>(at);
    out[all + at] = in[at % n];
    out[2 * all + at] = __bfloat162float(__float2bfloat16(in[at % n]));
}

#if defined(MANN_CUDA_ON_CPU)
#include <map>
#include <string>

// out[i] = the thread that came i-th.
__global__ void order(const float *, float *out, int) {
    static int come;
    if (come == static_cast<int>(gridDim.x * blockDim.x)) come = 0;
    out[come++] = static_cast<float>(blockIdx.x * blockDim.x + threadIdx.x);
}

using Kernel = void (*)(const float *, float *, int);
static const std::map<std::string, Kernel> kernels = {
    {"sums", sums<RIGHT>},
    {"sums, missing barrier", sums<MISSING_BARRIER>},
    {"sums, divergent barrier", sums<DIVERGENT_BARRIER>},
    {"sums, ends before barrier", sums<ENDS_BEFORE_BARRIER>},
    {"sums, exited lane", sums<EXITED_LANE>},
    {"sums, one past shared", sums<ONE_PAST_SHARED>},
    {"sums, one past global", sums<ONE_PAST_GLOBAL>},
    {"sums, across blocks", sums<ACROSS_BLOCKS>},
    {"sums, misaligned", sums<MISALIGNED>},
    {"exchange", exchange<RIGHT>},
    {"exchange, missing cluster barrier", exchange<MISSING_CLUSTER_BARRIER>},
    {"exchange, single buffer", exchange<SINGLE_BUFFER>},
    {"exchange, no last barrier", exchange<NO_LAST_BARRIER>},
    {"exchange, one past of other", exchange<ONE_PAST_OF_OTHER>},
    {"exchange in halves", exchange_in_halves},
    {"product", product},
    {"copy", copy<RIGHT>},
    {"copy, no wait", copy<NO_WAIT>},
    {"collectives", collectives},
    {"hand on", hand_on<RIGHT>},
    {"hand on, shuffle for barrier", hand_on<SHUFFLE_FOR_BARRIER>},
    {"numbers", numbers},
    {"order", order},
};

// What went wrong, or null.
extern "C" __attribute__((visibility("default"))) const char *run_sample(const char *name, const unsigned *grid,
                                                                         const unsigned *block, int cluster, int shared,
                                                                         const float *in, float *out, int n) {
    static std::string said;
    try {
        const Kernel kernel = kernels.at(name);
        mann::on_cpu::launch("kernel", dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), cluster,
                             size_t(shared), [&] { kernel(in, out, n); });
        return nullptr;
    } catch (const std::exception &error) {
        said = error.what();
        return said.c_str();
    }
}
#endif
