// An episode of memory steps: lrua_sequence and its backward. Each example runs through all of time while it is in
// cache.
#include "lrua_sequence.h"
#include "memory_backward.h"

namespace mann::MANN_ISA {

template <typename S> void lrua_sequence(const LruaSequenceArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const MemoryShape<T> s = memory_shape<T>(a.options);
    const int64_t N = s.N, P = s.P, W = s.W, R = s.R;
    T *memory = static_cast<T *>(scratch), *usage = memory + W * P, *row_squares = usage + P;
    T *weights = row_squares + P,
      *write_weights = weights + 2 * R * P; // weights: this and the previous step's, in turn
    T *key = write_weights + R * P, *add = key + R * W, *reads = add + R * W, *gate = reads + R * W, *beta = gate + R;
    int32_t *slots = reinterpret_cast<int32_t *>(beta + R);
    for (int64_t b = begin; b < end; ++b) {
        take_memory(N, P, W, static_cast<const S *>(a.memory) + b * N * W, memory);
        convert_rows(static_cast<const S *>(a.usage) + b * N, usage, 1, N, P);
        convert_rows(static_cast<const S *>(a.read_weights) + b * R * N, weights, R, N, P);
        const T *previous = weights;
        const int64_t length = a.lengths ? a.lengths[b] : a.T;
        for (int64_t t = 0; t < a.T; ++t) {
            const int64_t at = t * a.B + b;
            S *out = static_cast<S *>(a.reads) + at * R * W;
            if (t < length) {
                convert(static_cast<const S *>(a.key) + at * R * W, key, R * W);
                if (a.add) convert(static_cast<const S *>(a.add) + at * R * W, add, R * W);
                sigmoid_of(static_cast<const S *>(a.gate) + at * R, gate, R);
                if (a.beta) convert(static_cast<const S *>(a.beta) + at * R, beta, R);
                T *current = a.saved_read_weights ? static_cast<T *>(a.saved_read_weights) + at * R * P
                                                  : (previous == weights ? weights + R * P : weights);
                StepForward<T> step{};
                step.memory = memory, step.usage = usage, step.row_squares = row_squares;
                step.read_weights = previous, step.new_read_weights = current, step.write_weights = write_weights;
                step.key = key, step.add = a.add ? add : key, step.gate = gate, step.beta = a.beta ? beta : nullptr;
                step.reads = reads;
                step.least_used = a.saved_least_used ? a.saved_least_used + at * R : slots;
                step.erased = a.saved_erased ? static_cast<T *>(a.saved_erased) + at * s.erased() * W : nullptr;
                step_forward(s, step);
                convert(reads, out, R * W);
                previous = current;
            } else {
                std::memset(static_cast<void *>(out), 0, R * W * sizeof(S));
                if (a.saved_least_used) std::memset(a.saved_least_used + at * R, 0, R * sizeof(int32_t));
            }
            if (a.saved_memory && ((t + 1) % a.checkpoint_every == 0 || t + 1 == a.T))
                std::memcpy(static_cast<T *>(a.saved_memory) + (t / a.checkpoint_every * a.B + b) * W * P, memory,
                            W * P * sizeof(T));
        }
        give_memory(N, P, W, memory, static_cast<S *>(a.new_memory) + b * N * W);
        take_rows(usage, static_cast<S *>(a.new_usage) + b * N, 1, N, P);
        take_rows(previous, static_cast<S *>(a.new_read_weights) + b * R * N, R, N, P);
    }
}

template <typename S>
void lrua_sequence_backward(const LruaSequenceBackwardArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const MemoryShape<T> s = memory_shape<T>(a.options);
    const int64_t N = s.N, P = s.P, W = s.W, R = s.R;
    T *memory = static_cast<T *>(scratch), *dmemory = memory + W * P, *dweights = dmemory + W * P;
    T *weights0 = dweights + R * P, *weights1 = weights0 + R * P; // before the first step, after the only step
    T *step_scratch = weights1 + R * P, *key = step_scratch + step_backward_scratch(s), *add = key + R * W,
      *dreads = add + R * W, *dkey = dreads + R * W, *dadd = dkey + R * W;
    T *gate = dadd + R * W, *beta = gate + R, *dgate = beta + R, *dbeta = dgate + R;
    for (int64_t b = begin; b < end; ++b) {
        convert_rows(static_cast<const S *>(a.read_weights) + b * R * N, weights0, R, N, P);
        if (a.dnew_memory) take_memory(N, P, W, static_cast<const S *>(a.dnew_memory) + b * N * W, dmemory);
        else std::memset(dmemory, 0, W * P * sizeof(T));
        if (a.dnew_read_weights)
            convert_rows(static_cast<const S *>(a.dnew_read_weights) + b * R * N, dweights, R, N, P);
        else std::memset(dweights, 0, R * P * sizeof(T));
        if (a.new_memory) {
            take_memory(N, P, W, static_cast<const S *>(a.new_memory) + b * N * W, memory);
            convert_rows(static_cast<const S *>(a.new_read_weights) + b * R * N, weights1, R, N, P);
        }
        const int64_t length = a.lengths ? a.lengths[b] : a.T;
        const T *all_weights = static_cast<const T *>(a.saved_read_weights);
        for (int64_t t = a.T - 1; t >= 0; --t) {
            const int64_t at = t * a.B + b;
            if (a.saved_memory && ((t + 1) % a.checkpoint_every == 0 || t + 1 == a.T))
                std::memcpy(memory, static_cast<const T *>(a.saved_memory) + (t / a.checkpoint_every * a.B + b) * W * P,
                            W * P * sizeof(T));
            if (t < length) {
                convert(static_cast<const S *>(a.key) + at * R * W, key, R * W);
                if (a.add) convert(static_cast<const S *>(a.add) + at * R * W, add, R * W);
                convert(static_cast<const S *>(a.dreads) + at * R * W, dreads, R * W);
                sigmoid_of(static_cast<const S *>(a.gate) + at * R, gate, R);
                if (a.beta) convert(static_cast<const S *>(a.beta) + at * R, beta, R);
                StepBackward<T> step{};
                step.memory = memory, step.dmemory = dmemory, step.dread_weights = dweights, step.dreads = dreads;
                step.read_weights = all_weights ? all_weights + at * R * P : weights1;
                step.previous_weights = t == 0 ? weights0 : all_weights + (at - a.B) * R * P;
                step.key = key, step.add = a.add ? add : key, step.gate = gate, step.beta = a.beta ? beta : nullptr;
                step.least_used = a.saved_least_used + at * R;
                step.erased = a.saved_erased ? static_cast<const T *>(a.saved_erased) + at * s.erased() * W : nullptr;
                step.dkey = dkey, step.dadd = dadd, step.dgate = dgate, step.dbeta = dbeta, step.scratch = step_scratch;
                step_backward(s, step);
            } else {
                std::memset(dkey, 0, R * W * sizeof(T));
                std::memset(dadd, 0, R * W * sizeof(T));
                std::memset(dgate, 0, R * sizeof(T));
                std::memset(dbeta, 0, R * sizeof(T));
            }
            convert(dkey, static_cast<S *>(a.dkey) + at * R * W, R * W);
            convert(dgate, static_cast<S *>(a.dgate) + at * R, R);
            if (a.add) convert(dadd, static_cast<S *>(a.dadd) + at * R * W, R * W);
            if (a.beta) convert(dbeta, static_cast<S *>(a.dbeta) + at * R, R);
        }
        give_memory(N, P, W, dmemory, static_cast<S *>(a.dmemory) + b * N * W);
        take_rows(dweights, static_cast<S *>(a.dread_weights) + b * R * N, R, N, P);
    }
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

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_sequence_cpu(Tensor memory, Tensor usage, Tensor read_weights, Tensor key, Tensor gate, std::optional<Tensor> beta,
                  std::optional<Tensor> add, std::optional<Tensor> lengths, bool shared, bool erase_all, double decay,
                  double eps, int64_t checkpoint_every, bool save) {
    Call call(memory);
    const StepOptions o = sequence_options(read_weights, key, shared, erase_all, decay, eps, checkpoint_every);
    const int64_t T = key.size(0), B = read_weights.size(0), N = o.N, W = o.W, R = o.R, P = baseline::padded_slots(N);
    Tensor reads = call.empty({T, B, R, W}), memory1 = call.empty({B, N, W}), usage1 = call.empty({B, N});
    Tensor read_weights1 = call.empty({B, R, N});
    const ScalarType arith = call.arithmetic();
    Tensor saved_read_weights = save ? call.empty({T, B, R, P}, arith) : call.empty({0}, arith);
    Tensor saved_least_used = save ? call.empty({T, B, R}, ScalarType::Int) : call.empty({0}, ScalarType::Int);
    Tensor saved_erased = save ? call.empty({T, B, erase_all ? R : 1, W}, arith) : call.empty({0}, arith);
    const int64_t copies = (T + checkpoint_every - 1) / checkpoint_every;
    Tensor saved_memory = save ? call.empty({copies, B, W, P}, arith) : call.empty({0}, arith);
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
        args.saved_read_weights = out(saved_read_weights), args.saved_erased = out(saved_erased);
        args.saved_least_used = static_cast<int32_t *>(out(saved_least_used)), args.saved_memory = out(saved_memory);
    }
    call.run(lrua_sequence_pick(), &args, B, lrua_sequence_scratch(P, W, R), double(T) * B * N * W * (3 * R + 1));
    return {reads, memory1, usage1, read_weights1, saved_read_weights, saved_least_used, saved_erased, saved_memory};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_sequence_backward_cpu(Tensor dreads, std::optional<Tensor> dmemory1, std::optional<Tensor> dread_weights1,
                           Tensor read_weights, Tensor key, Tensor gate, std::optional<Tensor> beta,
                           std::optional<Tensor> add, std::optional<Tensor> lengths, Tensor saved_read_weights,
                           Tensor saved_least_used, Tensor saved_erased, Tensor saved_memory, bool shared,
                           bool erase_all, double eps, int64_t checkpoint_every) {
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
    args.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    args.key = call.in(key, "key", {T, B, R, W});
    args.gate = call.in(gate, "gate", {T, B, R});
    args.beta = call.in(beta, "beta", {T, B, R});
    args.add = call.in(add, "add", {T, B, R, W});
    args.lengths = call.lengths(lengths, B);
    args.saved_read_weights = call.in(saved_read_weights, arith, "saved_read_weights", {T, B, R, P});
    args.saved_least_used = call.slots(saved_least_used, "saved_least_used", {T, B, R}, N);
    args.saved_erased = call.in(saved_erased, arith, "saved_erased", {T, B, erase_all ? R : 1, W});
    const int64_t copies = (T + checkpoint_every - 1) / checkpoint_every;
    args.saved_memory = call.in(saved_memory, arith, "saved_memory", {copies, B, W, P});
    args.dmemory = out(dmemory), args.dread_weights = out(dread_weights), args.dkey = out(dkey),
    args.dgate = out(dgate);
    args.dbeta = out(dbeta), args.dadd = out(dadd);
    call.run(lrua_sequence_backward_pick(), &args, B, lrua_sequence_backward_scratch(P, W, R),
             double(T) * B * N * W * (8 * R + 2));
    return {dmemory, dread_weights, dkey, dgate, dbeta, dadd};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("lrua_sequence", TORCH_BOX(&mann::lrua_sequence_cpu));
    m.impl("lrua_sequence_backward", TORCH_BOX(&mann::lrua_sequence_backward_cpu));
}
#endif
