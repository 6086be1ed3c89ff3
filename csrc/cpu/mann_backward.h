// mann_sequence, backward.
#pragma once

#include <utility>

#include "mann_sequence.h"

namespace mann::MANN_ISA {

// The working memory of one part of the batch, going backward.
template <typename S> struct Backward {
    using T = Arith<S>;
    const MannSequenceBackwardArgs &a;
    const MannOptions &o = a.options;
    const MemoryShape<T> s = memory_shape<T>(o.step);
    const int64_t first, count, K = o.recurrent(), words = o.words();
    T *memory, *dmemory, *dweights, *weights0, *step_scratch; // [count, W, P] twice, [count, R, P] twice
    T *drecurrent, *next_drecurrent, *c0, *dc, *dgates,
        *dhead; // [count, K] twice, [count, H] twice, [count, 4H], [count, head]
    T *dreads;  // [R, W]

    Backward(const MannSequenceBackwardArgs &args, int64_t begin, int64_t end, void *scratch)
        : a(args), first(begin), count(end - begin) {
        memory = static_cast<T *>(scratch);
        dmemory = memory + count * s.W * s.P;
        dweights = dmemory + count * s.W * s.P;
        weights0 = dweights + count * s.R * s.P;
        step_scratch = weights0 + count * s.R * s.P;
        drecurrent = step_scratch + step_backward_scratch(s);
        next_drecurrent = drecurrent + count * K;
        c0 = next_drecurrent + count * K;
        dc = c0 + count * o.H;
        dgates = dc + count * o.H;
        dhead = dgates + count * 4 * o.H;
        dreads = dhead + count * o.head();
    }
    int64_t length(int64_t i) const { return a.lengths ? a.lengths[first + i] : o.T; }

    // A gradient that may be absent.
    static void take(const void *grad, int64_t b, T *target, int64_t n) {
        if (grad) convert(static_cast<const S *>(grad) + b * n, target, n);
        else std::memset(target, 0, n * sizeof(T));
    }
    void begin() {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t b = first + i;
            T *dm = dmemory + i * s.W * s.P, *dw = dweights + i * s.R * s.P;
            if (a.dmemory1) take_memory(s.N, s.P, s.W, static_cast<const S *>(a.dmemory1) + b * s.N * s.W, dm);
            else std::memset(dm, 0, s.W * s.P * sizeof(T));
            if (a.dread_weights1)
                convert_rows(static_cast<const S *>(a.dread_weights1) + b * s.R * s.N, dw, s.R, s.N, s.P);
            else std::memset(dw, 0, s.R * s.P * sizeof(T));
            convert_rows(static_cast<const S *>(a.read_weights) + b * s.R * s.N, weights0 + i * s.R * s.P, s.R, s.N,
                         s.P);
            take(a.dh1, b, drecurrent + i * K, o.H);
            take(a.dreads1, b, drecurrent + i * K + o.H, words);
            take(a.dc1, b, dc + i * o.H, o.H);
            take(a.c, b, c0 + i * o.H, o.H);
        }
    }

    void remember(int64_t t, int64_t i, T *dhead_row) {
        const int64_t at = t * o.B + first + i;
        const S *doutput = static_cast<const S *>(a.doutput) + at * K;
        for (int64_t j = 0; j < o.H; ++j) drecurrent[i * K + j] += to_arith(doutput[j]);
        for (int64_t j = 0; j < words; ++j) dreads[j] = drecurrent[i * K + o.H + j] + to_arith(doutput[o.H + j]);
        const HeadRow<const T> row(o, static_cast<const T *>(a.saved_head) + at * o.head());
        const HeadRow<T> drow(o, dhead_row);
        const T *all_weights = static_cast<const T *>(a.saved_read_weights);
        StepBackward<T> step{};
        step.memory = memory + i * s.W * s.P, step.dmemory = dmemory + i * s.W * s.P;
        step.dread_weights = dweights + i * s.R * s.P, step.dreads = dreads;
        step.read_weights = all_weights + at * s.R * s.P;
        step.previous_weights = t == 0 ? weights0 + i * s.R * s.P : all_weights + (at - o.B) * s.R * s.P;
        step.key = row.key, step.add = row.add, step.gate = row.gate, step.beta = row.beta;
        step.least_used = a.saved_least_used + at * s.R;
        step.erased = static_cast<const T *>(a.saved_erased) + at * s.erased() * s.W;
        step.dkey = drow.key, step.dadd = drow.add, step.dgate = drow.gate, step.dbeta = drow.beta;
        step.scratch = step_scratch;
        step_backward(s, step);
        activate_head_backward(o, row, drow);
    }

    void step(int64_t t) {
        const int64_t at = t * o.B + first, H = o.H, P = o.head();
        if ((t + 1) % o.checkpoint_every == 0 || t + 1 == o.T)
            std::memcpy(memory,
                        static_cast<const T *>(a.saved_memory) + (t / o.checkpoint_every * o.B + first) * s.W * s.P,
                        count * s.W * s.P * sizeof(T));
        T *dhead_rows = dhead, *dgate_rows = dgates;
        if constexpr (std::is_same_v<S, T>)
            dhead_rows = static_cast<T *>(a.dhead) + at * P, dgate_rows = static_cast<T *>(a.dgates) + at * 4 * H;
        for (int64_t i = 0; i < count; ++i) {
            if (t < length(i)) remember(t, i, dhead_rows + i * P);
            else std::memset(dhead_rows + i * P, 0, P * sizeof(T));
        }
        gemm(count, dhead_rows, P, Packed<T>{static_cast<const T *>(a.weight_head), P, H}, drecurrent, K, drecurrent,
             K);
        const T *saved_c = static_cast<const T *>(a.saved_c);
        for (int64_t i = 0; i < count; ++i) {
            T *dgate_row = dgate_rows + i * 4 * H;
            if (t < length(i))
                lstm_row_backward(H, static_cast<const T *>(a.saved_gates) + (at + i) * 4 * H,
                                  t == 0 ? c0 + i * H : saved_c + (at + i - o.B) * H, saved_c + (at + i) * H,
                                  drecurrent + i * K, dc + i * H, dgate_row);
            else std::memset(dgate_row, 0, 4 * H * sizeof(T));
        }
        gemm(count, dgate_rows, 4 * H, Packed<T>{static_cast<const T *>(a.weight_hh), 4 * H, K},
             static_cast<const T *>(nullptr), 0, next_drecurrent, K);
        for (int64_t i = 0; i < count; ++i) // a padded step hands the gradient of the state on
            if (t >= length(i)) std::memcpy(next_drecurrent + i * K, drecurrent + i * K, K * sizeof(T));
        std::swap(drecurrent, next_drecurrent);
        if constexpr (!std::is_same_v<S, T>) {
            convert(dhead_rows, static_cast<S *>(a.dhead) + at * P, count * P);
            convert(dgate_rows, static_cast<S *>(a.dgates) + at * 4 * H, count * 4 * H);
        }
    }

    void finish() {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t b = first + i;
            give_memory(s.N, s.P, s.W, dmemory + i * s.W * s.P, static_cast<S *>(a.dmemory) + b * s.N * s.W);
            take_rows(dweights + i * s.R * s.P, static_cast<S *>(a.dread_weights) + b * s.R * s.N, s.R, s.N, s.P);
            convert(drecurrent + i * K, static_cast<S *>(a.dh) + b * o.H, o.H);
            convert(drecurrent + i * K + o.H, static_cast<S *>(a.dreads) + b * words, words);
            convert(dc + i * o.H, static_cast<S *>(a.dc) + b * o.H, o.H);
        }
    }
};

template <typename S>
void mann_sequence_backward(const MannSequenceBackwardArgs &a, int64_t begin, int64_t end, void *scratch) {
    Backward<S> part(a, begin, end, scratch);
    part.begin();
    for (int64_t t = a.options.T - 1; t >= 0; --t) part.step(t);
    part.finish();
}

} // namespace mann::MANN_ISA
