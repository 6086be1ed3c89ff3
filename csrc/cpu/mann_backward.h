// mann_sequence, backward.
#pragma once

#include <utility>

#include "mann_sequence.h"

namespace mann::MANN_ISA {

// The working memory of one part of the batch, going backward a segment of steps at a time. The memory's steps of a
// segment are recomputed from the state before it, with the heads made anew from h, then undone one by one.
template <typename S> struct Backward {
    using T = Arith<S>;
    const MannSequenceBackwardArgs &a;
    const MannOptions &o = a.options;
    const MemoryShape<T> s = memory_shape<T>(o.step);
    const int64_t first, count, K = o.recurrent(), words = o.words();
    T *memory, *dmemory, *dweights, *weights0; // [count, W, P] twice, [count, R, P] twice; weights0: before the segment
    T *records, *restarts, *write_weights, *step_scratch; // [segment, count] records, [., count, W, P], [R, P]
    T *heads, *c; // [segment, count, head], [segment + 1, count, H] from before the segment on
    T *drecurrent, *next_drecurrent, *dc, *dgates, *dhead; // [count, K] twice, [count, H], [count, 4H], [count, head]
    T *dreads, *bias, *h;                                  // [R, W], [head], [count, H]

    Backward(const MannSequenceBackwardArgs &args, int64_t begin, int64_t end, void *scratch)
        : a(args), first(begin), count(end - begin) {
        const MannBackwardPlan plan(o, s.P, count);
        T *base = static_cast<T *>(scratch);
        memory = base + plan.memory, dmemory = base + plan.dmemory;
        dweights = base + plan.dweights, weights0 = base + plan.weights0;
        records = base + plan.records, restarts = base + plan.restarts;
        write_weights = base + plan.write_weights, step_scratch = base + plan.step_scratch;
        heads = base + plan.heads, c = base + plan.c;
        drecurrent = base + plan.drecurrent, next_drecurrent = base + plan.next_drecurrent;
        dc = base + plan.dc, dgates = base + plan.dgates, dhead = base + plan.dhead;
        h = base + plan.h, dreads = base + plan.dreads, bias = base + plan.bias;
    }
    int64_t length(int64_t i) const { return a.lengths ? a.lengths[first + i] : o.T; }
    T *memory_of(int64_t i) const { return memory + i * s.W * s.P; }
    T *restarts_of(int64_t i) const { return restarts + i * s.W * s.P; }
    // Of example i at the j-th step of the segment.
    StepRecord<T> record(int64_t j, int64_t i) const {
        return {s, records + (j * count + i) * step_record_size(o.step, s.P)};
    }
    const T *weights_before(int64_t j, int64_t i) const {
        return j == 0 ? weights0 + i * s.R * s.P : record(j - 1, i).read_weights;
    }
    T *head(int64_t j, int64_t i) const { return heads + (j * count + i) * o.head(); }
    T *c_before(int64_t j, int64_t i) const { return c + (j * count + i) * o.H; }
    const T *gates(int64_t t, int64_t i) const {
        return static_cast<const T *>(a.saved_gates) + (t * o.B + first + i) * 4 * o.H;
    }

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
            take(a.dh1, b, drecurrent + i * K, o.H);
            take(a.dreads1, b, drecurrent + i * K + o.H, words);
            take(a.dc1, b, dc + i * o.H, o.H);
        }
        convert(static_cast<const S *>(a.bias_head), bias, o.head());
    }

    void start_from(int64_t t) {
        if (t > 0) {
            const int64_t copy = (t / o.checkpoint_every - 1) * o.B + first;
            convert(static_cast<const T *>(a.saved_c) + copy * o.H, c, count * o.H);
            for (int64_t i = 0; i < count; ++i)
                take_memory(s.N, s.P, s.W, static_cast<const T *>(a.saved_memory) + (copy + i) * s.N * s.W,
                            memory_of(i));
            convert_rows(static_cast<const T *>(a.saved_read_weights) + copy * s.R * s.N, weights0, count * s.R, s.N,
                         s.P);
            return;
        }
        for (int64_t i = 0; i < count; ++i) {
            const int64_t b = first + i;
            take(a.c, b, c_before(0, i), o.H);
            take_memory(s.N, s.P, s.W, static_cast<const S *>(a.memory) + b * s.N * s.W, memory + i * s.W * s.P);
            convert_rows(static_cast<const S *>(a.read_weights) + b * s.R * s.N, weights0 + i * s.R * s.P, s.R, s.N,
                         s.P);
        }
    }
    void recompute_heads(int64_t t, int64_t j) {
        const S *output = static_cast<const S *>(a.output) + (t * o.B + first) * K;
        for (int64_t i = 0; i < count; ++i) convert(output + i * K, h + i * o.H, o.H);
        gemm(count, h, o.H, packed_weight<S>(a.weight_head_forward, o.H, o.head()), bias, 0, head(j, 0), o.head());
    }
    void again(int64_t t, int64_t j, int64_t i) {
        if (t >= length(i)) { // nothing changes
            convert(c_before(j, i), c_before(j + 1, i), o.H);
            return set_aside(j, memory_of(i), s.W * s.P, restarts_of(i), count * s.W * s.P);
        }
        cell_row(o.H, gates(t, i), c_before(j, i), c_before(j + 1, i));
        const HeadRow<T> row(o, head(j, i));
        activate_head(o, row);
        const StepRecord<T> made = record(j, i);
        StepForward<T> step{};
        step.memory = memory_of(i), step.row_squares = made.row_squares, step.dots = made.dots;
        step.read_weights = weights_before(j, i), step.new_read_weights = made.read_weights;
        step.write_weights = write_weights, step.overwritten = made.overwritten;
        step.key = row.key, step.add = row.add, step.gate = row.gate, step.beta = row.beta;
        // read only: there is no usage
        step.least_used = const_cast<int32_t *>(a.saved_least_used) + (t * o.B + first + i) * s.R;
        step_forward(s, step);
        set_aside(j, memory_of(i), s.W * s.P, restarts_of(i), count * s.W * s.P);
    }

    void undo_memory(int64_t t, int64_t j, int64_t i, T *dhead_row) {
        const int64_t at = t * o.B + first + i;
        restart(j, memory_of(i), s.W * s.P, restarts_of(i), count * s.W * s.P);
        const S *doutput = static_cast<const S *>(a.doutput) + at * K;
        for (int64_t n = 0; n < o.H; ++n) drecurrent[i * K + n] += to_arith(doutput[n]);
        for (int64_t n = 0; n < words; ++n) dreads[n] = drecurrent[i * K + o.H + n] + to_arith(doutput[o.H + n]);
        const HeadRow<const T> row(o, head(j, i));
        const HeadRow<T> drow(o, dhead_row);
        StepBackward<T> step{};
        step.memory = memory_of(i), step.dmemory = dmemory + i * s.W * s.P;
        step.dread_weights = dweights + i * s.R * s.P, step.dreads = dreads;
        step.previous_weights = weights_before(j, i);
        step.key = row.key, step.add = row.add, step.gate = row.gate, step.beta = row.beta;
        step.least_used = a.saved_least_used + at * s.R;
        step.dkey = drow.key, step.dadd = drow.add, step.dgate = drow.gate, step.dbeta = drow.beta;
        step.scratch = step_scratch;
        step_backward(s, record(j, i), step);
        activate_head_backward(o, row, drow);
    }

    void undo(int64_t t, int64_t j) {
        const int64_t at = t * o.B + first, H = o.H, P = o.head();
        T *dhead_rows = dhead, *dgate_rows = dgates;
        if constexpr (std::is_same_v<S, T>)
            dhead_rows = static_cast<T *>(a.dhead) + at * P, dgate_rows = static_cast<T *>(a.dgates) + at * 4 * H;
        for (int64_t i = 0; i < count; ++i) {
            if (t < length(i)) undo_memory(t, j, i, dhead_rows + i * P);
            else std::memset(dhead_rows + i * P, 0, P * sizeof(T));
        }
        gemm(count, dhead_rows, P, packed_weight<S>(a.weight_head, P, H), drecurrent, K, drecurrent, K);
        for (int64_t i = 0; i < count; ++i) {
            T *dgate_row = dgate_rows + i * 4 * H;
            if (t < length(i))
                lstm_row_backward(H, gates(t, i), c_before(j, i), c_before(j + 1, i), drecurrent + i * K, dc + i * H,
                                  dgate_row);
            else std::memset(dgate_row, 0, 4 * H * sizeof(T));
        }
        gemm(count, dgate_rows, 4 * H, packed_weight<S>(a.weight_hh, 4 * H, K), static_cast<const T *>(nullptr), 0,
             next_drecurrent, K);
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
    const int64_t T = a.options.T, every = a.options.checkpoint_every;
    together(begin, end, [&](int64_t first, int64_t last) {
        Backward<S> part(a, first, last, scratch);
        part.begin();
        for (int64_t start = copies(T, every) * every; start >= 0; start -= every) {
            const int64_t stop = std::min(start + every, T);
            part.start_from(start);
            for (int64_t t = start; t < stop; ++t) part.recompute_heads(t, t - start);
            for (int64_t i = 0; i < part.count; ++i) // one example through all its steps: its memory stays in cache
                for (int64_t t = start; t < stop; ++t) part.again(t, t - start, i);
            for (int64_t t = stop - 1; t >= start; --t) part.undo(t, t - start);
        }
        part.finish();
    });
}

} // namespace mann::MANN_ISA
