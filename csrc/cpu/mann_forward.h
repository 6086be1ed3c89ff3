// mann_sequence, forward.
#pragma once

#include "mann_sequence.h"

namespace mann::MANN_ISA {

// The working memory of one part of the batch, going forward.
template <typename S> struct Forward {
    using T = Arith<S>;
    const MannSequenceArgs &a;
    const MannOptions &o = a.options;
    const MemoryShape<T> s = memory_shape<T>(o.step);
    const int64_t first, count, K = o.recurrent(), words = o.words();
    T *memory, *usage, *weights, *write_weights,
        *row_squares;                       // [count, W, P], [count, P], [2, count, R, P], [R, P], [P]
    T *recurrent, *c, *gates, *head, *bias; // [count, K], [count, H], [count, 4H], [count, head], [head]
    int32_t *slots;                         // [R]

    Forward(const MannSequenceArgs &args, int64_t begin, int64_t end, void *scratch)
        : a(args), first(begin), count(end - begin) {
        const MannForwardPlan plan(o, s.P, count);
        T *base = static_cast<T *>(scratch);
        memory = base + plan.memory, usage = base + plan.usage, weights = base + plan.weights;
        write_weights = base + plan.write_weights, row_squares = base + plan.row_squares;
        recurrent = base + plan.recurrent, c = base + plan.c, gates = base + plan.gates;
        head = base + plan.head, bias = base + plan.bias;
        slots = reinterpret_cast<int32_t *>(base + plan.slots);
    }
    int64_t length(int64_t i) const { return a.lengths ? a.lengths[first + i] : o.T; }
    // Read weights before step t of example i: two buffers take turns.
    T *previous(int64_t t, int64_t i) const { return weights + ((t % 2) * count + i) * s.R * s.P; }

    void begin() {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t b = first + i;
            take_memory(s.N, s.P, s.W, static_cast<const S *>(a.memory) + b * s.N * s.W, memory + i * s.W * s.P);
            convert_rows(static_cast<const S *>(a.usage) + b * s.N, usage + i * s.P, 1, s.N, s.P);
            convert_rows(static_cast<const S *>(a.read_weights) + b * s.R * s.N, previous(0, i), s.R, s.N, s.P);
            convert(static_cast<const S *>(a.h) + b * o.H, recurrent + i * K, o.H);
            convert(static_cast<const S *>(a.reads) + b * words, recurrent + i * K + o.H, words);
            convert(static_cast<const S *>(a.c) + b * o.H, c + i * o.H, o.H);
        }
        convert(static_cast<const S *>(a.bias_head), bias, o.head());
    }

    void remember(int64_t t, int64_t i, const HeadRow<T> &row) {
        const int64_t at = t * o.B + first + i;
        StepForward<T> step{};
        step.memory = memory + i * s.W * s.P, step.usage = usage + i * s.P, step.row_squares = row_squares;
        step.read_weights = previous(t, i), step.new_read_weights = step.dots = previous(t + 1, i);
        step.write_weights = write_weights;
        step.key = row.key, step.add = row.add, step.gate = row.gate, step.beta = row.beta;
        step.reads = recurrent + i * K + o.H;
        step.least_used = a.saved_least_used ? a.saved_least_used + at * s.R : slots;
        step_forward(s, step);
    }

    void step(int64_t t) {
        const int64_t at = t * o.B + first, H = o.H, P = o.head();
        T *gate_rows = a.saved_gates ? static_cast<T *>(a.saved_gates) + at * 4 * H : gates;
        const S *gates_x = static_cast<const S *>(a.gates_x) + at * 4 * H;
        S *output = static_cast<S *>(a.output) + at * K;
        const T *initial;
        if constexpr (std::is_same_v<S, T>) {
            initial = gates_x;
        } else {
            convert(gates_x, gate_rows, count * 4 * H);
            initial = gate_rows;
        }
        gemm(count, recurrent, K, packed_weight<S>(a.weight_hh, K, 4 * H), initial, 4 * H, gate_rows, 4 * H);
        for (int64_t i = 0; i < count; ++i) {
            if (t >= length(i)) continue;
            lstm_row(H, gate_rows + i * 4 * H, c + i * H, recurrent + i * K);
            keep(recurrent + i * K, output + i * K, H);
        }
        gemm(count, recurrent, K, packed_weight<S>(a.weight_head, H, P), bias, 0, head, P);
        for (int64_t i = 0; i < count; ++i) {
            if (t < length(i)) {
                const HeadRow<T> row(o, head + i * P);
                activate_head(o, row);
                remember(t, i, row);
                keep(recurrent + i * K + H, output + i * K + H, words);
            } else {
                std::memset(static_cast<void *>(output + i * K), 0, K * sizeof(S));
                if (a.saved_least_used) std::memset(a.saved_least_used + (at + i) * s.R, 0, s.R * sizeof(int32_t));
                convert(previous(t, i), previous(t + 1, i), s.R * s.P); // the read weights stay
            }
        }
        if (a.saved_memory && (t + 1) % o.checkpoint_every == 0 && t + 1 < o.T) {
            const int64_t copy = t / o.checkpoint_every * o.B + first;
            convert(c, static_cast<T *>(a.saved_c) + copy * H, count * H);
            for (int64_t i = 0; i < count; ++i)
                give_memory(s.N, s.P, s.W, memory + i * s.W * s.P,
                            static_cast<T *>(a.saved_memory) + (copy + i) * s.N * s.W);
            take_rows(previous(t + 1, 0), static_cast<T *>(a.saved_read_weights) + copy * s.R * s.N, count * s.R, s.N,
                      s.P);
        }
    }

    void finish() {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t b = first + i;
            give_memory(s.N, s.P, s.W, memory + i * s.W * s.P, static_cast<S *>(a.memory1) + b * s.N * s.W);
            take_rows(usage + i * s.P, static_cast<S *>(a.usage1) + b * s.N, 1, s.N, s.P);
            take_rows(previous(o.T, i), static_cast<S *>(a.read_weights1) + b * s.R * s.N, s.R, s.N, s.P);
            convert(recurrent + i * K, static_cast<S *>(a.h1) + b * o.H, o.H);
            convert(recurrent + i * K + o.H, static_cast<S *>(a.reads1) + b * words, words);
            convert(c + i * o.H, static_cast<S *>(a.c1) + b * o.H, o.H);
        }
    }
};

template <typename S> void mann_sequence(const MannSequenceArgs &a, int64_t begin, int64_t end, void *scratch) {
    together(begin, end, [&](int64_t first, int64_t last) {
        Forward<S> part(a, first, last, scratch);
        part.begin();
        for (int64_t t = 0; t < a.options.T; ++t) part.step(t);
        part.finish();
    });
}

} // namespace mann::MANN_ISA
