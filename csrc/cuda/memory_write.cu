// The first half of a step of the memory, forward: see memory_step.h.
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
    constexpr int at_once = 4;
    const int count = a.choosers * kHeads;
#pragma unroll 1
    for (int first = lane_of_warp(); first < count; first += 32 * at_once) {
        T usage[at_once];
        int32_t slot[at_once];
#pragma unroll
        for (int j = 0; j < at_once; ++j) {
            const int64_t i = from + first + 32 * j;
            usage[j] = load_if(first + 32 * j < count, a.candidate_usage + i);
            slot[j] = load_if(first + 32 * j < count, a.candidate_slots + i);
        }
#pragma unroll
        for (int j = 0; j < at_once; ++j)
            if (first + 32 * j < count) least.see(usage[j], slot[j]);
    }
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
    start_next();
    wait_for_previous();
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

} // namespace mann::cuda
