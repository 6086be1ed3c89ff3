// content_address on clusters: the memory's step of rows.h with nothing to write, an example to a cluster.
#include "content_address.h"
#include "parts.h"
#include "rows_backward.h"

namespace mann::cuda {

struct ForwardShared {
    PartSums sums; // by messages
    alignas(16) Step step;
};

struct BackwardShared {
    // By messages.
    alignas(16) T dhead_parts[kParts][kSent];
    Mailbox dhead_box;
    PartSums sums;
    // Of the block.
    alignas(16) T own_dhead[kSent]; // of dhead_parts
    alignas(16) Step step;
    alignas(16) T dreads[W][kHeads];
    T nothing[kWords], means[kHeads];
    WarpGradients warps;
};
constexpr int kDheadBytes = kParts * kSent * int(sizeof(T));

// A step whose least used slots are none: it erases nothing, and without read weights before it writes nothing.
MANN_INLINE void make_step(Step &step, const S *key, const S *beta, int64_t example) {
    open_step(step);
    if (int(threadIdx.x) < R) step.slots[threadIdx.x] = -1;
    __syncthreads();
    make_head(step, [&](int p, int) {
        if (p < kWords) return to_arith(key[example * kWords + p]);
        return kKeyStrength && p >= kBetaAt ? to_arith(beta[example * R + p - kBetaAt]) : T(0);
    });
}

MANN_KERNEL(content_address_forward, MANN_BOUNDS(kThreads, 1), AddressForward<S>) {
    MANN_DYNAMIC_SHARED(memory);
    static_assert(sizeof(ForwardShared) <= MANN_SHARED_BYTES);
    ForwardShared &s = *reinterpret_cast<ForwardShared *>(memory);
    const int64_t example = int(blockIdx.x) / kParts;
    Rows rows{};
    rows.part = int(blockIdx.x) % kParts;
    if (threadIdx.x == 0) open_sums(s.sums);
    rows.take_memory(args.memory + example * N * W);
    make_step(s.step, args.key, args.beta, example);
    cluster_barrier(); // every block is there to be written to
    if (warp_of_block() < kRowWarps) rows.write_and_match(s.step, T(args.eps), s.sums.tops[warp_of_block()]);
    int exchanges = 0;
    finish_recomputed(rows, s.sums, 0, exchanges);
    rows.give_weights(args.read_weights + example * R * N);
    cluster_barrier(); // nobody writes to a block that has ended
}

MANN_KERNEL(content_address_backward, MANN_BOUNDS(kThreads, 1), AddressBackward<S>) {
    MANN_DYNAMIC_SHARED(memory);
    static_assert(sizeof(BackwardShared) <= MANN_SHARED_BYTES);
    BackwardShared &s = *reinterpret_cast<BackwardShared *>(memory);
    const int64_t example = int(blockIdx.x) / kParts;
    RowsBackward rows{};
    rows.part = int(blockIdx.x) % kParts;
    if (threadIdx.x == 0) open_sums(s.sums), mailbox_open(&s.dhead_box, kDheadBytes);
    rows.take_memory(args.memory + example * N * W);
    rows.take_weights(args.read_weights + example * R * N);
    rows.take_dweights(args.dread_weights + example * R * N);
    make_step(s.step, args.key, args.beta, example);
    for (int i = thread_again(); i < W * kHeads; i += kThreads) s.dreads[i / kHeads][i % kHeads] = 0;
    for (int p = thread_again(); p < kSent; p += kThreads) s.own_dhead[p] = 0;
    cluster_barrier();
    if (warp_of_block() < kRowWarps) rows.sum_means(s.sums.sums[warp_of_block()]);
    int exchanges = 0;
    exchange_sums(s.sums, 0, rows.part, exchanges, false);
    for (int h = thread_again(); h < kHeads; h += kThreads) s.means[h] = h < R ? s.sums.total[h] : T(0);
    __syncthreads();
    if (warp_of_block() < kRowWarps) rows.undo(s.step, s.dreads, s.means, s.nothing, T(args.eps), s.warps);
    __syncthreads();
    for (int p = thread_again(); p < kHead; p += kThreads) {
        const T sum = head_gradient(s.warps, s.step, p);
        (kParts == 1 ? s.dhead_parts[0] : s.own_dhead)[p] = sum;
    }
    __syncthreads();
    if constexpr (kParts > 1) { // a share of the sums to every block
        for (int i = thread_again(); i < kSent / 4 * kParts; i += kThreads) {
            const int p = i % (kSent / 4), to = i / (kSent / 4);
            send(&s.dhead_parts[rows.part][4 * p], to, &s.dhead_box, reinterpret_cast<const Four<T> *>(s.own_dhead)[p]);
        }
        mailbox_wait(&s.dhead_box, 0);
    }
    for (int p = thread_again(); p < kHead; p += kThreads) {
        if (p % kParts != rows.part) continue;
        T sum = 0;
#pragma unroll
        for (int part = 0; part < kParts; ++part) sum += s.dhead_parts[part][p];
        if (p < kWords) args.dkey[example * kWords + p] = to_storage<S>(sum);
        else if (kKeyStrength && p >= kBetaAt) args.dbeta[example * R + p - kBetaAt] = to_storage<S>(sum);
    }
    rows.give_dmemory(args.dmemory + example * N * W);
    cluster_barrier(); // nobody writes to a block that has ended
}

} // namespace mann::cuda
