// An episode of memory steps: lrua_sequence and its backward. Each example runs through all of time while it is in
// cache.
#include "lrua_sequence.h"

namespace mann::MANN_ISA {

// What one step of one example is given, as arithmetic numbers.
template <typename T> struct StepInput {
    T *key, *add, *gate, *beta; // [R, W] twice, [R] twice; add is key, and beta null, where there is none

    // Numbers: 2 * R * W + 2 * R.
    template <typename Args>
    StepInput(const Args &a, T *buffer)
        : key(buffer), add(a.add ? key + a.options.R * a.options.W : key), gate(key + 2 * a.options.R * a.options.W),
          beta(a.beta ? gate + a.options.R : nullptr) {}

    // `at` is t * B + b.
    template <typename S, typename Args> void take(const Args &a, int64_t at) const {
        const int64_t R = a.options.R, words = R * a.options.W;
        convert(static_cast<const S *>(a.key) + at * words, key, words);
        if (a.add) convert(static_cast<const S *>(a.add) + at * words, add, words);
        sigmoid_of(static_cast<const S *>(a.gate) + at * R, gate, R);
        if (a.beta) convert(static_cast<const S *>(a.beta) + at * R, beta, R);
    }
};

template <typename S> void lrua_sequence(const LruaSequenceArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const MemoryShape<T> s = memory_shape<T>(a.options);
    const int64_t N = s.N, P = s.P, W = s.W, R = s.R;
    const LruaForwardPlan plan(a.options, P);
    T *base = static_cast<T *>(scratch), *memory = base + plan.memory, *usage = base + plan.usage;
    T *row_squares = base + plan.row_squares, *weights = base + plan.weights;
    T *write_weights = base + plan.write_weights, *reads = base + plan.reads;
    const StepInput<T> input(a, base + plan.input);
    int32_t *slots = reinterpret_cast<int32_t *>(base + plan.slots);
    for (int64_t b = begin; b < end; ++b) {
        take_memory(N, P, W, static_cast<const S *>(a.memory) + b * N * W, memory);
        convert_rows(static_cast<const S *>(a.usage) + b * N, usage, 1, N, P);
        T *previous = weights, *current = weights + R * P;
        convert_rows(static_cast<const S *>(a.read_weights) + b * R * N, previous, R, N, P);
        const int64_t length = a.lengths ? a.lengths[b] : a.T;
        for (int64_t t = 0; t < a.T; ++t) {
            const int64_t at = t * a.B + b;
            S *out = static_cast<S *>(a.reads) + at * R * W;
            if (t < length) {
                input.template take<S>(a, at);
                StepForward<T> step{};
                step.memory = memory, step.usage = usage, step.row_squares = row_squares;
                step.read_weights = previous, step.new_read_weights = step.dots = current;
                step.write_weights = write_weights;
                step.key = input.key, step.add = input.add, step.gate = input.gate, step.beta = input.beta;
                step.reads = reads;
                step.least_used = a.saved_least_used ? a.saved_least_used + at * R : slots;
                step_forward(s, step);
                convert(reads, out, R * W);
                std::swap(previous, current);
            } else {
                std::memset(static_cast<void *>(out), 0, R * W * sizeof(S));
                if (a.saved_least_used) std::memset(a.saved_least_used + at * R, 0, R * sizeof(int32_t));
            }
            if (a.saved_memory && (t + 1) % a.checkpoint_every == 0 && t + 1 < a.T) {
                const int64_t copy = t / a.checkpoint_every * a.B + b;
                give_memory(N, P, W, memory, static_cast<T *>(a.saved_memory) + copy * N * W);
                take_rows(previous, static_cast<T *>(a.saved_read_weights) + copy * R * N, R, N, P);
            }
        }
        give_memory(N, P, W, memory, static_cast<S *>(a.new_memory) + b * N * W);
        take_rows(usage, static_cast<S *>(a.new_usage) + b * N, 1, N, P);
        take_rows(previous, static_cast<S *>(a.new_read_weights) + b * R * N, R, N, P);
    }
}

// Backward of one example: a segment of steps at a time, the last one first. A segment's steps are recomputed from the
// state before it, then undone one by one.
template <typename S> struct SequenceBackward {
    using T = Arith<S>;
    const LruaSequenceBackwardArgs &a;
    const MemoryShape<T> s = memory_shape<T>(a.options);
    const int64_t b, N = s.N, P = s.P, W = s.W, R = s.R;
    const LruaBackwardPlan plan{a.options, P, a.T, a.checkpoint_every};
    T *const base; // and places in it, see the plan; weights0 is before the segment
    T *memory = base + plan.memory, *dmemory = base + plan.dmemory, *dweights = base + plan.dweights;
    T *weights0 = base + plan.weights0, *write_weights = base + plan.write_weights, *records = base + plan.records;
    T *restarts = base + plan.restarts, *step_scratch = base + plan.step_scratch, *dreads = base + plan.dreads;
    T *dkey = base + plan.dkey, *dadd = base + plan.dadd, *dgate = base + plan.dgate, *dbeta = base + plan.dbeta;
    StepInput<T> input{a, base + plan.input};

    SequenceBackward(const LruaSequenceBackwardArgs &args, int64_t example, void *scratch)
        : a(args), b(example), base(static_cast<T *>(scratch)) {}

    StepRecord<T> record(int64_t step_of_segment) const {
        return {s, records + step_of_segment * step_record_size(a.options, P)};
    }
    const T *weights_before(int64_t step_of_segment) const {
        return step_of_segment == 0 ? weights0 : record(step_of_segment - 1).read_weights;
    }

    void start_from(int64_t t) {
        if (t == 0) {
            take_memory(N, P, W, static_cast<const S *>(a.memory) + b * N * W, memory);
            convert_rows(static_cast<const S *>(a.read_weights) + b * R * N, weights0, R, N, P);
        } else {
            const int64_t copy = (t / a.checkpoint_every - 1) * a.B + b;
            take_memory(N, P, W, static_cast<const T *>(a.saved_memory) + copy * N * W, memory);
            convert_rows(static_cast<const T *>(a.saved_read_weights) + copy * R * N, weights0, R, N, P);
        }
    }
    void again(int64_t t, int64_t step_of_segment) {
        const int64_t at = t * a.B + b;
        const StepRecord<T> made = record(step_of_segment);
        input.template take<S>(a, at);
        StepForward<T> step{};
        step.memory = memory, step.row_squares = made.row_squares, step.dots = made.dots;
        step.read_weights = weights_before(step_of_segment), step.new_read_weights = made.read_weights;
        step.write_weights = write_weights, step.overwritten = made.overwritten;
        step.key = input.key, step.add = input.add, step.gate = input.gate, step.beta = input.beta;
        step.least_used = const_cast<int32_t *>(a.saved_least_used) + at * R; // read only: there is no usage
        step_forward(s, step);
        set_aside(step_of_segment, memory, W * P, restarts, W * P);
    }
    void undo(int64_t t, int64_t step_of_segment) {
        const int64_t at = t * a.B + b;
        restart(step_of_segment, memory, W * P, restarts, W * P);
        input.template take<S>(a, at);
        convert(static_cast<const S *>(a.dreads) + at * R * W, dreads, R * W);
        StepBackward<T> step{};
        step.memory = memory, step.dmemory = dmemory, step.dread_weights = dweights, step.dreads = dreads;
        step.previous_weights = weights_before(step_of_segment);
        step.key = input.key, step.add = input.add, step.gate = input.gate, step.beta = input.beta;
        step.least_used = a.saved_least_used + at * R;
        step.dkey = dkey, step.dadd = dadd, step.dgate = dgate, step.dbeta = dbeta, step.scratch = step_scratch;
        step_backward(s, record(step_of_segment), step);
    }
    void give(int64_t at) {
        convert(dkey, static_cast<S *>(a.dkey) + at * R * W, R * W);
        convert(dgate, static_cast<S *>(a.dgate) + at * R, R);
        if (a.add) convert(dadd, static_cast<S *>(a.dadd) + at * R * W, R * W);
        if (a.beta) convert(dbeta, static_cast<S *>(a.dbeta) + at * R, R);
    }

    void run() {
        if (a.dnew_memory) take_memory(N, P, W, static_cast<const S *>(a.dnew_memory) + b * N * W, dmemory);
        else std::fill_n(dmemory, W * P, T(0));
        if (a.dnew_read_weights)
            convert_rows(static_cast<const S *>(a.dnew_read_weights) + b * R * N, dweights, R, N, P);
        else std::fill_n(dweights, R * P, T(0));
        for (T *of_padding : {dkey, dadd}) std::fill_n(of_padding, R * W, T(0));
        for (T *of_padding : {dgate, dbeta}) std::fill_n(of_padding, R, T(0));
        const int64_t length = a.lengths ? std::min(a.lengths[b], a.T) : a.T;
        for (int64_t t = a.T - 1; t >= std::max<int64_t>(length, 0); --t) give(t * a.B + b);
        for (int64_t start = (length - 1) / a.checkpoint_every * a.checkpoint_every; length > 0 && start >= 0;
             start -= a.checkpoint_every) {
            const int64_t end = std::min(start + a.checkpoint_every, length);
            start_from(start);
            for (int64_t t = start; t < end; ++t) again(t, t - start);
            for (int64_t t = end - 1; t >= start; --t) {
                undo(t, t - start);
                give(t * a.B + b);
            }
        }
        give_memory(N, P, W, dmemory, static_cast<S *>(a.dmemory) + b * N * W);
        take_rows(dweights, static_cast<S *>(a.dread_weights) + b * R * N, R, N, P);
    }
};

template <typename S>
void lrua_sequence_backward(const LruaSequenceBackwardArgs &a, int64_t begin, int64_t end, void *scratch) {
    for (int64_t b = begin; b < end; ++b) SequenceBackward<S>(a, b, scratch).run();
}

} // namespace mann::MANN_ISA

MANN_KERNEL(lrua_sequence, LruaSequenceArgs)
MANN_KERNEL(lrua_sequence_backward, LruaSequenceBackwardArgs)

#if defined(MANN_ENTRY)
#include "entry.h"

namespace mann {

static StepOptions sequence_options(const Tensor &read_weights, const Tensor &key, bool shared, bool erase_all,
                                    double decay, double eps, int64_t checkpoint_every) {
    STD_TORCH_CHECK(read_weights.dim() == 3 && key.dim() == 4, "lrua_sequence: wrong number of dimensions");
    STD_TORCH_CHECK(checkpoint_every > 0, "lrua_sequence: checkpoint_every must be positive");
    const int64_t N = read_weights.size(2), R = read_weights.size(1);
    STD_TORCH_CHECK(R <= N, "lrua_sequence: more heads than slots");
    return {N, key.size(3), R, shared, erase_all, decay, eps};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_sequence_cpu(Tensor memory, Tensor usage, Tensor read_weights, Tensor key, Tensor gate, std::optional<Tensor> beta,
                  std::optional<Tensor> add, std::optional<Tensor> lengths, bool shared, bool erase_all, double decay,
                  double eps, int64_t checkpoint_every, bool save) {
    Call call(memory);
    const StepOptions o = sequence_options(read_weights, key, shared, erase_all, decay, eps, checkpoint_every);
    const int64_t T = key.size(0), B = read_weights.size(0), N = o.N, W = o.W, R = o.R, P = baseline::padded_slots(N);
    Tensor reads = call.empty({T, B, R, W}), memory1 = call.empty({B, N, W}), usage1 = call.empty({B, N});
    Tensor read_weights1 = call.empty({B, R, N});
    const int64_t kept = copies(T, checkpoint_every);
    const auto saved = [&](Sizes sizes, ScalarType dtype) {
        return save ? call.empty(sizes, dtype) : call.empty({0}, dtype);
    };
    Tensor saved_least_used = saved({T, B, R}, ScalarType::Int);
    Tensor saved_memory = saved({kept, B, N, W}, call.arithmetic());
    Tensor saved_read_weights = saved({kept, B, R, N}, call.arithmetic());
    LruaSequenceArgs args{};
    args.options = o, args.T = T, args.B = B, args.checkpoint_every = checkpoint_every;
    args.memory = call.in(memory, "memory", {B, N, W});
    args.usage = call.in(usage, "usage", {B, N});
    args.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    args.key = call.in(key, "key", {T, B, R, W});
    args.gate = call.in(gate, "gate", {T, B, R});
    args.beta = call.in(beta, "beta", {T, B, R});
    args.add = call.in(add, "add", {T, B, R, W});
    args.lengths = call.lengths(lengths, B);
    args.reads = out(reads), args.new_memory = out(memory1), args.new_usage = out(usage1);
    args.new_read_weights = out(read_weights1);
    if (save) {
        args.saved_least_used = static_cast<int32_t *>(out(saved_least_used));
        args.saved_memory = out(saved_memory), args.saved_read_weights = out(saved_read_weights);
    }
    call.run(lrua_sequence_pick(), &args, B, baseline::LruaForwardPlan(o, P).size, double(T) * B * N * W * (3 * R + 1));
    return {reads, memory1, usage1, read_weights1, saved_least_used, saved_memory, saved_read_weights};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_sequence_backward_cpu(Tensor dreads, std::optional<Tensor> dmemory1, std::optional<Tensor> dread_weights1,
                           Tensor memory, Tensor read_weights, Tensor key, Tensor gate, std::optional<Tensor> beta,
                           std::optional<Tensor> add, std::optional<Tensor> lengths, Tensor saved_least_used,
                           Tensor saved_memory, Tensor saved_read_weights, bool shared, bool erase_all, double eps,
                           int64_t checkpoint_every) {
    Call call(key);
    const StepOptions o = sequence_options(read_weights, key, shared, erase_all, 0, eps, checkpoint_every);
    const int64_t T = key.size(0), B = read_weights.size(0), N = o.N, W = o.W, R = o.R, P = baseline::padded_slots(N);
    const ScalarType arith = call.arithmetic();
    Tensor dmemory = call.empty({B, N, W}), dread_weights = call.empty({B, R, N}), dkey = call.empty({T, B, R, W});
    Tensor dgate = call.empty({T, B, R}), dbeta = beta ? call.empty({T, B, R}) : call.empty({0});
    Tensor dadd = add ? call.empty({T, B, R, W}) : call.empty({0});
    LruaSequenceBackwardArgs args{};
    args.options = o, args.T = T, args.B = B, args.checkpoint_every = checkpoint_every;
    args.dreads = call.in(dreads, "dreads", {T, B, R, W});
    args.dnew_memory = call.in(dmemory1, "dmemory1", {B, N, W});
    args.dnew_read_weights = call.in(dread_weights1, "dread_weights1", {B, R, N});
    args.memory = call.in(memory, "memory", {B, N, W});
    args.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    args.key = call.in(key, "key", {T, B, R, W});
    args.gate = call.in(gate, "gate", {T, B, R});
    args.beta = call.in(beta, "beta", {T, B, R});
    args.add = call.in(add, "add", {T, B, R, W});
    args.lengths = call.lengths(lengths, B);
    args.saved_least_used = call.slots(saved_least_used, "saved_least_used", {T, B, R}, N);
    const int64_t kept = copies(T, checkpoint_every);
    args.saved_memory = call.in(saved_memory, arith, "saved_memory", {kept, B, N, W});
    args.saved_read_weights = call.in(saved_read_weights, arith, "saved_read_weights", {kept, B, R, N});
    args.dmemory = out(dmemory), args.dread_weights = out(dread_weights), args.dkey = out(dkey),
    args.dgate = out(dgate);
    args.dbeta = out(dbeta), args.dadd = out(dadd);
    call.run(lrua_sequence_backward_pick(), &args, B, baseline::LruaBackwardPlan(o, P, T, checkpoint_every).size,
             double(T) * B * N * W * (9 * R + 2));
    return {dmemory, dread_weights, dkey, dgate, dbeta, dadd};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("lrua_sequence", TORCH_BOX(&mann::lrua_sequence_cpu));
    m.impl("lrua_sequence_backward", TORCH_BOX(&mann::lrua_sequence_backward_cpu));
}
#endif
