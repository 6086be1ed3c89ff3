// The second half of a step of the memory, forward: see memory_step.h.
#include "memory_rows.h"

namespace mann::cuda {

// A block of memory_use that goes over slots: some of each thread at once.
constexpr int kSlotsAtOnce = kHeads <= 4 ? 4 : (kHeads <= 8 ? 2 : 1);
struct UseSlots {
    const MemoryUse<S> &a;
    const MemorySizes &s;
    const int b, step, chunk, slots_of_example;
    const int64_t ring;
    const bool weights_out, means_out, usage_wanted;
    T loaded[kSlotsAtOnce][kHeads], usage[kSlotsAtOnce][1], dweight[kSlotsAtOnce][kHeads];

    MANN_INLINE UseSlots(const MemoryUse<S> &args, int example, int step, int chunk)
        : a(args), s(a.sizes), b(example), step(step), chunk(chunk), slots_of_example(int(s.N)),
          ring(step % s.ring * s.B + example), weights_out(a.weights && step + 1 == length_of(s, example)),
          means_out(a.dweights && step + 1 == length_of(s, example)), usage_wanted(a.usage1 || a.candidate_slots) {}

    MANN_INLINE bool idle() const { return !weights_out && !means_out && !a.weights_copy && !usage_wanted; }
    MANN_INLINE int first() const { return chunk * a.chooser_slots + int(threadIdx.x); }
    MANN_INLINE int last() const { return min((chunk + 1) * a.chooser_slots, slots_of_example); }
    template <typename X> MANN_INLINE X *of_example(X *all, int numbers) const { return all + b * s.N * numbers; }

    // Of the slots from `from` on, `numbers` rows of [.., N].
    template <typename X, int numbers>
    MANN_INLINE void load_slots(const X *all, int from, T (&to)[kSlotsAtOnce][numbers]) const {
        X loaded_at_once[kSlotsAtOnce][numbers];
#pragma unroll
        for (int i = 0; i < kSlotsAtOnce * numbers; ++i) {
            const int n = from + i / numbers * kMemoryThreads;
            loaded_at_once[i / numbers][i % numbers] = load_if(n < last(), all + i % numbers * slots_of_example + n);
        }
#pragma unroll
        for (int i = 0; i < kSlotsAtOnce * numbers; ++i)
            to[i / numbers][i % numbers] = to_arith(loaded_at_once[i / numbers][i % numbers]);
    }
    MANN_INLINE void load(int from) {
        if (a.weights_in) load_slots(of_example(a.weights_in, kHeads), from, loaded);
        else if (a.logits) load_slots(a.logits + ring * kHeads * s.N, from, loaded);
        if (means_out) load_slots(of_example(a.dweights, kHeads), from, dweight);
        if (!usage_wanted) return;
        if (a.usage) load_slots(of_example(a.usage, 1), from, usage);
        else load_slots(of_example(a.usage1, 1), from, usage);
    }
    MANN_INLINE T weight_of(T logit, const T *total) const {
        return slots_of_example == 1 ? T(1) : exponential(logit - total[0]) * total[1];
    }
    MANN_INLINE void use(int from, const T *totals, Least &least, T (&means)[kHeads]) const {
#pragma unroll
        for (int u = 0; u < kSlotsAtOnce; ++u) {
            const int n = from + u * kMemoryThreads;
            if (n >= last()) break;
            T read = 0;
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                if (!a.logits && !a.weights_in) break;
                const int at = h * slots_of_example + n;
                const T weight = a.weights_in ? loaded[u][h] : weight_of(loaded[u][h], totals + 2 * h);
                read += weight;
                if (weights_out) of_example(a.weights, kHeads)[at] = to_storage<S>(weight);
                if (a.weights_copy) of_example(a.weights_copy, kHeads)[at] = weight;
                if (means_out) means[h] += weight * dweight[u][h];
            }
            if (!usage_wanted) continue;
            const T now = a.logits ? usage[u][0] + read : usage[u][0]; // eq. 5
            if (a.logits && a.usage1) of_example(a.usage1, 1)[n] = now;
            if (a.usage_out) of_example(a.usage_out, 1)[n] = to_storage<S>(now);
            if (a.candidate_slots) least.see(now, n);
        }
    }
    // After load() of the first slots.
    MANN_INLINE void run(const T *totals, T *shared, int32_t *shared_slots) {
        Least least;
        T means[kHeads] = {};
        for (int from = first(); from < last();) {
            use(from, totals, least, means);
            from += kSlotsAtOnce * kMemoryThreads;
            if (from < last()) load(from);
        }
        if (a.candidate_slots) choose_of_block(least, shared, shared_slots);
        if (means_out) give_means(means, shared);
    }
    MANN_INLINE void choose_of_block(Least &least, T *shared, int32_t *shared_slots) const {
        const int64_t to = (int64_t(b) * a.choosers + chunk) * kHeads;
        for (int h = 0; h < kHeads; ++h) {
            T u;
            int n;
            least.first_of_warp(u, n);
            T *usages = shared + h % 2 * kMemoryWarps;
            int32_t *slots = shared_slots + h % 2 * kMemoryWarps;
            if (lane_of_warp() == 0) usages[warp_of_block()] = u, slots[warp_of_block()] = n;
            __syncthreads();
#pragma unroll
            for (int warp = 0; warp < kMemoryWarps; ++warp)
                if (less_used(usages[warp], slots[warp], u, n)) u = usages[warp], n = slots[warp];
            if (least.slot[0] == n) least.drop_first();
            if (threadIdx.x == 0) a.candidate_usage[to + h] = u, a.candidate_slots[to + h] = n;
        }
        __syncthreads();
    }
    MANN_INLINE void give_means(const T (&means)[kHeads], T *shared) const {
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
            const T sum = sum_over_warp(means[h]);
            if (lane_of_warp() == 0) shared[warp_of_block() * kHeads + h] = sum;
        }
        __syncthreads();
        for (int h = int(threadIdx.x); h < kHeads; h += kMemoryThreads) {
            T sum = 0;
            for (int warp = 0; warp < kMemoryWarps; ++warp) sum += shared[warp * kHeads + h];
            a.means[(int64_t(b) * a.choosers + chunk) * kHeads + h] = sum;
        }
    }
};

// kReadColumns columns of the reads, the parts of each shared by the other threads.
MANN_INLINE void use_reads(const MemoryUse<S> &a, int b, int step, int reader, const T *totals, T *shared) {
    constexpr int groups = kMemoryThreads / kReadColumns;
    const MemorySizes &s = a.sizes;
    const int64_t ring = step % s.ring * s.B + b;
    const int column = reader * kReadColumns + int(threadIdx.x) % kReadColumns, h = min(column / kWidth, kHeads - 1);
    const T *found = a.found + ring * s.parts * kForwardPart;
    const int first = int(threadIdx.x) / kReadColumns, parts = column < kWords ? s.parts : 0;
    const auto place = [&](int part) { return found + int64_t(part) * kForwardPart; };
    T sum = 0;
    if constexpr (kBeta) {
        constexpr int at_once = 5;
#pragma unroll 1
        for (int from = first; from < parts; from += at_once * groups) {
            T read[at_once], logit[at_once];
#pragma unroll
            for (int j = 0; j < at_once; ++j) {
                const int part = from + j * groups;
                read[j] = load_if(part < parts, place(part) + 2 * kHeads + column);
                logit[j] = load_if(part < parts, place(part) + h);
            }
#pragma unroll
            for (int j = 0; j < at_once; ++j)
                if (from + j * groups < parts) sum += exponential(logit[j] - totals[2 * h]) * read[j];
        }
    } else {
        sum = sum_of<10>(first, parts, groups, [&](int part) { return place(part) + 2 * kHeads + column; });
    }
    sum = sum_columns<kReadColumns>(sum, shared);
    if (int(threadIdx.x) >= kReadColumns || column >= kWords) return;
    sum *= totals[2 * h + 1];
    if (a.reads) a.reads[(int64_t(step) * s.B + b) * a.reads_row + a.reads_at + column] = to_storage<S>(sum);
    if (a.reads_copy) a.reads_copy[ring * kWords + column] = sum;
}

using MemoryUseArgs = MemoryUse<S>;
MANN_KERNEL(memory_use, kMemoryThreads, MemoryUseArgs) {
    start_next();
    wait_for_previous();
    constexpr int numbers = kMemoryWarps * (kHeads > kReadColumns ? kHeads : (kReadColumns > 2 ? kReadColumns : 2));
    MANN_SHARED(T, totals, 2 * kHeads);
    MANN_SHARED(T, shared, numbers);
    MANN_SHARED(int32_t, shared_slots, 2 * kMemoryWarps);
    const MemoryUse<S> &a = args;
    const MemorySizes &s = a.sizes;
    const int blocks = a.choosers + a.readers, b = int(blockIdx.x) / blocks, block = int(blockIdx.x) % blocks;
    const int step = s.step + int(blockIdx.y);
    const int64_t ring = step % s.ring * s.B + b;
    if (step >= length_of(s, b)) {
        const int column = (block - a.choosers) * kReadColumns + int(threadIdx.x);
        if (block >= a.choosers && threadIdx.x < kReadColumns && column < kWords && a.reads)
            a.reads[(int64_t(step) * s.B + b) * a.reads_row + a.reads_at + column] = to_storage<S>(T(0));
        return;
    }
    UseSlots slots(a, b, step, block);
    if (block < a.choosers) {
        if (slots.idle()) return;
        if (slots.first() < slots.last()) slots.load(slots.first());
    }
    if (a.logits) {
        for (int h = warp_of_block(); h < kHeads; h += kMemoryWarps) {
            const Totals sums = sum_totals(a.found + ring * s.parts * kForwardPart, s.parts, h);
            if (lane_of_warp() == 0) totals[2 * h] = sums.largest, totals[2 * h + 1] = sums.inverse;
        }
        __syncthreads();
        if (a.totals && block == a.choosers)
            for (int i = int(threadIdx.x); i < 2 * kHeads; i += kMemoryThreads)
                a.totals[ring * 2 * kHeads + i] = totals[i];
    }
    if (block < a.choosers) slots.run(totals, shared, shared_slots);
    else use_reads(a, b, step, block - a.choosers, totals, shared);
}

} // namespace mann::cuda
