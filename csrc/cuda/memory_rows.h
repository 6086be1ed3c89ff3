// How the threads of a warp share rows of the memory: kLanes neighbours have a row, each every kLanes-th piece of
// kVector numbers of it; a warp has kRows rows at once. Numbers per head and row are made by one of the row's lanes.
#pragma once

#include "device.h"

#include "memory_step.h"

namespace mann::cuda {

using S = MANN_STORAGE;
using T = Arith<S>;

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWidth = MANN_W, kHeads = MANN_R, kVector = MANN_VECTOR, kLanes = MANN_LANES, kParts = MANN_PARTS;
constexpr bool kBeta = MANN_BETA, kAdd = MANN_ADD, kWrite = MANN_WRITE;
constexpr int kWords = kHeads * kWidth, kRows = 32 / kLanes;
constexpr int kColumns = (kWidth + kLanes * kVector - 1) / (kLanes * kVector) * kVector; // of a lane
constexpr int kOwn = (kHeads + kLanes - 1) / kLanes;                                     // heads of a lane
constexpr int kHead = kWords + kHeads * (1 + kBeta) + kWords * kAdd;                     // numbers of a head
constexpr int kForwardPart = 2 * kHeads + kWords, kBackwardPart = kHead + kHeads;
// Beyond that code would be larger than any cache for it: loops, and arrays in local memory.
constexpr int kUnroll = kHeads * kColumns > 256 ? 1 : kHeads > kColumns ? kHeads : kColumns;
constexpr T kLowest = T(-3e38);

MANN_INLINE int warp_of_block() { return int(threadIdx.x) / 32; }
MANN_INLINE int lane_of_warp() { return int(threadIdx.x) % 32; }
MANN_INLINE int lane_of_row() { return int(threadIdx.x) % kLanes; }
MANN_INLINE int row_of_warp() { return lane_of_warp() / kLanes; }
// The column of the lane's i-th number, and whether there is one.
MANN_INLINE int column_of(int i) { return (i / kVector * kLanes + lane_of_row()) * kVector + i % kVector; }
MANN_INLINE bool has_column(int i) { return kColumns * kLanes == kWidth || column_of(i) < kWidth; }

MANN_INLINE float inverse_root(float x) { return rsqrtf(x); }
MANN_INLINE double inverse_root(double x) { return rsqrt(x); }

template <typename X> struct alignas(sizeof(X) * kVector) Piece {
    X at[kVector];
};
template <typename X> MANN_INLINE void load_row(const X *row, bool exists, T (&m)[kColumns]) {
#pragma unroll kUnroll
    for (int i = 0; i < kColumns; i += kVector) {
        const bool there = exists && has_column(i);
        Piece<X> piece;
        if (there) piece = *reinterpret_cast<const Piece<X> *>(row + column_of(i));
#pragma unroll
        for (int v = 0; v < kVector; ++v) m[i + v] = there ? T(to_arith(piece.at[v])) : T(0);
    }
}
template <typename X> MANN_INLINE void store_row(X *row, bool exists, const T (&m)[kColumns]) {
#pragma unroll kUnroll
    for (int i = 0; i < kColumns; i += kVector) {
        Piece<X> piece;
#pragma unroll
        for (int v = 0; v < kVector; ++v) piece.at[v] = to_storage<X>(m[i + v]);
        if (exists && has_column(i)) *reinterpret_cast<Piece<X> *>(row + column_of(i)) = piece;
    }
}

// Over the lanes of a row; over the rows of a warp, lane by lane. Every lane gets the sum.
MANN_INLINE T sum_over_row(T x) {
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) x += __shfl_xor_sync(kWholeWarp, x, d);
    return x;
}
MANN_INLINE T sum_over_rows(T x) {
#pragma unroll
    for (int d = kLanes; d < 32; d *= 2) x += __shfl_xor_sync(kWholeWarp, x, d);
    return x;
}
MANN_INLINE T sum_over_warp(T x) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) x += __shfl_xor_sync(kWholeWarp, x, d);
    return x;
}
MANN_INLINE T larger(T a, T b) { return a > b || a != a ? a : b; }
MANN_INLINE T largest_of_warp(T x) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) x = larger(x, __shfl_xor_sync(kWholeWarp, x, d));
    return x;
}

// Of numbers that every lane of a row has for all heads, those of the lane's own heads; and the other way.
MANN_INLINE int own_head(int k) { return lane_of_row() + k * kLanes; }
MANN_INLINE void take_own(const T (&all)[kHeads], T (&own)[kOwn]) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
        if (h % kLanes == lane_of_row()) own[h / kLanes] = all[h];
}
MANN_INLINE T of_head(const T (&own)[kOwn], int h) {
    if constexpr (kLanes == 1) return own[h];
    else return __shfl_sync(kWholeWarp, own[h / kLanes], h % kLanes, kLanes);
}

MANN_INLINE int length_of(const MemorySizes &s, int b) {
    return s.lengths ? int(min(s.lengths[b], int64_t(s.T))) : s.T;
}
// The heads at a step of an example: row `at` of [T, B].
MANN_INLINE T head_key(const MemoryHead<S> &a, int64_t at, int h, int w) {
    return a.row ? a.row[(at - a.first) * a.head + h * kWidth + w] : to_arith(a.key[at * kWords + h * kWidth + w]);
}
MANN_INLINE T head_gate(const MemoryHead<S> &a, int64_t at, int h) {
    return a.row ? a.row[(at - a.first) * a.head + kWords + h] : sigmoid(to_arith(a.gate[at * kHeads + h]));
}
MANN_INLINE T head_beta(const MemoryHead<S> &a, int64_t at, int h) {
    if constexpr (!kBeta) return T(1);
    return a.row ? a.row[(at - a.first) * a.head + kWords + kHeads + h] : to_arith(a.beta[at * kHeads + h]);
}
MANN_INLINE T head_add(const MemoryHead<S> &a, int64_t at, int h, int w) {
    return a.row ? a.row[(at - a.first) * a.head + kWords + kHeads * (1 + kBeta) + h * kWidth + w]
                 : to_arith(a.add[at * kWords + h * kWidth + w]);
}
// What a lane needs of the heads: its columns of every head, and the numbers of its own heads.
struct HeadColumns {
    T key[kHeads][kColumns], add[kHeads][kColumns];
    T gate[kOwn], beta[kOwn], key_square[kOwn];

    MANN_INLINE T added(int h, int i) const { return kAdd ? add[h][i] : key[h][i]; }
    MANN_INLINE void take(const MemoryHead<S> &a, int64_t at) {
        T squares[kHeads];
#pragma unroll kUnroll
        for (int h = 0; h < kHeads; ++h) {
            T square = 0;
#pragma unroll kUnroll
            for (int i = 0; i < kColumns; ++i) {
                key[h][i] = has_column(i) ? head_key(a, at, h, column_of(i)) : T(0);
                if constexpr (kAdd) add[h][i] = has_column(i) ? head_add(a, at, h, column_of(i)) : T(0);
                square += key[h][i] * key[h][i];
            }
            squares[h] = sum_over_row(square);
        }
#pragma unroll
        for (int k = 0; k < kOwn; ++k) key_square[k] = 0; // of a lane without a head
        take_own(squares, key_square);
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            const bool mine = own_head(k) < kHeads;
            gate[k] = kWrite && mine ? head_gate(a, at, own_head(k)) : T(0);
            beta[k] = mine ? head_beta(a, at, own_head(k)) : T(0);
        }
    }
};

// Read weights of an example, [R, N], that may be logits.
struct Weights {
    const S *plain = nullptr;
    const T *plain_t = nullptr, *logits = nullptr;
    bool only_slot = false;         // its weight is 1, exactly
    T largest[kOwn], inverse[kOwn]; // of the lane's own heads

    MANN_INLINE void take_totals(const T *totals) { // [R, 2]
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            const bool mine = own_head(k) < kHeads;
            largest[k] = mine ? totals[2 * own_head(k)] : T(0), inverse[k] = mine ? totals[2 * own_head(k) + 1] : T(0);
        }
    }
    // As they stand; `at` is a place in [R, N].
    MANN_INLINE T load(int at) const { return plain ? to_arith(plain[at]) : (plain_t ? plain_t[at] : logits[at]); }
    MANN_INLINE T weight(T loaded, int k) const {
        return plain || plain_t ? loaded : only_slot ? T(1) : exponential(loaded - largest[k]) * inverse[k];
    }
};

// Of the parts of an example, by one warp: the largest logit of head h, and one over the sum of exp(logit - it).
struct Totals {
    T largest, inverse;
};
MANN_INLINE Totals sum_totals(const T *found, int parts, int h) {
    constexpr int row = kForwardPart;
    constexpr int at_once = kBeta ? 5 : 10;
    T largest = kBeta ? kLowest : T(0), sum = 0;
#pragma unroll 1
    for (int first = lane_of_warp(); first < parts; first += 32 * at_once) {
        T of_part[at_once], logit[at_once];
#pragma unroll
        for (int j = 0; j < at_once; ++j) {
            const int p = first + 32 * j;
            const T *part = found + int64_t(p) * row + h;
            of_part[j] = load_if(p < parts, part + kHeads);
            if constexpr (kBeta) logit[j] = load_if(p < parts, part);
        }
        if constexpr (kBeta) {
            T next = largest;
#pragma unroll
            for (int j = 0; j < at_once; ++j)
                if (first + 32 * j < parts) next = larger(next, logit[j]);
            sum *= exponential(largest - next), largest = next;
        }
#pragma unroll
        for (int j = 0; j < at_once; ++j)
            if (first + 32 * j < parts) sum += kBeta ? of_part[j] * exponential(logit[j] - largest) : of_part[j];
    }
    if constexpr (kBeta) {
        const T all = largest_of_warp(largest);
        sum *= exponential(largest - all), largest = all;
    }
    return {largest, 1 / sum_over_warp(sum)};
}

// Of threads that stand `columns` to a row, row after row: the sum of a column to the thread of the first row that has
// it. shared: [warps, columns].
template <int columns> MANN_INLINE T sum_columns(T x, T *shared) {
#pragma unroll
    for (int d = columns; d < 32; d *= 2) x += __shfl_xor_sync(kWholeWarp, x, d);
    if (lane_of_warp() < columns) shared[warp_of_block() * columns + lane_of_warp()] = x;
    __syncthreads();
    if (int(threadIdx.x) >= columns) return x;
    x = 0;
#pragma unroll 16
    for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) x += shared[warp * columns + int(threadIdx.x)];
    return x;
}

// Whether usage a of slot i comes before b of slot j: ties to the lowest index, NaN last, no slot (-1) after all.
MANN_INLINE bool less_used(T a, int i, T b, int j) {
    if (i < 0 || j < 0) return j < 0 && i >= 0;
    const bool nan_a = a != a, nan_b = b != b;
    if (nan_a || nan_b) return nan_a && nan_b ? i < j : nan_b;
    return a < b || (a == b && i < j);
}
// The R least used of the slots that a thread has seen, ascending.
struct Least {
    T usage[kHeads];
    int slot[kHeads];

    MANN_INLINE Least() {
#pragma unroll
        for (int h = 0; h < kHeads; ++h) usage[h] = 0, slot[h] = -1;
    }
    MANN_INLINE void see(T u, int n) {
        if (!less_used(u, n, usage[kHeads - 1], slot[kHeads - 1])) return;
#pragma unroll
        for (int h = kHeads - 1; h >= 0; --h) {
            const bool before = h > 0 && less_used(u, n, usage[h > 0 ? h - 1 : 0], slot[h > 0 ? h - 1 : 0]);
            if (before) usage[h] = usage[h > 0 ? h - 1 : 0], slot[h] = slot[h > 0 ? h - 1 : 0];
            else if (less_used(u, n, usage[h], slot[h])) usage[h] = u, slot[h] = n;
        }
    }
    MANN_INLINE void drop_first() {
#pragma unroll
        for (int h = 0; h + 1 < kHeads; ++h) usage[h] = usage[h + 1], slot[h] = slot[h + 1];
        slot[kHeads - 1] = -1;
    }
    // The least that any lane of the warp has.
    MANN_INLINE void first_of_warp(T &u, int &n) const {
        u = usage[0], n = slot[0];
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const T other = __shfl_xor_sync(kWholeWarp, u, d);
            const int there = __shfl_xor_sync(kWholeWarp, n, d);
            if (less_used(other, there, u, n)) u = other, n = there;
        }
    }
};

// Which of the least-used slots n is, ascending; -1: none. Whether head h writes to it; whether it is erased.
MANN_INLINE int place_of(const int32_t *slots, int n) {
    int place = -1;
#pragma unroll
    for (int h = kHeads - 1; h >= 0; --h)
        if (slots[h] == n) place = h;
    return place;
}
MANN_INLINE T own_slot(int place, int h, int shared) { return place >= 0 && (shared || place == h) ? T(1) : T(0); }
MANN_INLINE bool is_erased(int place, int erase_all) { return place == 0 || (place > 0 && erase_all); }

// A lane's sums over its rows, [R] columns each: over the rows of the warp, then over the warps of the block in their
// order, to target [R, W]. With kParts > 1 every warp has a target, `stride` apart. shared: [warps, R, W].
MANN_INLINE void give_columns(T (&sums)[kHeads][kColumns], T *shared, T *target, int64_t stride) {
#pragma unroll kUnroll
    for (int h = 0; h < kHeads; ++h)
#pragma unroll kUnroll
        for (int i = 0; i < kColumns; ++i) {
            const T sum = sum_over_rows(sums[h][i]);
            if (row_of_warp() != 0 || !has_column(i)) continue;
            const int at = h * kWidth + column_of(i);
            if constexpr (kParts > 1) target[warp_of_block() * stride + at] = sum;
            else shared[warp_of_block() * kWords + at] = sum;
        }
    if constexpr (kParts > 1) return;
    __syncthreads();
    for (int at = int(threadIdx.x); at < kWords; at += kMemoryThreads) {
        T sum = 0;
#pragma unroll
        for (int warp = 0; warp < kMemoryWarps; ++warp) sum += shared[warp * kWords + at];
        target[at] = sum;
    }
    __syncthreads();
}
// The same of numbers that the owner of a head has; target [R], shared [warps, R].
MANN_INLINE void give_own(const T (&sums)[kOwn], T *shared, T *target, int64_t stride) {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        const T sum = sum_over_rows(sums[k]);
        if (row_of_warp() != 0 || own_head(k) >= kHeads) continue;
        if constexpr (kParts > 1) target[warp_of_block() * stride + own_head(k)] = sum;
        else shared[warp_of_block() * kHeads + own_head(k)] = sum;
    }
    if constexpr (kParts > 1) return;
    __syncthreads();
    for (int h = int(threadIdx.x); h < kHeads; h += kMemoryThreads) {
        T sum = 0;
#pragma unroll
        for (int warp = 0; warp < kMemoryWarps; ++warp) sum += shared[warp * kHeads + h];
        target[h] = sum;
    }
    __syncthreads();
}

} // namespace mann::cuda
