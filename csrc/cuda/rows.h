// The memory of one example, or a part of its slots, in the registers of a block: the step of time that every operator
// with a sequence shares, forward. Sizes are constants of the build.
//
// kLanes neighbouring threads share a row; a thread has kColumns of its numbers (w = lane, lane + kLanes, ...) in each
// of kRows rows. Numbers per head come in groups of four heads, so that a thread has those of a column with one load.
#pragma once

#include "device.h"

namespace mann::cuda {

using S = MANN_STORAGE;
using T = Arith<S>;

constexpr int N = MANN_N, W = MANN_W, R = MANN_R;
constexpr bool kWriteAdd = MANN_WRITE_ADD, kKeyStrength = MANN_KEY_STRENGTH, kSquash = MANN_SQUASH;
constexpr bool kSoftplus = MANN_SOFTPLUS; // of key strengths, which are logits then
constexpr bool kShared = MANN_SHARED_LRU, kEraseAll = MANN_ERASE_ALL;
constexpr int kParts = MANN_PARTS; // blocks that share the slots of an example

constexpr int kThreads = MANN_THREADS, kWarp = 32, kWarps = kThreads / kWarp;
constexpr unsigned kWholeWarp = 0xffffffffu;
MANN_CONSTEXPR int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
MANN_CONSTEXPR int least(int a, int b) { return a < b ? a : b; }

constexpr int kSlots = (N + kParts - 1) / kParts; // of a part
MANN_CONSTEXPR int lanes_of_row() {
    int lanes = 1;
    while (2 * lanes <= kWarp && 2 * lanes <= W && 2 * lanes * kSlots <= (lanes < 4 ? 2 : 1) * kThreads) lanes *= 2;
    return lanes;
}
constexpr int kLanes = lanes_of_row(), kGroups = kThreads / kLanes;
constexpr int kRows = (kSlots + kGroups - 1) / kGroups, kColumns = (W + kLanes - 1) / kLanes;
constexpr int kOrders = round_up(kSlots, 4 * kLanes); // usages of a part, padded
// Columns of a thread that are summed over rows at once: the sums of all heads take registers.
constexpr int kChunk = least(R < 8 ? 8 / R : 1, kColumns);
constexpr int kRowWarps = least(kWarps, (kSlots * kLanes + kWarp - 1) / kWarp); // that have rows at all

constexpr int kHeads = round_up(R, 4), kHeadGroups = kHeads / 4;
constexpr int kWords = R * W;
constexpr int kBetaAt = kWords + R, kAddAt = kBetaAt + (kKeyStrength ? R : 0);
constexpr int kHead = kAddAt + (kWriteAdd ? kWords : 0), kHeadPadded = round_up(kHead, 4);
// What a part says of a step: its share of the reads, of the sums of the softmax, and what its exponents are relative
// to.
constexpr int kSumAt = kWords, kTopAt = kSumAt + R, kPart = round_up(kTopAt + (kKeyStrength ? R : 0), 4);

MANN_INLINE int lane_of_warp() { return thread_again() % kWarp; }
MANN_INLINE int warp_of_block() { return thread_again() / kWarp; }

template <typename V> MANN_INLINE V sum_lanes(V x, int from, int to) {
#pragma unroll
    for (int distance = from; distance < to; distance *= 2) x += __shfl_xor_sync(kWholeWarp, x, distance);
    return x;
}
MANN_INLINE T largest_lane(T x) {
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const T other = __shfl_xor_sync(kWholeWarp, x, distance);
        x = other > x ? other : x;
    }
    return x;
}
// Sums `count` values over the lanes of a warp that differ in the bits from `from` on: afterwards v[0 ... length) of a
// lane are the sums of the values from `first` on, and it is the one to hand them on if `mine`.
template <int count, int from> struct Scattered {
    MANN_CONSTEXPR static int length_after(int distance) {
        int length = count;
        for (int d = kWarp / 2; d >= distance; d /= 2)
            if (length % 2 == 0) length /= 2;
        return length;
    }
    static constexpr int length = length_after(from);
    int first = 0;
    bool mine = true;

    template <int distance = kWarp / 2> MANN_INLINE void add(T (&v)[count], int lane) {
        if constexpr (distance >= from) {
            constexpr int before = length_after(2 * distance), after = length_after(distance);
            const bool upper = lane & distance;
#pragma unroll
            for (int i = 0; i < after; ++i) {
                if constexpr (before == after) {
                    v[i] += __shfl_xor_sync(kWholeWarp, v[i], distance);
                } else {
                    const T give = upper ? v[i] : v[after + i], keep = upper ? v[after + i] : v[i];
                    v[i] = keep + __shfl_xor_sync(kWholeWarp, give, distance);
                }
            }
            if constexpr (before == after) mine &= !upper;
            else first += upper ? after : 0;
            add<distance / 2>(v, lane);
        }
    }
};
template <int from, int count> MANN_INLINE Scattered<count, from> scatter_sums(T (&v)[count]) {
    Scattered<count, from> s;
    s.add(v, lane_of_warp());
    return s;
}

// A usage as an integer in the same order, NaN last, kNoSlot after that: what comes first is then one comparison.
#if defined(MANN_CUDA_ON_CPU)
MANN_INLINE uint64_t order_of(double usage) {
    const double positive = usage == 0 ? 0 : usage; // -0 is 0
    uint64_t bits;
    memcpy(&bits, &positive, sizeof(bits));
    return usage != usage ? ~uint64_t(1) : bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}
#endif
MANN_INLINE uint32_t order_of(float usage) {
    const uint32_t bits = __float_as_uint(usage == 0 ? 0.0f : usage); // -0 is 0
    return usage != usage ? ~1u : bits >> 31 ? ~bits : bits | 1u << 31;
}
using Order = decltype(order_of(T(0)));
constexpr Order kNoSlot = ~Order(0);
// The head of an example and the slots to write to, in shared memory.
struct Step {
    T key[W][kHeads], add[kWriteAdd ? W : 1][kHeads]; // the heads that do not exist are zero
    T gate[kHeads], beta[kHeads];                     // gate after its sigmoid
    int32_t slots[R];                                 // the least used, ascending
};

struct alignas(4 * sizeof(Order)) Orders {
    Order at[4];
};

// What one of several parts finds to be one of its least used slots.
using Candidate = Two<Order>; // order, slot

// What no head changes. Barrier needed afterwards.
MANN_INLINE void open_step(Step &step) {
    for (int i = thread_again(); i < W * kHeads; i += kThreads) {
        step.key[i / kHeads][i % kHeads] = 0;
        if (kWriteAdd) step.add[i / kHeads][i % kHeads] = 0;
    }
    for (int h = thread_again(); h < kHeads; h += kThreads) step.gate[h] = 0, step.beta[h] = kKeyStrength ? 0 : 1;
}
// A thread's share of `count` numbers.
MANN_CONSTEXPR int share_of(int count) { return (count + kThreads - 1) / kThreads; }
constexpr int kHeadShare = share_of(kHead);

// A head before its activations to a step: number p = thread + i * kThreads of it is raw(p, i). Barrier needed
// afterwards.
template <typename Raw> MANN_INLINE void make_head(Step &step, Raw &&raw) {
    const auto squash = [](T x) { return kSquash ? hyperbolic_tangent(x) : x; };
#pragma unroll
    for (int i = 0; i < kHeadShare; ++i) {
        const int p = thread_again() + i * kThreads;
        if (p >= kHead) break;
        const T x = raw(p, i);
        if (p < kWords) step.key[p % W][p / W] = squash(x);
        else if (p < kBetaAt) step.gate[p - kWords] = sigmoid(x);
        else if (kKeyStrength && p < kAddAt) step.beta[p - kBetaAt] = kSoftplus ? softplus(x) : x;
        else if (kWriteAdd) step.add[(p - kAddAt) % W][(p - kAddAt) / W] = squash(x);
    }
}

// The sum over w of x(w, h) for every head, by each warp for itself: to sums [R] of all its lanes.
template <typename F> MANN_INLINE void sum_heads(F &&x, T (&sums)[R]) {
    constexpr int kHeadLanes = R <= 4 ? 4 : R <= 8 ? 8 : R <= 16 ? 16 : 32, kAtOnce = kWarp / kHeadLanes;
    const int h = lane_of_warp() % kHeadLanes;
    T sum = 0;
    for (int w = lane_of_warp() / kHeadLanes; h < R && w < W; w += kAtOnce) sum += x(w, h);
    sum = sum_lanes(sum, kHeadLanes, kWarp);
#pragma unroll
    for (int k = 0; k < R; ++k) sums[k] = __shfl_sync(kWholeWarp, sum, k);
}

struct Rows {
    int part; // of the example
    T m[kRows][kColumns];
    T weights[kRows][R]; // read weights
    T usage[kRows];
    // Of a step, before its sums are known.
    T exps[kRows][R], write_sum[kRows];

    MANN_INLINE static int lane() { return int(threadIdx.x) % kLanes; }
    MANN_INLINE static int column(int j) { return lane() + kLanes * j; }
    MANN_INLINE static bool has_column(int j) { return (j + 1) * kLanes <= W || column(j) < W; }
    MANN_INLINE static int local(int i) { return int(threadIdx.x) / kLanes + i * kGroups; }
    MANN_INLINE int slot(int i) const { return part * kSlots + local(i); }
    MANN_INLINE bool exists(int i) const { return local(i) < kSlots && slot(i) < N; }

    template <typename F> MANN_INLINE void for_memory(F &&f) {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
                if (exists(i) && has_column(j)) f(m[i][j], slot(i) * W + column(j));
    }
    // Memory [N, W] of the example; null is zero.
    template <typename V> MANN_INLINE void take_memory(const V *source) {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
                m[i][j] = source && exists(i) && has_column(j) ? to_arith(source[slot(i) * W + column(j)]) : T(0);
    }
    template <typename V> MANN_INLINE void give_memory(V *target) {
        for_memory([&](T x, int at) { target[at] = to_storage<V>(x); });
    }
    // Read weights [R, N].
    template <typename V> MANN_INLINE void take_weights(const V *source) {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int h = 0; h < R; ++h) weights[i][h] = source && exists(i) ? to_arith(source[h * N + slot(i)]) : T(0);
    }
    template <typename V> MANN_INLINE void give_weights(V *target) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int h = 0; h < R; ++h)
                if (exists(i) && lane() == h % kLanes) target[h * N + slot(i)] = to_storage<V>(weights[i][h]);
    }

    MANN_INLINE bool is_own(const Step &step, int i, int h) const {
        bool own = false;
#pragma unroll
        for (int k = 0; k < R; ++k) own |= (kShared || k == h) && step.slots[k] == slot(i);
        return own;
    }
    MANN_INLINE bool is_erased(const Step &step, int i) const {
        bool erased = step.slots[0] == slot(i);
#pragma unroll
        for (int k = 1; k < R; ++k) erased |= kEraseAll && step.slots[k] == slot(i);
        return erased;
    }
    // Eq. 7: head h's write weight.
    MANN_INLINE T write_weight(const Step &step, int i, int h) const {
        return step.gate[h] * weights[i][h] + (is_own(step, i, h) ? 1 - step.gate[h] : T(0));
    }

    // Erase, write (eq. 8), and the cosine of every row with every key (eq. 2), of which `exps` become the powers:
    // where there are key strengths relative to the largest of the warp, which goes to its tops [R].
    MANN_INLINE void write_and_match(const Step &step, T eps, T *tops) {
        T write[kRows][R], squares[kRows], dots[kRows][R], key_squares[R];
        sum_heads([&](int w, int h) { return step.key[w][h] * step.key[w][h]; }, key_squares);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            write_sum[i] = squares[i] = 0;
            const bool erased = is_erased(step, i);
#pragma unroll
            for (int j = 0; j < kColumns; ++j) m[i][j] = erased ? T(0) : m[i][j];
#pragma unroll
            for (int h = 0; h < R; ++h) {
                dots[i][h] = 0;
                write[i][h] = exists(i) ? write_weight(step, i, h) : T(0);
                write_sum[i] += write[i][h];
            }
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            if (!has_column(j)) continue;
            T key[kHeads], add[kHeads];
            take_heads(step.key[column(j)], key);
            if (kWriteAdd) take_heads(step.add[column(j)], add);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                T x = m[i][j];
#pragma unroll
                for (int h = 0; h < R; ++h) x += write[i][h] * (kWriteAdd ? add[h] : key[h]);
                m[i][j] = x;
                squares[i] += x * x;
#pragma unroll
                for (int h = 0; h < R; ++h) dots[i][h] += x * key[h];
            }
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            squares[i] = sum_lanes(squares[i], 1, kLanes);
#pragma unroll
            for (int h = 0; h < R; ++h) {
                const T dot = sum_lanes(dots[i][h], 1, kLanes);
                exps[i][h] = dot * inverse_square_root(squares[i] * key_squares[h] + eps) * step.beta[h]; // eq. 2
            }
        }
#pragma unroll
        for (int h = 0; h < R; ++h) {
            T top = 0;
            if (kKeyStrength) {
                top = -T(infinity());
#pragma unroll
                for (int i = 0; i < kRows; ++i) top = exists(i) && exps[i][h] > top ? exps[i][h] : top;
                top = largest_lane(top);
                if (lane_of_warp() == 0) tops[h] = top;
            }
#pragma unroll
            for (int i = 0; i < kRows; ++i) exps[i][h] = exists(i) ? quick_exponential(exps[i][h] - top) : T(0);
        }
    }
    // Of shared memory, where they are used: the compiler keeps none for the next pass over the columns.
    MANN_INLINE static void take_heads(const T *source, T (&heads)[kHeads]) {
#pragma unroll
        for (int g = 0; g < kHeadGroups; ++g) {
            const Four<T> four = load_shared4(source + 4 * g);
#pragma unroll
            for (int j = 0; j < 4; ++j) heads[4 * g + j] = four[j];
        }
    }

    // The warp's sums of the powers, to its sums [R].
    MANN_INLINE void sum_exps(T *sums) const {
        T v[R] = {};
#pragma unroll
        for (int h = 0; h < R; ++h)
#pragma unroll
            for (int i = 0; i < kRows; ++i) v[h] += exps[i][h];
        give_head_sums(v, sums);
    }
    // Values [count] of each group of lanes, summed over the groups of the warp, to target [count].
    template <int count> MANN_INLINE static void give_head_sums(T (&v)[count], T *target) {
        const auto s = scatter_sums<kLanes>(v);
#pragma unroll
        for (int i = 0; i < s.length; ++i)
            if (s.mine && lane() == 0) target[s.first + i] = v[i];
    }
    // And of the rows weighted by them, to its reads [words].
    MANN_INLINE void sum_rows(T *reads) const {
#pragma unroll
        for (int first = 0; first < kColumns; first += kChunk) {
            T v[R * kChunk] = {};
#pragma unroll
            for (int k = 0; k < kChunk; ++k)
#pragma unroll
                for (int h = 0; h < R; ++h)
#pragma unroll
                    for (int i = 0; i < kRows; ++i)
                        if (first + k < kColumns) v[h * kChunk + k] += exps[i][h] * m[i][first + k];
            give_sums(v, first, reads);
        }
    }
    // Values [R, kChunk] of each lane, of its columns from `first` on, summed over the rows of the warp, to a target
    // [R, W].
    MANN_INLINE static void give_sums(T (&v)[R * kChunk], int first, T *target) {
        const auto s = scatter_sums<kLanes>(v);
#pragma unroll
        for (int i = 0; i < s.length; ++i) {
            const int at = s.first + i, h = at / kChunk, w = column(first + at % kChunk);
            if (s.mine && w < W) target[h * W + w] = v[i];
        }
    }

    // What comes after the exchange of sums: scale[h] makes read weights of the powers. Eq. 5.
    MANN_INLINE void normalise(const T *scale, T decay) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            T sum = 0;
#pragma unroll
            for (int h = 0; h < R; ++h) {
                weights[i][h] = exps[i][h] * scale[h];
                sum += weights[i][h];
            }
            usage[i] = decay * usage[i] + sum + write_sum[i];
        }
    }

    // Eq. 6, after the order of the usages of the part was written to orders [kOrders] and a barrier: give(h, order,
    // slot) of the R least used of the part, ascending, each by one thread. Where the part has fewer slots, the rest
    // are kNoSlot.
    MANN_INLINE void give_usage(Order *orders) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            if (local(i) < kSlots && lane() == 0) orders[local(i)] = exists(i) ? order_of(usage[i]) : kNoSlot;
    }
    // Of what is never written: once, before the first.
    MANN_INLINE static void open_usage(Order *orders) {
        for (int i = kSlots + thread_again(); i < kOrders; i += kThreads) orders[i] = kNoSlot;
    }
    template <typename F> MANN_INLINE void choose(const Order *orders, F &&give) const {
        // Four slots at a time; those of four that all come before the own one by index count where they are equal too.
        Order own[kRows];
        int rank[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            own[i] = exists(i) ? order_of(usage[i]) : kNoSlot;
            rank[i] = 0;
            const int four = least(local(i), kSlots - 1) / 4 * 4;
#pragma unroll
            for (int j = 0; j < 3; ++j) rank[i] += lane() == 0 && four + j < local(i) && orders[four + j] == own[i];
        }
#pragma unroll(kOrders / (4 * kLanes) <= 16 ? kOrders / (4 * kLanes) : 8)
        for (int four = 4 * lane(); four < kOrders; four += 4 * kLanes) {
            const Orders others = *reinterpret_cast<const Orders *>(orders + four);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const Order below = own[i] + (four + 4 <= local(i)); // no overflow: nobody asks for what has no slot
#pragma unroll
                for (int j = 0; j < 4; ++j) rank[i] += others.at[j] < below;
            }
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int r = sum_lanes(rank[i], 1, kLanes);
            if (exists(i) && lane() == 0 && r < R) give(r, own[i], slot(i));
        }
        const int count = least(kSlots, N - part * kSlots);
        for (int h = count + int(threadIdx.x); h < R; h += kThreads) give(h, kNoSlot, N + h);
    }
};

// Of the candidates of all parts, the R least used, to a step. By the first threads; barrier needed.
MANN_INLINE void merge_candidates(const Candidate (*all)[R], Step &step) {
    constexpr int kAll = kParts * R;
    const int i = int(threadIdx.x);
    if (i >= kAll) return;
    const Candidate own = all[i / R][i % R];
    int rank = 0;
#pragma unroll(kAll <= 32 ? kAll : 8)
    for (int j = 0; j < kAll; ++j) {
        const Candidate other = all[j / R][j % R]; // of ties the lowest slot
        rank += other.at[0] < own.at[0] + (other.at[1] < own.at[1]) && j != i;
    }
    if (rank < R) step.slots[rank] = int(own.at[1]);
}

} // namespace mann::cuda
