// An example of lrua_sequence in the blocks of a cluster, which share its slots: its head, and what they tell each
// other.
#pragma once

#include "parts.h"

namespace mann::cuda {

struct EpisodeShared {
    // By messages: two buffers, for a part that has those of the others may send the next before these have read its
    // own.
    alignas(16) T parts[2][kParts][kPart];
    Mailbox box[2];
    // Of the block.
    alignas(16) Step step;
    WarpSums warps;
};
constexpr int kPartBytes = kParts * kPart * int(sizeof(T));

struct Episode {
    EpisodeShared &s;
    const S *key, *gate, *beta, *add;
    int part = int(blockIdx.x) % kParts, example = int(blockIdx.x) / kParts, batch, number = 0;
    T fetched[kHeadShare]; // of the head of the step to come

    MANN_INLINE Episode(EpisodeShared &shared, const S *key, const S *gate, const S *beta, const S *add, int batch)
        : s(shared), key(key), gate(gate), beta(beta), add(add), batch(batch) {}
    MANN_INLINE int64_t row(int t) const { return int64_t(t) * batch + example; }

    // By one thread, before the cluster's first barrier.
    MANN_INLINE void open() { mailbox_open(&s.box[0], kPartBytes), mailbox_open(&s.box[1], kPartBytes); }

    MANN_INLINE void fetch_head(int t) {
        const int64_t at = row(t);
#pragma unroll
        for (int i = 0; i < kHeadShare; ++i) {
            const int p = thread_again() + i * kThreads;
            if (p >= kHead) break;
            fetched[i] = to_arith(p < kWords                   ? key[at * kWords + p]
                                  : p < kBetaAt                ? gate[at * R + p - kWords]
                                  : kKeyStrength && p < kAddAt ? beta[at * R + p - kBetaAt]
                                                               : add[at * kWords + p - kAddAt]);
        }
    }
    // The head that was fetched, to the step. Barrier before and after.
    MANN_INLINE void make_step() {
        make_head(s.step, [&](int, int i) { return fetched[i]; });
    }

    // Write, match, and the parts' shares of reads and sums to all: afterwards parts_now(). Barrier before; the step
    // may be made anew afterwards.
    MANN_INLINE void write_and_read(Rows &rows, T eps) {
        if (warp_of_block() < kRowWarps) {
            T *part = s.warps.of_warp();
            rows.write_and_match(s.step, eps, part + kTopAt);
            rows.sum_exps(part + kSumAt);
            rows.sum_rows(part);
        }
        __syncthreads();
        const int buffer = number & 1;
        for (int i = thread_again(); i < kPart / 4; i += kThreads) {
            const Four<T> sum = sum_warps(s.warps, i);
#pragma unroll
            for (int to = 0; to < kParts; ++to)
                if constexpr (kParts == 1) reinterpret_cast<Four<T> *>(s.parts[buffer][0])[i] = sum;
                else send(&s.parts[buffer][part][4 * i], to, &s.box[buffer], sum);
        }
        if constexpr (kParts == 1) {
            __syncthreads();
        } else {
            mailbox_wait(&s.box[buffer], number / 2);
            if (threadIdx.x == 0) mailbox_expect(&s.box[buffer], kPartBytes);
        }
        ++number;
    }
    MANN_INLINE const T (*parts_now() const)[kPart] { return s.parts[(number - 1) & 1]; }
};

MANN_INLINE int steps_of(const int64_t *lengths, int example, int steps) {
    return lengths ? int(max(min(int64_t(lengths[example]), int64_t(steps)), int64_t(0))) : steps;
}

} // namespace mann::cuda
