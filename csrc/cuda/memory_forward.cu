// One step of the memory forward: see memory_step.h.
#include "memory_rows.h"

namespace mann::cuda {

// Rows that a warp has under way at once, so that enough bytes are.
constexpr int kAtOnce = kColumns >= 16 ? 1 : (kColumns >= 8 ? 2 : 4);
constexpr int kSharedColumns = kParts > 1 ? 1 : kMemoryWarps * kWords;

struct WriteTile {
    const MemoryWrite<S> &a;
    const MemorySizes &s;
    const int b, first, last, slots_of_example; // the example, and the slots of the tile
    const int64_t at, now;                      // the row of the head, [T, B]; of the example in [ring, B]
    const T eps, decay;
    // Of the example.
    const S *const memory_in;
    const T *const memory_in_t;
    T *const memory, *const memory_copy, *const logits, *const usage1;
    S *const memory1;
    HeadColumns head;
    Weights previous;
    T m[kAtOnce][kColumns], loaded[kAtOnce][kOwn], usage[kAtOnce]; // of the rows under way
    T logit[kAtOnce][kOwn];
    T reads[kHeads][kColumns], largest[kOwn], sum[kOwn];

    MANN_INLINE WriteTile(const MemoryWrite<S> &args, int example, int tile)
        : a(args), s(a.sizes), b(example), first(tile * s.tile_slots), last(min(first + s.tile_slots, int(s.N))),
          slots_of_example(int(s.N)), at(int64_t(s.step) * s.B + example), now(ring(s.step)), eps(T(a.eps)),
          decay(T(a.decay)), memory_in(starts() || !kWrite ? of_example(a.before.memory, kWidth) : nullptr),
          memory_in_t(of_example(starts() ? a.before.memory_t : static_cast<const T *>(a.memory), kWidth)),
          memory(of_example(a.memory, kWidth)), memory_copy(of_example(a.memory_copy, kWidth)),
          logits(a.logits + now * kHeads * s.N), usage1(of_example(a.usage1, 1)),
          memory1(of_example(a.memory1, kWidth)) {
        if constexpr (!kWrite) return;
        previous.only_slot = slots_of_example == 1;
        if (!starts()) previous.logits = a.logits + ring(s.step - 1) * kHeads * s.N;
        else if (a.before.weights) previous.plain = of_example(a.before.weights, kHeads);
        else previous.plain_t = of_example(a.before.weights_t, kHeads);
    }

    MANN_INLINE int64_t ring(int step) const { return step % s.ring * s.B + b; }
    MANN_INLINE bool starts() const { return s.step == a.before.start; }
    template <typename X> MANN_INLINE X *of_example(X *all, int numbers) const {
        return all ? all + b * s.N * numbers : nullptr;
    }
    MANN_INLINE int slot(int base, int u) const { return base + u * kRows + row_of_warp(); }
    MANN_INLINE int weight_at(int k, int n) const { return own_head(k) * slots_of_example + n; }

    // Loads that wait for nothing.
    MANN_INLINE void load(int base) {
        if (memory_in) load_rows(memory_in, base);
        else load_rows(memory_in_t, base);
        if constexpr (!kWrite) return;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
#pragma unroll
            for (int k = 0; k < kOwn; ++k) {
                const int n = slot(base, u);
                loaded[u][k] = n < last && own_head(k) < kHeads ? previous.load(weight_at(k, n)) : T(0);
            }
        if (!usage1 || lane_of_row() != 0) return;
        const S *given = s.step == 0 && a.usage ? a.usage + b * s.N : nullptr;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int n = slot(base, u);
            if (n < last) usage[u] = given ? T(to_arith(given[n])) : usage1[n];
        }
    }
    template <typename X> MANN_INLINE void load_rows(const X *rows, int base) {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) load_row(rows + slot(base, u) * kWidth, slot(base, u) < last, m[u]);
    }
    template <typename X> MANN_INLINE void store_rows(X *rows, int base) const {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) store_row(rows + slot(base, u) * kWidth, slot(base, u) < last, m[u]);
    }

    // Eq. 7 and 8 of the rows under way. chosen: whether the tile has least-used slots at all.
    MANN_INLINE void write(int base, const int32_t *slots, bool chosen) {
        T written[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int n = slot(base, u), place = chosen && n < last ? place_of(slots, n) : -1;
            if (chosen && place >= 0 && a.overwritten)
                store_row(a.overwritten + (now * kHeads + place) * kWidth, true, m[u]);
            T own[kOwn];
#pragma unroll
            for (int k = 0; k < kOwn; ++k)
                own[k] = head.gate[k] * previous.weight(loaded[u][k], k) +
                         (1 - head.gate[k]) * own_slot(place, own_head(k), a.shared);
            if (chosen && is_erased(place, a.erase_all)) {
#pragma unroll kUnroll
                for (int i = 0; i < kColumns; ++i) m[u][i] = 0;
            }
            written[u] = 0;
#pragma unroll kUnroll
            for (int h = 0; h < kHeads; ++h) {
                const T weight = of_head(own, h);
                written[u] += weight;
#pragma unroll kUnroll
                for (int i = 0; i < kColumns; ++i) m[u][i] += weight * head.added(h, i);
            }
        }
        if (memory) store_rows(memory, base);
        if (memory1) store_rows(memory1, base);
        if (memory_copy) store_rows(memory_copy, base);
        if (!usage1 || lane_of_row() != 0) return;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
            if (slot(base, u) < last) usage1[slot(base, u)] = decay * usage[u] + written[u];
    }

    // Eq. 2 of row u.
    MANN_INLINE void match(int u, int n) {
        T dots[kHeads], square = 0, own[kOwn];
#pragma unroll kUnroll
        for (int i = 0; i < kColumns; ++i) square += m[u][i] * m[u][i];
        square = sum_over_row(square);
#pragma unroll kUnroll
        for (int h = 0; h < kHeads; ++h) {
            T dot = 0;
#pragma unroll kUnroll
            for (int i = 0; i < kColumns; ++i) dot += m[u][i] * head.key[h][i];
            dots[h] = sum_over_row(dot);
        }
        take_own(dots, own);
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            logit[u][k] = kLowest;
            if (n >= last || own_head(k) >= kHeads) continue;
            logit[u][k] = head.beta[k] * (own[k] * inverse_root(head.key_square[k] * square + eps));
            logits[weight_at(k, n)] = logit[u][k];
        }
    }

    // Eq. 3 and 4 of the rows under way: without a strength a logit is at most 1, and nothing need be taken off.
    MANN_INLINE void add_up(int base) {
        if constexpr (kBeta) {
            T scale[kOwn];
#pragma unroll
            for (int k = 0; k < kOwn; ++k) {
                T next = largest[k];
#pragma unroll
                for (int u = 0; u < kAtOnce; ++u) next = larger(next, logit[u][k]);
                scale[k] = exponential(largest[k] - next), largest[k] = next, sum[k] *= scale[k];
            }
            rescale(scale);
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const bool exists = slot(base, u) < last;
            T weight[kOwn];
#pragma unroll
            for (int k = 0; k < kOwn; ++k) {
                weight[k] = exists && own_head(k) < kHeads ? exponential(logit[u][k] - largest[k]) : T(0);
                sum[k] += weight[k];
            }
            if constexpr (!kWrite) continue;
#pragma unroll kUnroll
            for (int h = 0; h < kHeads; ++h) {
                const T of_row = of_head(weight, h);
#pragma unroll kUnroll
                for (int i = 0; i < kColumns; ++i) reads[h][i] += of_row * m[u][i];
            }
        }
    }
    MANN_INLINE void rescale(const T (&scale)[kOwn]) {
        if constexpr (!kWrite) return;
#pragma unroll kUnroll
        for (int h = 0; h < kHeads; ++h) {
            const T factor = of_head(scale, h);
#pragma unroll kUnroll
            for (int i = 0; i < kColumns; ++i) reads[h][i] *= factor;
        }
    }

    // Every lane's sums in terms of the same largest logit: that of the block (or warp, if that has a part).
    MANN_INLINE void agree(T *shared) {
        T scale[kOwn];
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            T all = largest[k];
#pragma unroll
            for (int d = kLanes; d < 32; d *= 2) all = larger(all, __shfl_xor_sync(kWholeWarp, all, d));
            scale[k] = all;
            if (kParts == 1 && row_of_warp() == 0 && own_head(k) < kHeads)
                shared[warp_of_block() * kHeads + own_head(k)] = all;
        }
        if constexpr (kParts == 1) __syncthreads();
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            T all = scale[k];
            for (int warp = 0; kParts == 1 && own_head(k) < kHeads && warp < kMemoryWarps; ++warp)
                all = larger(all, shared[warp * kHeads + own_head(k)]);
            scale[k] = exponential(largest[k] - all), largest[k] = all, sum[k] *= scale[k];
        }
        rescale(scale);
        if constexpr (kParts == 1) __syncthreads();
    }
    MANN_INLINE void give(T *shared, T *shared_own, int tile) {
        if constexpr (kBeta) agree(shared_own);
        const int part = kParts > 1 ? tile * kParts + warp_of_block() : tile;
        T *found = a.found + (now * s.parts + part) * kForwardPart;
#pragma unroll
        for (int k = 0; k < kOwn; ++k)
            if (row_of_warp() == 0 && own_head(k) < kHeads && (kParts > 1 || warp_of_block() == 0))
                found[own_head(k)] = largest[k];
        // give_* step from warp to warp themselves
        T *rows = a.found + (now * s.parts + tile * kParts) * kForwardPart;
        give_own(sum, shared_own, rows + kHeads, kForwardPart);
        if constexpr (kWrite) give_columns(reads, shared, rows + 2 * kHeads, kForwardPart);
    }
};

// Eq. 6, by one warp: the R least used of what the blocks of memory_use found.
MANN_INLINE void choose(const MemoryWrite<S> &a, int b, int32_t *slots) {
    Least least;
    const int64_t from = int64_t(b) * a.choosers * kHeads;
    for (int i = lane_of_warp(); i < a.choosers * kHeads; i += 32)
        least.see(a.candidate_usage[from + i], a.candidate_slots[from + i]);
    for (int h = 0; h < kHeads; ++h) {
        T u;
        int n;
        least.first_of_warp(u, n);
        if (least.slot[0] == n) least.drop_first();
        if (lane_of_warp() == 0) slots[h] = n;
    }
}

using MemoryWriteArgs = MemoryWrite<S>;
MANN_KERNEL(memory_write, kMemoryThreads, MemoryWriteArgs) {
    after_previous();
    MANN_SHARED(int32_t, slots, kHeads);
    MANN_SHARED(T, totals, 2 * kHeads);
    MANN_SHARED(T, shared_own, kMemoryWarps * kHeads);
    MANN_SHARED(T, shared_columns, kSharedColumns);
    const MemorySizes &s = args.sizes;
    const int b = int(blockIdx.x) / s.tiles, tile = int(blockIdx.x) % s.tiles;
    if (s.step >= length_of(s, b)) return;
    WriteTile tile_of(args, b, tile);
    const int stride = kMemoryWarps * kRows * kAtOnce;
    int base = tile_of.first + __shfl_sync(kWholeWarp, warp_of_block(), 0) * kRows * kAtOnce;
    bool chosen = false;
    if (base < tile_of.last) tile_of.load(base);
    tile_of.head.take(args.head, tile_of.at);
    if constexpr (kWrite) {
        if (args.candidate_slots) {
            if (warp_of_block() == 0) choose(args, b, slots);
        } else {
            for (int h = int(threadIdx.x); h < kHeads; h += kMemoryThreads) // whoever calls, no slot is outside memory
                slots[h] = max(0, min(args.least_used[tile_of.at * kHeads + h], int(s.N) - 1));
        }
        if (!tile_of.starts()) {
            T *known = args.totals + tile_of.ring(s.step - 1) * kHeads * 2;
            const T *found = args.found + tile_of.ring(s.step - 1) * s.parts * kForwardPart;
            for (int h = warp_of_block(); h < kHeads; h += kMemoryWarps) {
                const Totals sums =
                    args.sum_parts ? sum_totals(found, s.parts, h) : Totals{known[2 * h], known[2 * h + 1]};
                if (lane_of_warp() == 0) totals[2 * h] = sums.largest, totals[2 * h + 1] = sums.inverse;
            }
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < kHeads; ++h) chosen |= slots[h] >= tile_of.first && slots[h] < tile_of.last;
        if (!tile_of.starts()) tile_of.previous.take_totals(totals);
        if (tile == 0 && args.candidate_slots && args.least_used)
            for (int h = int(threadIdx.x); h < kHeads; h += kMemoryThreads)
                args.least_used[tile_of.at * kHeads + h] = slots[h];
    }
#pragma unroll
    for (int k = 0; k < kOwn; ++k) tile_of.largest[k] = kBeta ? kLowest : T(0), tile_of.sum[k] = 0;
#pragma unroll kUnroll
    for (int h = 0; h < kHeads; ++h)
#pragma unroll kUnroll
        for (int i = 0; i < kColumns; ++i) tile_of.reads[h][i] = 0;
    while (base < tile_of.last) {
        if constexpr (kWrite) tile_of.write(base, slots, chosen);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) tile_of.match(u, tile_of.slot(base, u));
        tile_of.add_up(base);
        base += stride;
        if (base < tile_of.last) tile_of.load(base);
    }
    tile_of.give(shared_columns, shared_own, tile);
}

// A block of memory_use that goes over slots: some of each thread at once.
constexpr int kSlotsAtOnce = kHeads <= 4 ? 4 : (kHeads <= 8 ? 2 : 1);
struct UseSlots {
    const MemoryUse<S> &a;
    const MemorySizes &s;
    const int b, step, chunk, slots_of_example;
    const int64_t ring;
    const bool weights_out, means_out, usage_wanted;
    T loaded[kSlotsAtOnce][kHeads], usage[kSlotsAtOnce], dweight[kSlotsAtOnce][kHeads];

    MANN_INLINE UseSlots(const MemoryUse<S> &args, int example, int step, int chunk)
        : a(args), s(a.sizes), b(example), step(step), chunk(chunk), slots_of_example(int(s.N)),
          ring(step % s.ring * s.B + example), weights_out(a.weights && step + 1 == length_of(s, example)),
          means_out(a.dweights && step + 1 == length_of(s, example)), usage_wanted(a.usage1 || a.candidate_slots) {}

    MANN_INLINE bool idle() const { return !weights_out && !means_out && !a.weights_copy && !usage_wanted; }
    MANN_INLINE int first() const { return chunk * a.chooser_slots + int(threadIdx.x); }
    MANN_INLINE int last() const { return min((chunk + 1) * a.chooser_slots, slots_of_example); }
    template <typename X> MANN_INLINE X *of_example(X *all, int numbers) const { return all + b * s.N * numbers; }

    MANN_INLINE void load(int from) {
        const T *logits = a.logits + ring * kHeads * s.N;
#pragma unroll
        for (int u = 0; u < kSlotsAtOnce; ++u) {
            const int n = from + u * kMemoryThreads;
            if (n >= last()) break;
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                const int at = h * slots_of_example + n;
                if (a.weights_in) loaded[u][h] = to_arith(of_example(a.weights_in, kHeads)[at]);
                else if (a.logits) loaded[u][h] = logits[at];
                if (means_out) dweight[u][h] = to_arith(of_example(a.dweights, kHeads)[at]);
            }
            if (usage_wanted) usage[u] = a.usage ? T(to_arith(of_example(a.usage, 1)[n])) : of_example(a.usage1, 1)[n];
        }
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
            const T now = a.logits ? usage[u] + read : usage[u]; // eq. 5
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
    T sum = 0;
#pragma unroll 10
    for (int part = int(threadIdx.x) / kReadColumns; part < s.parts; part += groups) {
        const T *row = found + int64_t(part) * kForwardPart;
        const T scale = kBeta ? exponential(row[h] - totals[2 * h]) : T(1);
        if (column < kWords) sum += scale * row[2 * kHeads + column];
    }
    sum = sum_columns<kReadColumns>(sum, shared);
    if (int(threadIdx.x) >= kReadColumns || column >= kWords) return;
    sum *= totals[2 * h + 1];
    if (a.reads) a.reads[(int64_t(step) * s.B + b) * a.reads_row + a.reads_at + column] = to_storage<S>(sum);
    if (a.reads_copy) a.reads_copy[ring * kWords + column] = sum;
}

using MemoryUseArgs = MemoryUse<S>;
MANN_KERNEL(memory_use, kMemoryThreads, MemoryUseArgs) {
    after_previous();
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
