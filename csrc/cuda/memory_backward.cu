// One step of the memory backward: see memory_step.h. One pass over the memory and its gradient: the mean that softmax
// takes off, sum of weight * dweight, is known before, from reads . dreads and from what the step after gave back.
#include "memory_rows.h"

namespace mann::cuda {

constexpr int kAtOnce = 1; // rows that a warp's lanes have under way; two blocks of a multiprocessor hide the rest
constexpr int kSharedColumns = kParts > 1 ? 1 : kMemoryWarps * kWords;
// Where the logit is not the cosine, it is made again.
constexpr bool kDots = kBeta || !kWrite;

struct BackwardTile {
    const MemoryBackward<S> &a;
    const MemorySizes &s;
    const int b, tile, first, last;
    const int64_t at, ring; // the row of the head in [T, B]; of the example in [ring, B]
    const bool last_step;   // no step of the example comes after it
    const int slots_of_example;
    const T eps;
    // Of the example.
    const T *const memory_after;
    T *const memory, *const dmemory, *const dweights;
    const S *const memory_in, *const dmemory1, *const dweights1;
    S *const dmemory_out, *const dweights_out;
    HeadColumns head;
    Weights previous, now;
    T dreads[kHeads][kColumns], mean[kOwn];
    T m[kAtOnce][kColumns], dm[kAtOnce][kColumns];                         // of the rows under way,
    T loaded[kAtOnce][kOwn], loaded_now[kAtOnce][kOwn], dw[kAtOnce][kOwn]; // of the lane's own heads
    T dkey[kHeads][kColumns], dadd[kHeads][kColumns];
    T dgate[kOwn], dbeta[kOwn], factor[kOwn], means[kOwn];

    MANN_INLINE BackwardTile(const MemoryBackward<S> &args, int example, int tile_of_example)
        : a(args), s(a.sizes), b(example), tile(tile_of_example), first(tile * s.tile_slots),
          last(min(first + s.tile_slots, int(s.N))), at(int64_t(s.step) * s.B + b), ring(s.step % s.ring * s.B + b),
          last_step(s.step + 1 == length_of(s, b)), slots_of_example(int(s.N)), eps(T(a.eps)),
          memory_after(of_example(a.memory_after, kWidth)), memory(of_example(a.memory, kWidth)),
          dmemory(of_example(a.dmemory, kWidth)), dweights(of_example(a.dweights, kHeads)),
          memory_in(of_example(a.before.memory, kWidth)), dmemory1(of_example(a.dmemory1, kWidth)),
          dweights1(of_example(a.dweights1, kHeads)), dmemory_out(of_example(a.dmemory_out, kWidth)),
          dweights_out(of_example(a.dweights_out, kHeads)) {}

    template <typename X> MANN_INLINE X *of_example(X *all, int numbers) const {
        return all ? all + b * s.N * numbers : nullptr;
    }
    MANN_INLINE int slot(int base, int u) const { return base + u * kRows + row_of_warp(); }
    MANN_INLINE int weight_at(int k, int n) const { return own_head(k) * slots_of_example + n; }

    // The gradient of read w of head h, of all that comes after the read.
    MANN_INLINE T dread(int h, int w) const {
        const int word = h * kWidth + w;
        T sum = to_arith(a.dreads[at * a.dreads_row + a.dreads_at + word]);
        if (last_step) {
            if (a.dreads1) sum += to_arith(a.dreads1[int64_t(b) * kWords + word]);
        } else if (a.carried) {
            const T *carried = a.carried + b * a.carried_row + a.carried_at + word;
            sum += sum_of<12>(0, a.carried_parts, 1, [&](int part) { return carried + part * s.B * a.carried_row; });
        }
        return sum;
    }
    // What softmax takes off the gradient of the weights, by a warp for each head.
    MANN_INLINE void take_means(const T *words, T *shared) {
        const T *parts = last_step ? a.first_means : a.means + ((s.step + 1) % 2 * s.B + b) * s.parts * kHeads;
        const int count = last_step ? (parts ? a.choosers : 0) : s.parts;
        if (last_step && parts) parts += int64_t(b) * count * kHeads;
        for (int h = warp_of_block(); h < kHeads; h += kMemoryWarps) {
            T sum = sum_of<10>(lane_of_warp(), count, 32, [&](int part) { return parts + part * kHeads + h; });
            for (int w = lane_of_warp(); kWrite && w < kWidth; w += 32)
                sum += (kParts > 1 ? dread(h, w) : words[h * kWidth + w]) * a.reads[ring * kWords + h * kWidth + w];
            sum = sum_over_warp(sum);
            if (lane_of_warp() == 0) shared[h] = sum;
        }
    }

    MANN_INLINE void load(int base) {
        if (memory_after) load_rows(memory_after, base, m);
        else load_rows(memory_in, base, m);
        if (!last_step) load_rows(static_cast<const T *>(dmemory), base, dm);
        else load_rows(dmemory1, base, dm);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
#pragma unroll
            for (int k = 0; k < kOwn; ++k) {
                const int n = slot(base, u), at_own = weight_at(k, n);
                const bool there = n < last && own_head(k) < kHeads;
                loaded[u][k] = kWrite && there ? previous.load(at_own) : T(0);
                loaded_now[u][k] = there ? now.load(at_own) : T(0);
                dw[u][k] = 0;
                if (there && !last_step) dw[u][k] = dweights[at_own];
                else if (there && dweights1) dw[u][k] = to_arith(dweights1[at_own]);
            }
    }
    template <typename X> MANN_INLINE void load_rows(const X *rows, int base, T (&all)[kAtOnce][kColumns]) const {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) load_row(rows + slot(base, u) * kWidth, rows && slot(base, u) < last, all[u]);
    }

    // Row u from behind the read to before the write.
    MANN_INLINE void take_back(int u, int n, const int32_t *slots, bool chosen) {
        const bool exists = n < last;
        const int place = kWrite && chosen && exists ? place_of(slots, n) : -1;
        const bool erased = is_erased(place, a.erase_all);
        T before[kOwn], written[kOwn];
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            before[k] = kWrite && exists && own_head(k) < kHeads ? previous.weight(loaded[u][k], k) : T(0);
            written[k] = head.gate[k] * before[k] + (1 - head.gate[k]) * own_slot(place, own_head(k), a.shared);
        }
        if (kWrite && !memory_after) add_written(written, T(1), erased, m[u]);
        T weight[kOwn], ddot[kOwn];
        const T shrink = through_softmax(u, exists, weight, ddot);
#pragma unroll kUnroll
        for (int i = 0; i < kColumns; ++i) dm[u][i] -= shrink * m[u][i];
#pragma unroll kUnroll
        for (int h = 0; h < kHeads; ++h) {
            const T read = kWrite ? of_head(weight, h) : T(0), matched = of_head(ddot, h);
#pragma unroll kUnroll
            for (int i = 0; i < kColumns; ++i) {
                dkey[h][i] += matched * m[u][i];
                dm[u][i] += matched * head.key[h][i];
                if constexpr (kWrite) dm[u][i] += read * dreads[h][i];
            }
        }
        if constexpr (kWrite) before_write(u, n, place, before, written);
        if (a.undo) {
            add_written(written, T(-1), false, m[u]);
            if (chosen && place >= 0) load_row(a.overwritten + (ring * kHeads + place) * kWidth, true, m[u]); // exactly
            store_row(memory + n * kWidth, exists, m[u]);
        }
        if (chosen && erased) {
#pragma unroll kUnroll
            for (int i = 0; i < kColumns; ++i) dm[u][i] = 0;
        }
        if (dmemory_out) store_row(dmemory_out + n * kWidth, exists, dm[u]);
        else store_row(dmemory + n * kWidth, exists, dm[u]);
    }
    // row (nothing, if erased) + sign * what is written to it
    MANN_INLINE void add_written(const T (&written)[kOwn], T sign, bool erased, T (&row)[kColumns]) const {
#pragma unroll kUnroll
        for (int h = 0; h < kHeads; ++h) {
            const T weight = sign * of_head(written, h);
#pragma unroll kUnroll
            for (int i = 0; i < kColumns; ++i) row[i] = (h == 0 && erased ? T(0) : row[i]) + weight * head.added(h, i);
        }
    }
    // Eq. 2 to 4 backward, for the owners of the heads: the weights and the gradients of the dot products. Returns what
    // the row's norm takes off its own gradient.
    MANN_INLINE T through_softmax(int u, bool exists, T (&weight)[kOwn], T (&ddot)[kOwn]) {
        T square = 0, all[kHeads], dot[kOwn], dread_dot[kOwn] = {};
#pragma unroll kUnroll
        for (int i = 0; i < kColumns; ++i) square += m[u][i] * m[u][i];
        square = sum_over_row(square);
        if constexpr (kDots) {
            dots_with(head.key, m[u], all);
            take_own(all, dot);
        }
        if constexpr (kWrite) {
            dots_with(dreads, m[u], all);
            take_own(all, dread_dot);
        }
        T shrink = 0;
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            const bool mine = exists && own_head(k) < kHeads;
            weight[k] = mine ? now.weight(loaded_now[u][k], k) : T(0);
            const T inverse = mine ? inverse_root(head.key_square[k] * square + eps) : T(0);
            const T cosine = kDots ? (mine ? dot[k] * inverse : T(0)) : loaded_now[u][k];
            // of one slot the weight is 1 whatever its logit: exactly zero, not what rounding leaves of a difference
            const T dx = mine && s.N > 1 ? weight[k] * (dw[u][k] + dread_dot[k] - mean[k]) : T(0);
            ddot[k] = head.beta[k] * dx * inverse;
            const T through_norm = ddot[k] * cosine * inverse;
            dbeta[k] += dx * cosine;
            factor[k] += through_norm * square;
            shrink += through_norm * head.key_square[k];
        }
        return sum_over_row(shrink);
    }
    template <typename Vectors>
    MANN_INLINE void dots_with(const Vectors &vectors, const T (&row)[kColumns], T (&all)[kHeads]) const {
#pragma unroll kUnroll
        for (int h = 0; h < kHeads; ++h) {
            T sum = 0;
#pragma unroll kUnroll
            for (int i = 0; i < kColumns; ++i) sum += vectors[h][i] * row[i];
            all[h] = sum_over_row(sum);
        }
    }
    // Eq. 7 and 8 backward.
    MANN_INLINE void before_write(int u, int n, int place, const T (&before)[kOwn], const T (&written)[kOwn]) {
        T all[kHeads], dwrite[kOwn];
#pragma unroll kUnroll
        for (int h = 0; h < kHeads; ++h) {
            const T weight = of_head(written, h);
            T sum = 0;
#pragma unroll kUnroll
            for (int i = 0; i < kColumns; ++i) {
                sum += dm[u][i] * head.added(h, i);
                if constexpr (kAdd) dadd[h][i] += weight * dm[u][i];
                else dkey[h][i] += weight * dm[u][i];
            }
            all[h] = sum_over_row(sum);
        }
        take_own(all, dwrite);
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            if (n >= last || own_head(k) >= kHeads) continue;
            dgate[k] += dwrite[k] * (before[k] - own_slot(place, own_head(k), a.shared));
            const T given = head.gate[k] * dwrite[k];
            means[k] += before[k] * given;
            if (dweights_out) dweights_out[weight_at(k, n)] = to_storage<S>(given);
            else dweights[weight_at(k, n)] = given;
        }
    }

    MANN_INLINE void begin() {
#pragma unroll
        for (int k = 0; k < kOwn; ++k) dgate[k] = dbeta[k] = factor[k] = means[k] = 0;
#pragma unroll kUnroll
        for (int h = 0; h < kHeads; ++h)
#pragma unroll kUnroll
            for (int i = 0; i < kColumns; ++i) {
                dkey[h][i] = 0;
                if constexpr (kAdd) dadd[h][i] = 0;
            }
        previous.only_slot = now.only_slot = s.N == 1;
        if (s.step == a.before.start) {
            previous.plain = of_example(a.before.weights, kHeads);
            previous.plain_t = of_example(a.before.weights_t, kHeads);
        } else {
            const int64_t other = (s.step - 1) % s.ring * s.B + b;
            previous.logits = a.logits + other * kHeads * s.N;
            previous.take_totals(a.totals + other * 2 * kHeads);
        }
        now.plain = of_example(a.weights_in, kHeads);
        if (now.plain) return;
        now.logits = a.logits + ring * kHeads * s.N;
        now.take_totals(a.totals + ring * 2 * kHeads);
    }
    MANN_INLINE void give(T *shared, T *shared_own) {
        T *found = a.found + (ring * s.parts + tile * kParts) * kBackwardPart;
        give_columns(dkey, shared, found, kBackwardPart);
        give_own(factor, shared_own, found + kHead, kBackwardPart);
        if constexpr (kBeta) give_own(dbeta, shared_own, found + kWords + kHeads, kBackwardPart);
        if constexpr (kWrite) {
            give_own(dgate, shared_own, found + kWords, kBackwardPart);
            if constexpr (kAdd) give_columns(dadd, shared, found + kHead - kWords, kBackwardPart);
            T *to = a.means + ((s.step % 2 * s.B + b) * s.parts + tile * kParts) * kHeads;
            if (a.means) give_own(means, shared_own, to, kHeads);
        }
    }
};

// Two blocks to a multiprocessor where their registers go round.
constexpr int kBlocks = kHeads * kColumns * (3 + 2 * kAdd) + 2 * kColumns <= 76 ? 2 : 1;
#define MANN_BACKWARD_BOUNDS kMemoryThreads, kBlocks
using MemoryBackwardArgs = MemoryBackward<S>;
MANN_KERNEL(memory_backward, MANN_BACKWARD_BOUNDS, MemoryBackwardArgs) {
    start_next();
    wait_for_previous();
    MANN_SHARED(int32_t, slots, kHeads);
    MANN_SHARED(T, mean, kHeads);
    MANN_SHARED(T, shared_own, kMemoryWarps * kHeads);
    MANN_SHARED(T, shared_columns, kSharedColumns);
    const MemorySizes &s = args.sizes;
    const int b = int(blockIdx.x) / s.tiles;
    if (s.step >= length_of(s, b)) return;
    BackwardTile tile(args, b, int(blockIdx.x) % s.tiles);
    tile.begin();
    const int stride = kMemoryWarps * kRows * kAtOnce;
    int base = tile.first + __shfl_sync(kWholeWarp, warp_of_block(), 0) * kRows * kAtOnce;
    if (base < tile.last) tile.load(base);
    tile.head.take(args.head, tile.at);
    if constexpr (kWrite) {
        for (int h = int(threadIdx.x); h < kHeads; h += kMemoryThreads) // whoever calls, no slot is outside memory
            slots[h] = max(0, min(args.least_used[tile.at * kHeads + h], int(s.N) - 1));
        if constexpr (kParts == 1) {
            for (int i = int(threadIdx.x); i < kWords; i += kMemoryThreads)
                shared_columns[i] = tile.dread(i / kWidth, i % kWidth);
            __syncthreads();
        }
#pragma unroll kUnroll
        for (int h = 0; h < kHeads; ++h)
#pragma unroll kUnroll
            for (int i = 0; i < kColumns; ++i) {
                const int w = column_of(i);
                tile.dreads[h][i] =
                    !has_column(i) ? T(0) : (kParts > 1 ? tile.dread(h, w) : shared_columns[h * kWidth + w]);
            }
    }
    tile.take_means(shared_columns, mean);
    __syncthreads();
    bool chosen = false; // whether the tile has least-used slots at all
#pragma unroll
    for (int h = 0; h < kHeads; ++h) chosen |= kWrite && slots[h] >= tile.first && slots[h] < tile.last;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) tile.mean[k] = own_head(k) < kHeads ? mean[own_head(k)] : T(0);
    while (base < tile.last) {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) tile.take_back(u, tile.slot(base, u), slots, chosen);
        base += stride;
        if (base < tile.last) tile.load(base);
    }
    tile.give(shared_columns, shared_own);
}

// kReadColumns columns of a head at a step, the parts of each shared by the other threads.
using MemorySumArgs = MemorySum<S>;
MANN_KERNEL(memory_sum, kSumThreads, MemorySumArgs) {
    start_next();
    wait_for_previous();
    constexpr int blocks = (kHead + kReadColumns - 1) / kReadColumns, groups = kSumThreads / kReadColumns;
    constexpr int add_at = kHead - kWords;
    MANN_SHARED(T, shared, kSumThreads / 32 * kReadColumns);
    const MemorySum<S> &a = args;
    const MemorySizes &s = a.sizes;
    const int b = int(blockIdx.x) / blocks, step = s.step + int(blockIdx.y);
    const int column = int(blockIdx.x) % blocks * kReadColumns + int(threadIdx.x) % kReadColumns;
    const int h = min(column / kWidth, kHeads - 1);
    const int64_t at = int64_t(step) * s.B + b;
    const bool real = step < length_of(s, b), is_key = column < kWords;
    const T *found = a.found + (step % s.ring * s.B + b) * s.parts * kBackwardPart;
    const T key = is_key ? head_key(a.head, at, h, column % kWidth) : T(0);
    const bool has_sum = real && (is_key || (column < kHead && (kWrite || column >= kWords + kHeads)));
    const auto sum_over_parts = [&](bool wanted, int number) {
        return sum_of<5>(int(threadIdx.x) / kReadColumns, wanted ? s.parts : 0, groups,
                         [&](int part) { return found + int64_t(part) * kBackwardPart + number; });
    };
    T sum = sum_over_parts(has_sum, column);
    sum -= sum_over_parts(real && is_key, kHead + h) * key;
    sum = sum_columns<kReadColumns>(sum, shared);
    if (int(threadIdx.x) >= kReadColumns || column >= kHead) return;
    S *target = nullptr;
    int64_t place = 0;
    if (is_key) {
        if (a.squash) sum *= 1 - key * key;
        target = a.dkey, place = at * kWords + column;
    } else if (column < kWords + kHeads) {
        const T gate = kWrite ? head_gate(a.head, at, column - kWords) : T(0);
        sum *= gate * (1 - gate);
        target = a.dgate, place = at * kHeads + column - kWords;
    } else if (kBeta && column < kWords + 2 * kHeads) {
        if (a.dhead) sum *= -exponential_minus_one(-head_beta(a.head, at, column - kWords - kHeads)); // of softplus
        target = a.dbeta, place = at * kHeads + column - kWords - kHeads;
    } else if (kAdd) {
        const int word = column - add_at;
        const T add = head_add(a.head, at, word / kWidth, word % kWidth);
        if (a.squash) sum *= 1 - add * add;
        target = a.dadd, place = at * kWords + word;
    }
    if (a.dhead) target = a.dhead, place = at * a.head.head + column;
    if (target) target[place] = to_storage<S>(real ? sum : T(0));
}

} // namespace mann::cuda
