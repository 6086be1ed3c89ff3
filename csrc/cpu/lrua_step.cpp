// One step of the memory in the caller's layout: lrua_step and its backward.
#include "plan.h"
#include "rows.h"

namespace mann {

struct LruaStepArgs {
    StepOptions options;
    const void *memory;       // [B, N, W]
    const void *usage;        // [B, N]
    const void *read_weights; // [B, R, N]
    const void *key;          // [B, R, W]
    const void *gate;         // [B, R], before the sigmoid
    const void *beta;         // [B, R] or null
    const void *add;          // [B, R, W] or null: the key is written
    void *reads;              // [B, R, W] out
    void *new_memory;         // [B, N, W] out
    void *new_usage;          // [B, N] out
    void *new_read_weights;   // [B, R, N] out
    int32_t *least_used;      // [B, R] out
};

struct LruaStepBackwardArgs {
    StepOptions options;
    const void *dreads;            // [B, R, W]
    const void *dnew_memory;       // [B, N, W] or null (zero)
    const void *dnew_read_weights; // [B, R, N] or null (zero)
    const void *memory;            // as forward
    const void *read_weights;
    const void *key;
    const void *gate;
    const void *beta;
    const void *add;
    const int32_t *least_used;
    void *dmemory;       // [B, N, W] out
    void *dread_weights; // [B, R, N] out
    void *dkey;          // [B, R, W] out
    void *dgate;         // [B, R] out
    void *dbeta;         // [B, R] out; not touched where beta is null
    void *dadd;          // [B, R, W] out; not touched where add is null
};

namespace MANN_ISA {

struct LruaStepPlan : Plan {
    int64_t block, add, gate, beta;  // a RowBlock, [R, Q], [R] twice
    int64_t key;                     // [2, R, Q], with dreads: both meet the rows
    int64_t dots, dweights, weights; // [R, P], likewise: the rows' with both, and theirs with dweights, weights
    int64_t previous, write_weights, row_squares; // [R, P] twice, [P]
    int64_t usage, reads;                         // forward alone: [P], [R, Q]
    int64_t dblock, dkey, dadd, dgate, dbeta;     // backward alone: as above
    int64_t dwrite_weights, dprevious;            // [R, P]
    int64_t row_factor, dkey_factor;              // [P], [R]
    explicit LruaStepPlan(const StepOptions &o) {
        const int64_t R = o.R, P = padded_slots(o.N), Q = round_up(o.W, 16);
        block = take(16 * Q), add = take(R * Q), gate = take(R), beta = take(R);
        key = take(2 * R * Q), dots = take(3 * R * P), dweights = dots + R * P, weights = dweights + R * P;
        previous = take(R * P), write_weights = take(R * P), row_squares = take(P);
        usage = take(P), reads = take(R * Q);
        dblock = take(16 * Q), dkey = take(R * Q), dadd = take(R * Q), dgate = take(R), dbeta = take(R);
        dwrite_weights = take(R * P), dprevious = take(R * P), row_factor = take(P), dkey_factor = take(R);
    }
};

// What a step is given, as arithmetic numbers, and the rows after its write.
template <typename S, typename Args> struct StepOnRows {
    using T = Arith<S>;
    const Args &a;
    const MemoryShape<T> s = memory_shape<T>(a.options);
    const int64_t b, N = s.N, P = s.P, W = s.W, R = s.R, Q = padded_width<T>(W);
    const LruaStepPlan plan{a.options};
    T *const base;
    T *key = base + plan.key, *add = a.add ? base + plan.add : key, *gate = base + plan.gate;
    T *beta = a.beta ? base + plan.beta : nullptr, *previous = base + plan.previous;
    T *write_weights = base + plan.write_weights, *weights = base + plan.weights;
    T *row_squares = base + plan.row_squares;
    RowBlock<T> rows{base + plan.block, N, P, W, Q};

    StepOnRows(const Args &args, int64_t example, void *scratch)
        : a(args), b(example), base(static_cast<T *>(scratch)) {
        convert_rows(static_cast<const S *>(a.read_weights) + b * R * N, previous, R, N, P);
        take_vectors(a.key, key);
        if (a.add) take_vectors(a.add, add);
        sigmoid_of(static_cast<const S *>(a.gate) + b * R, gate, R);
        if (beta) convert(static_cast<const S *>(a.beta) + b * R, beta, R);
    }
    // [B, R, W] and [R, Q]
    void take_vectors(const void *source, T *target) const {
        convert_rows(static_cast<const S *>(source) + b * R * W, target, R, W, Q);
    }
    void give_vectors(const T *source, void *target) const {
        take_rows(source, static_cast<S *>(target) + b * R * W, R, W, Q);
    }
    void give_weights(const T *source, void *target) const {
        take_rows(source, static_cast<S *>(target) + b * R * N, R, N, P);
    }
    // The block after the step's write, where it is placed.
    void write() const {
        const S *memory = static_cast<const S *>(a.memory) + b * N * W;
        rows.outer(R, write_weights, add, rows.erased(memory, a.least_used + b * R, s.erased()));
    }
};

template <typename S> void lrua_step(const LruaStepArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    for (int64_t b = begin; b < end; ++b) {
        StepOnRows<S, LruaStepArgs> step(a, b, scratch);
        const MemoryShape<T> &s = step.s;
        const int64_t N = s.N, P = s.P, W = s.W, R = s.R, Q = step.Q;
        RowBlock<T> &rows = step.rows;
        T *usage = step.base + step.plan.usage, *reads = step.base + step.plan.reads;
        S *new_memory = static_cast<S *>(a.new_memory) + b * N * W;
        convert_rows(static_cast<const S *>(a.usage) + b * N, usage, 1, N, P);
        least_used_slots(usage, N, R, a.least_used + b * R);
        interpolate(s, step.previous, step.gate, a.least_used + b * R, step.write_weights);
        rows.for_each([&] {
            rows.place(new_memory);
            step.write();
            rows.dot(R, step.key, step.weights);
            rows.square(step.row_squares);
            rows.give(new_memory);
        });
        address(s, step.weights, step.row_squares, step.key, Q, step.beta, step.weights);
        std::fill_n(reads, R * Q, T(0));
        rows.for_each([&] {
            if constexpr (std::is_same_v<S, T>) rows.look(new_memory);
            else step.write(); // before it was rounded
            rows.add_sums(R, step.weights, reads);
        });
        update_usage(s, step.weights, step.write_weights, usage);
        step.give_vectors(reads, a.reads);
        step.give_weights(step.weights, a.new_read_weights);
        take_rows(usage, static_cast<S *>(a.new_usage) + b * N, 1, N, P);
    }
}

template <typename S> struct StepBackwardOnRows : StepOnRows<S, LruaStepBackwardArgs> {
    using Step = StepOnRows<S, LruaStepBackwardArgs>;
    using T = Arith<S>;
    using Step::a, Step::b, Step::s, Step::N, Step::P, Step::W, Step::R, Step::Q, Step::base, Step::plan, Step::rows;
    using Step::key, Step::add, Step::gate, Step::beta, Step::previous, Step::write_weights, Step::weights;
    T *dreads = key + R * Q, *dkey = base + plan.dkey, *dadd = a.add ? base + plan.dadd : dkey;
    T *dgate = base + plan.dgate, *dbeta = base + plan.dbeta, *dots = base + plan.dots;
    T *dweights = base + plan.dweights, *dwrite_weights = base + plan.dwrite_weights;
    T *dprevious = base + plan.dprevious, *row_factor = base + plan.row_factor;
    T *dkey_factor = base + plan.dkey_factor;
    RowBlock<T> drows{base + plan.dblock, N, P, W, Q};

    using Step::Step;

    // Through the read and the softmax: dweights become those of the dot products.
    void before_rows() {
        this->take_vectors(a.dreads, dreads);
        interpolate(s, previous, gate, a.least_used + b * R, write_weights);
        rows.for_each([&] {
            this->write();
            rows.dot(2 * R, key, dots); // and dreads, dweights
            rows.square(this->row_squares);
        });
        address(s, dots, this->row_squares, key, Q, beta, weights);
        const S *given = static_cast<const S *>(a.dnew_read_weights) + b * R * N;
        for (int64_t h = 0; a.dnew_read_weights && h < R; ++h)
            for (int64_t n = 0; n < N; ++n) dweights[h * P + n] += to_arith(given[h * N + n]);
        address_backward(s, weights, dots, this->row_squares, key, Q, beta, dweights, row_factor, dkey_factor, dbeta);
    }
    void through_rows() {
        const S *given = static_cast<const S *>(a.dnew_memory);
        S *dmemory = static_cast<S *>(a.dmemory) + b * N * W;
        std::fill_n(dkey, R * Q, T(0));
        std::fill_n(dadd, R * Q, T(0));
        rows.for_each([&] {
            this->write();
            drows.n0 = rows.n0;
            drows.place(dmemory);
            const T *from = given ? drows.erased(given + b * N * W, nullptr, 0) : nullptr;
            drows.outer(2 * R, dweights, key, from, row_factor, rows.data); // and weights, dreads
            rows.add_sums(R, dweights, dkey);
            drows.dot(R, add, dwrite_weights);
            drows.add_sums(R, write_weights, dadd);
            drows.erase(a.least_used + b * R, s.erased());
            drows.give(dmemory);
        });
    }
    void run() {
        before_rows();
        through_rows();
        for (int64_t h = 0; h < R; ++h)
            for (int64_t q = 0; q < Q; ++q) dkey[h * Q + q] -= dkey_factor[h] * key[h * Q + q];
        interpolate_backward(s, dwrite_weights, previous, gate, a.least_used + b * R, dprevious, dgate);
        this->give_weights(dprevious, a.dread_weights);
        this->give_vectors(dkey, a.dkey);
        if (a.add) this->give_vectors(dadd, a.dadd);
        convert(dgate, static_cast<S *>(a.dgate) + b * R, R);
        if (beta) convert(dbeta, static_cast<S *>(a.dbeta) + b * R, R);
    }
};

template <typename S>
void lrua_step_backward(const LruaStepBackwardArgs &a, int64_t begin, int64_t end, void *scratch) {
    for (int64_t b = begin; b < end; ++b) StepBackwardOnRows<S>(a, b, scratch).run();
}

} // namespace MANN_ISA
} // namespace mann

MANN_KERNEL(lrua_step, LruaStepArgs)
MANN_KERNEL(lrua_step_backward, LruaStepBackwardArgs)

#if defined(MANN_ENTRY)
#include "entry.h"

namespace mann {

static StepOptions step_options(const Tensor &read_weights, const Tensor &key, bool shared, bool erase_all,
                                double decay, double eps) {
    STD_TORCH_CHECK(read_weights.dim() == 3 && key.dim() == 3, "lrua_step: wrong number of dimensions");
    const int64_t N = read_weights.size(2), R = read_weights.size(1);
    STD_TORCH_CHECK(R <= N, "lrua_step: more heads than slots");
    return {N, key.size(2), R, shared, erase_all, decay, eps};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_step_cpu(Tensor memory, Tensor usage, Tensor read_weights, Tensor key, Tensor gate, std::optional<Tensor> beta,
              std::optional<Tensor> add, bool shared, bool erase_all, double decay, double eps) {
    Call call(memory);
    const StepOptions o = step_options(read_weights, key, shared, erase_all, decay, eps);
    const int64_t B = read_weights.size(0), N = o.N, W = o.W, R = o.R;
    Tensor reads = call.empty({B, R, W}), memory1 = call.empty({B, N, W}), usage1 = call.empty({B, N});
    Tensor read_weights1 = call.empty({B, R, N}), least_used = call.empty({B, R}, ScalarType::Int);
    LruaStepArgs args{};
    args.options = o;
    args.memory = call.in(memory, "memory", {B, N, W});
    args.usage = call.in(usage, "usage", {B, N});
    args.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    args.key = call.in(key, "key", {B, R, W});
    args.gate = call.in(gate, "gate", {B, R});
    args.beta = call.in(beta, "beta", {B, R});
    args.add = call.in(add, "add", {B, R, W});
    args.reads = out(reads), args.new_memory = out(memory1), args.new_usage = out(usage1);
    args.new_read_weights = out(read_weights1), args.least_used = static_cast<int32_t *>(out(least_used));
    call.run(lrua_step_pick(), &args, B, baseline::LruaStepPlan(o).size, double(B) * N * W * (3 * R + 3));
    return {reads, memory1, usage1, read_weights1, least_used};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
lrua_step_backward_cpu(Tensor dreads, std::optional<Tensor> dmemory1, std::optional<Tensor> dread_weights1,
                       Tensor memory, Tensor read_weights, Tensor key, Tensor gate, std::optional<Tensor> beta,
                       std::optional<Tensor> add, Tensor least_used, bool shared, bool erase_all, double eps) {
    Call call(memory);
    const StepOptions o = step_options(read_weights, key, shared, erase_all, 0, eps);
    const int64_t B = read_weights.size(0), N = o.N, W = o.W, R = o.R;
    Tensor dmemory = call.empty({B, N, W}), dread_weights = call.empty({B, R, N}), dkey = call.empty({B, R, W});
    Tensor dgate = call.empty({B, R}), dbeta = beta ? call.empty({B, R}) : call.empty({0});
    Tensor dadd = add ? call.empty({B, R, W}) : call.empty({0});
    LruaStepBackwardArgs args{};
    args.options = o;
    args.dreads = call.in(dreads, "dreads", {B, R, W});
    args.dnew_memory = call.in(dmemory1, "dmemory1", {B, N, W});
    args.dnew_read_weights = call.in(dread_weights1, "dread_weights1", {B, R, N});
    args.memory = call.in(memory, "memory", {B, N, W});
    args.read_weights = call.in(read_weights, "read_weights", {B, R, N});
    args.key = call.in(key, "key", {B, R, W});
    args.gate = call.in(gate, "gate", {B, R});
    args.beta = call.in(beta, "beta", {B, R});
    args.add = call.in(add, "add", {B, R, W});
    args.least_used = call.slots(least_used, "least_used", {B, R}, N);
    args.dmemory = out(dmemory), args.dread_weights = out(dread_weights), args.dkey = out(dkey),
    args.dgate = out(dgate);
    args.dbeta = out(dbeta), args.dadd = out(dadd);
    call.run(lrua_step_backward_pick(), &args, B, baseline::LruaStepPlan(o).size, double(B) * N * W * (9 * R + 4));
    return {dmemory, dread_weights, dkey, dgate, dbeta, dadd};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("lrua_step", TORCH_BOX(&mann::lrua_step_cpu));
    m.impl("lrua_step_backward", TORCH_BOX(&mann::lrua_step_backward_cpu));
}
#endif
