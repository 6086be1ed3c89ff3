// lrua_sequence, forward: an example to a cluster, its slots in the registers of the blocks.
#include "episode.h"
#include "lrua_sequence.h"

namespace mann::cuda {

struct ForwardShared {
    EpisodeShared episode;
    Candidate candidates[2][kParts][R]; // by messages
    Mailbox candidate_box[2];
    alignas(4 * sizeof(Order)) Order usage[kOrders];
};
constexpr int kCandidateBytes = kParts * R * int(sizeof(Candidate));

struct Forward {
    const LruaForward<S> &a;
    ForwardShared &s;
    Episode episode;
    Rows rows;

    MANN_INLINE Forward(const LruaForward<S> &args, ForwardShared &shared)
        : a(args), s(shared), episode(shared.episode, args.key, args.gate, args.beta, args.add, args.batch), rows{} {
        rows.part = episode.part;
    }
    // The slots of step t, of what is known after the step before. Barrier before and after.
    MANN_INLINE void choose(int t) {
        const int buffer = t & 1;
        rows.choose(s.usage, [&](int h, Order order, int slot) {
            if constexpr (kParts == 1) {
                s.episode.step.slots[h] = slot;
            } else {
#pragma unroll
                for (int to = 0; to < kParts; ++to)
                    send(&s.candidates[buffer][episode.part][h].at[0], to, &s.candidate_box[buffer],
                         Candidate{{order, Order(slot)}});
            }
        });
        if constexpr (kParts > 1) {
            mailbox_wait(&s.candidate_box[buffer], t / 2);
            if (threadIdx.x == 0) mailbox_expect(&s.candidate_box[buffer], kCandidateBytes);
            merge_candidates(s.candidates[buffer], s.episode.step);
        }
    }
    MANN_INLINE void run() {
        const int64_t b = episode.example;
        const int length = steps_of(a.lengths, episode.example, a.steps);
        if (threadIdx.x == 0) {
            episode.open();
            mailbox_open(&s.candidate_box[0], kCandidateBytes), mailbox_open(&s.candidate_box[1], kCandidateBytes);
        }
        rows.take_memory(a.memory + b * N * W);
        rows.take_weights(a.read_weights + b * R * N);
#pragma unroll
        for (int i = 0; i < kRows; ++i) rows.usage[i] = rows.exists(i) ? to_arith(a.usage[b * N + rows.slot(i)]) : T(0);
        rows.open_usage(s.usage);
        rows.give_usage(s.usage);
        open_step(s.episode.step);
        if (length > 0) episode.fetch_head(0);
        cluster_barrier();
        for (int t = 0; t < length; ++t) {
            choose(t);
            episode.make_step();
            if (t + 1 < length) episode.fetch_head(t + 1);
            __syncthreads();
            if (a.saved_least_used && episode.part == 0 && int(threadIdx.x) < R)
                a.saved_least_used[episode.row(t) * R + threadIdx.x] = s.episode.step.slots[threadIdx.x];
            episode.write_and_read(rows, T(a.eps));
            finish_step(rows, episode.parts_now(), s.episode.warps, T(a.decay));
            rows.give_usage(s.usage);
            if (episode.part == 0)
                for (int k = thread_again(); k < kWords; k += kThreads)
                    a.reads[episode.row(t) * kWords + k] = to_storage<S>(read_of(episode.parts_now(), k));
            if (a.saved_memory && (t + 1) % a.checkpoint_every == 0 && t + 1 < a.steps) copy_state(t);
            __syncthreads();
        }
        finish(length);
        cluster_barrier(); // nobody writes to a block that has ended
    }
    MANN_INLINE void copy_state(int t) {
        const int64_t copy = episode.row(t / a.checkpoint_every);
        rows.give_memory(a.saved_memory + copy * N * W);
        rows.give_weights(a.saved_read_weights + copy * R * N);
    }
    MANN_INLINE void finish(int length) {
        const int64_t b = episode.example;
        for (int t = length; t < a.steps; ++t) {
            for (int k = thread_again(); k < kWords && episode.part == 0; k += kThreads)
                a.reads[episode.row(t) * kWords + k] = to_storage<S>(T(0));
            if (a.saved_least_used && episode.part == 0 && int(threadIdx.x) < R)
                a.saved_least_used[episode.row(t) * R + threadIdx.x] = 0;
            if (a.saved_memory && (t + 1) % a.checkpoint_every == 0 && t + 1 < a.steps) copy_state(t);
        }
        rows.give_memory(a.memory1 + b * N * W);
        rows.give_weights(a.read_weights1 + b * R * N);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            if (rows.exists(i) && rows.lane() == 0) a.usage1[b * N + rows.slot(i)] = to_storage<S>(rows.usage[i]);
    }
};

MANN_KERNEL(lrua_sequence_forward, MANN_BOUNDS(kThreads, 1), LruaForward<S>) {
    MANN_DYNAMIC_SHARED(memory);
    static_assert(sizeof(ForwardShared) <= MANN_SHARED_BYTES);
    Forward(args, *reinterpret_cast<ForwardShared *>(memory)).run();
}

} // namespace mann::cuda
