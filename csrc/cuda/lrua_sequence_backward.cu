// lrua_sequence, backward: an example to a cluster, its slots and their gradient in the registers of the blocks. A
// segment of steps at a time, the last one first: its steps are recomputed, then undone.
#include "episode.h"
#include "lrua_sequence.h"
#include "rows_backward.h"

namespace mann::cuda {

struct BackwardShared {
    EpisodeShared episode;
    // By messages, two buffers as in EpisodeShared.
    alignas(16) T dhead_parts[2][kParts][kSent];
    Mailbox dhead_box[2];
    PartSums sums;
    // Of the block.
    alignas(16) T own_dhead[kSent];
    alignas(16) T dreads[W][kHeads];
    T overwritten[kWords], means[kHeads], mean_parts[kHeads]; // means: as far as they come through the reads
    WarpGradients warps;
};
constexpr int kDheadBytes = kParts * kSent * int(sizeof(T));

struct Backward {
    const LruaBackward<S> &a;
    BackwardShared &s;
    Episode episode;
    RowsBackward rows;
    int undone = 0, exchanges = 0;
    // Of the step to come.
    int fetched_slot;
    T fetched_mean, fetched_dreads[share_of(kWords)], fetched_overwritten[share_of(kWords)];

    MANN_INLINE Backward(const LruaBackward<S> &args, BackwardShared &shared)
        : a(args), s(shared), episode(shared.episode, args.key, args.gate, args.beta, args.add, args.batch), rows{} {
        rows.part = episode.part;
    }
    MANN_INLINE int64_t record(int j) const { return episode.row(j); } // of step j of a segment
    MANN_INLINE int64_t copy_before(int start) const { return episode.row(start / a.checkpoint_every - 1); }
    MANN_INLINE T *means_of(int j) const { return a.means + (record(j) * kParts + episode.part) * R; }

    MANN_INLINE void fetch_head(int t) {
        episode.fetch_head(t);
        if (int(threadIdx.x) < R) fetched_slot = a.saved_least_used[episode.row(t) * R + threadIdx.x];
    }
    // What was fetched, to the step. Barrier before and after.
    MANN_INLINE void make_step() {
        episode.make_step();
        if (int(threadIdx.x) < R) // whoever calls, no slot is outside memory
            s.episode.step.slots[threadIdx.x] = max(0, min(fetched_slot, N - 1));
    }
    // The reads of step t times their gradient: what the softmax takes off, as far as it comes through the reads.
    MANN_INLINE void give_means(int t, int j) const {
        for (int h = warp_of_block(); h < R; h += kWarps) {
            const Factors factors(episode.parts_now(), h);
            const S *dreads = a.dreads + episode.row(t) * kWords + h * W;
            T mean = 0;
#pragma unroll 2
            for (int w = lane_of_warp(); w < W; w += kWarp)
                mean += read_of(episode.parts_now(), h * W + w, factors) * to_arith(dreads[w]);
            mean = sum_lanes(mean, 1, kWarp);
            if (lane_of_warp() == 0) means_of(j)[h] = mean;
        }
    }
    MANN_INLINE void recompute_steps(int start, int stop) {
        const int64_t b = episode.example;
        if (start == 0) {
            rows.take_memory(a.memory + b * N * W);
            rows.take_weights(a.read_weights + b * R * N);
        } else {
            rows.take_memory(a.saved_memory + copy_before(start) * N * W);
            rows.take_weights(a.saved_read_weights + copy_before(start) * R * N);
        }
        fetch_head(start);
        for (int t = start; t < stop; ++t) {
            const int j = t - start;
            make_step();
            if (t + 1 < stop) fetch_head(t + 1);
            __syncthreads();
            rows.give_overwritten(s.episode.step, a.overwritten + record(j) * kWords);
            episode.write_and_read(rows, T(a.eps));
            finish_step(rows, episode.parts_now(), s.episode.warps, T(0));
            give_means(t, j);
            rows.give_record(a.weights + record(j) * N * kHeads);
            if ((j + 1) % kRestartEvery == 0) rows.give_memory(a.restarts + record(j / kRestartEvery) * N * W);
            __syncthreads();
        }
    }
    // What undoing step t needs, before it is needed.
    MANN_INLINE void fetch(int t, int start) {
        const int64_t b = episode.example;
        const int j = t - start;
        fetch_head(t);
#pragma unroll
        for (int i = 0; i < share_of(kWords); ++i) {
            const int k = thread_again() + i * kThreads;
            if (k >= kWords) break;
            fetched_dreads[i] = to_arith(a.dreads[episode.row(t) * kWords + k]);
            fetched_overwritten[i] =
                a.overwritten[record(j) * kWords + k]; // of slots of the part; no other is looked at
        }
        if (int(threadIdx.x) < R) fetched_mean = means_of(j)[threadIdx.x];
        if (j > 0) rows.take_record(a.weights + record(j - 1) * N * kHeads);
        else if (start == 0) rows.take_next(a.read_weights + b * R * N);
        else rows.take_next(a.saved_read_weights + copy_before(start) * R * N);
        if ((j + 1) % kRestartEvery == 0) rows.take_memory(a.restarts + record(j / kRestartEvery) * N * W);
    }
    MANN_INLINE void undo(int t, int start) {
        make_step();
#pragma unroll
        for (int i = 0; i < share_of(kWords); ++i) {
            const int k = thread_again() + i * kThreads;
            if (k >= kWords) break;
            s.dreads[k % W][k / W] = fetched_dreads[i], s.overwritten[k] = fetched_overwritten[i];
        }
        if (int(threadIdx.x) < R) s.means[threadIdx.x] = fetched_mean + s.mean_parts[threadIdx.x];
        __syncthreads();
        if (warp_of_block() < kRowWarps) rows.undo(s.episode.step, s.dreads, s.means, s.overwritten, T(a.eps), s.warps);
        __syncthreads();
        if (t > start) fetch(t - 1, start);
        const int buffer = undone & 1;
        T *own = kParts == 1 ? s.dhead_parts[buffer][0] : s.own_dhead;
        for (int p = thread_again(); p < kHead + R; p += kThreads) own[p] = head_gradient(s.warps, s.episode.step, p);
        for (int p = kHead + R + thread_again(); p < kSent; p += kThreads) own[p] = 0;
        __syncthreads();
        if constexpr (kParts > 1) {
            for (int i = thread_again(); i < kSent / 4 * kParts; i += kThreads) {
                const int p = i % (kSent / 4), to = i / (kSent / 4);
                send(&s.dhead_parts[buffer][episode.part][4 * p], to, &s.dhead_box[buffer],
                     reinterpret_cast<const Four<T> *>(s.own_dhead)[p]);
            }
            mailbox_wait(&s.dhead_box[buffer], undone / 2);
            if (threadIdx.x == 0) mailbox_expect(&s.dhead_box[buffer], kDheadBytes);
        }
        for (int p = thread_again(); p < kHead + R; p += kThreads) {
            T sum = 0;
#pragma unroll
            for (int part = 0; part < kParts; ++part) sum += s.dhead_parts[buffer][part][p];
            if (p >= kMeanAt) s.mean_parts[p - kMeanAt] = sum;
            else if (p % kParts == episode.part) store(t, p, sum);
        }
        ++undone;
        __syncthreads();
    }
    MANN_INLINE void store(int t, int p, T x) const {
        const int64_t at = episode.row(t);
        if (p < kWords) a.dkey[at * kWords + p] = to_storage<S>(x);
        else if (p < kBetaAt) a.dgate[at * R + p - kWords] = to_storage<S>(x);
        else if (kKeyStrength && p < kAddAt) a.dbeta[at * R + p - kBetaAt] = to_storage<S>(x);
        else a.dadd[at * kWords + p - kAddAt] = to_storage<S>(x);
    }
    MANN_INLINE void run() {
        const int64_t b = episode.example;
        const int length = steps_of(a.lengths, episode.example, a.steps);
        if (threadIdx.x == 0) {
            episode.open(), open_sums(s.sums);
            mailbox_open(&s.dhead_box[0], kDheadBytes), mailbox_open(&s.dhead_box[1], kDheadBytes);
        }
        open_step(s.episode.step);
        for (int i = thread_again(); i < W * kHeads; i += kThreads) s.dreads[i / kHeads][i % kHeads] = 0;
        for (int h = thread_again(); h < kHeads; h += kThreads) s.mean_parts[h] = 0;
        rows.take_dmemory(a.dmemory1 ? a.dmemory1 + b * N * W : nullptr);
        rows.take_dweights(a.dread_weights1 ? a.dread_weights1 + b * R * N : nullptr);
        for (int t = length + episode.part; t < a.steps; t += kParts)
            for (int p = thread_again(); p < kHead; p += kThreads) store(t, p, T(0));
        cluster_barrier();
        for (int stop = length; stop > 0;) {
            const int start = (stop - 1) / a.checkpoint_every * a.checkpoint_every;
            recompute_steps(start, stop);
            if (stop == length && a.dread_weights1) { // the means of the step that is undone first
                if (warp_of_block() < kRowWarps) rows.sum_means(s.sums.sums[warp_of_block()]);
                exchange_sums(s.sums, 0, episode.part, exchanges, false);
                if (int(threadIdx.x) < R) s.mean_parts[threadIdx.x] = s.sums.total[threadIdx.x];
            }
            fetch(stop - 1, start);
            __syncthreads();
            for (int t = stop - 1; t >= start; --t) undo(t, start);
            stop = start;
        }
        rows.give_dmemory(a.dmemory + b * N * W);
        rows.give_dweights(a.dread_weights + b * R * N);
        cluster_barrier(); // nobody writes to a block that has ended
    }
};

MANN_KERNEL(lrua_sequence_backward, MANN_BOUNDS(kThreads, 1), LruaBackward<S>) {
    MANN_DYNAMIC_SHARED(memory);
    static_assert(sizeof(BackwardShared) <= MANN_SHARED_BYTES);
    Backward(args, *reinterpret_cast<BackwardShared *>(memory)).run();
}

} // namespace mann::cuda
