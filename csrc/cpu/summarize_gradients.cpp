// MetaNet's d: gradient preprocessing and an LSTM over the support gradients at every coordinate.
#include "coordinates.h"

namespace mann {

struct SummarizeArgs {
    int64_t T, P, D;
    double p;
    const void *grads;                        // [T, P]
    const void *weight_ih, *weight_hh, *bias; // [4D, 2], [4D, D], [4D]
    const void *weight_out, *bias_out;        // [1, D], [1]
    void *fast;                               // [P] out, forward only
    const void *dfast;                        // [P], of the fast weights; backward only, as is all that follows
    void *dgrads;                             // [T, P] out
    void *sums; // [chunks, packed()] of arithmetic type, the weight gradients of each chunk, out
    void *dweight_ih, *dweight_hh, *dbias, *dweight_out, *dbias_out; // as the weights, out

    // A step's input is (h, 1, magnitude, sign): the gates' weights are [4D, D + 3], those of the result [1, D + 1].
    int64_t inputs() const { return D + 3; }
    int64_t recurrent() const { return 4 * D * inputs(); }
    int64_t packed() const { return recurrent() + D + 1; }
};

// Scratch: weights; for a block of C coordinates the inputs [D + 3, C], gates [4D, C] and c [D, C], forward of one
// step, backward of all and the squashed c too; grads [C]. Backward also dh and dc [D, C], dfast [C], dfeatures [2, C],
// and a vector for each weight. Blocks C and vectors of any instruction set.
inline int64_t summarize_scratch(const SummarizeArgs &a) {
    return a.packed() + kMostLanes + (a.inputs() + 5 * a.D + 1) * kMostBlock;
}
inline int64_t summarize_backward_scratch(const SummarizeArgs &a) {
    return a.packed() + kMostLanes + ((a.T + 1) * (a.inputs() + a.D) + 5 * a.T * a.D + 2 * a.D + 4) * kMostBlock +
           2 * a.packed() * kMostLanes;
}

namespace MANN_ISA {

// The weights, side by side; they end on a cache line, where the blocks begin.
template <typename T> struct Lstm {
    int64_t D, inputs;
    const T *gates, *result; // [4D, D + 3], [1, D + 1]
    T *blocks;

    template <typename S> static Lstm take(const SummarizeArgs &a, std::type_identity<S>, void *scratch) {
        const int64_t D = a.D, inputs = a.inputs();
        T *gates = static_cast<T *>(scratch), *result = gates + a.recurrent();
        put_columns<S>(a.weight_hh, 4 * D, D, 0, inputs, gates), put_columns<S>(a.bias, 4 * D, 1, D, inputs, gates);
        put_columns<S>(a.weight_ih, 4 * D, 2, D + 1, inputs, gates);
        put_columns<S>(a.weight_out, 1, D, 0, D + 1, result), put_columns<S>(a.bias_out, 1, 1, D, D + 1, result);
        return {D, inputs, gates, result, gates + (a.packed() + kMostLanes - 1) / kMostLanes * kMostLanes};
    }

    // One step of a block: from the inputs [D + 3, C] and the previous c [D, C], of which the first step has no h and
    // no c, to the gates after their activations [4D, C], c, tanh c (null: not kept) and h, all [D, C].
    void step(bool first, const T *input, const T *c, T *gate, T *new_c, T *squashed, T *h) const {
        constexpr int64_t C = kBlock<T>;
        const int64_t skip = first ? D : 0;
        multiply(4 * D, inputs - skip, gates + skip, inputs, 1, input + skip * C,
                 [=](int64_t j, int v, Vec<T> sum) { store(gate + j * C + v * kLanes<T>, sum); });
        // In two loops: the next squashed c does not wait for this one.
        for (int64_t at = 0; at < D * C; at += kLanes<T>) {
            Vec<T> of[4];
            for (int i = 0; i < 4; ++i) of[i] = load(gate + i * D * C + at);
            store(new_c + at, lstm_cell_state(of[0], of[1], of[2], of[3], first ? Vec<T>{} : load(c + at)));
            for (int i = 0; i < 4; ++i) store(gate + i * D * C + at, of[i]);
        }
        for (int64_t at = 0; at < D * C; at += kLanes<T>) {
            const Vec<T> bounded = hyperbolic_tangent(load(new_c + at));
            if (squashed) store(squashed + at, bounded);
            store(h + at, load(gate + 3 * D * C + at) * bounded);
        }
    }

    // Turns the gates of a step into the gradients before their activations, and dc of after the step into that of
    // before.
    void step_backward(bool first, T *gate, const T *c, const T *squashed, const T *dh, T *dc) const {
        for (int64_t at = 0; at < D * kBlock<T>; at += kLanes<T>) {
            Vec<T> of[4];
            for (int i = 0; i < 4; ++i) of[i] = load(gate + i * D * kBlock<T> + at);
            const auto grad = lstm_cell_backward(of[0], of[1], of[2], of[3], first ? Vec<T>{} : load(c + at),
                                                 load(squashed + at), load(dh + at), load(dc + at));
            store(gate + at, grad.gate_in);
            store(gate + D * kBlock<T> + at, grad.gate_forget);
            store(gate + 2 * D * kBlock<T> + at, grad.cell);
            store(gate + 3 * D * kBlock<T> + at, grad.gate_out);
            store(dc + at, grad.c);
        }
    }
};

template <typename S> void summarize_gradients(const SummarizeArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    constexpr int64_t C = kBlock<T>;
    const auto lstm = Lstm<T>::take(a, std::type_identity<S>{}, scratch);
    const Preprocessing<T> preprocessing(a.p);
    T *input = lstm.blocks, *gates = input + a.inputs() * C, *c = gates + 4 * a.D * C, *grads = c + a.D * C;
    T *features = input + (a.D + 1) * C;
    fill_row(input + a.D * C, T(1));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        in_blocks<T>(a.P, chunk, [&](int64_t first, int64_t count) {
            for (int64_t t = 0; t < a.T; ++t) {
                load_row(static_cast<const S *>(a.grads) + t * a.P + first, count, grads);
                preprocessing.features(grads, features, features + C);
                lstm.step(t == 0, input, c, gates, c, nullptr, input);
            }
            multiply(1, a.D + 1, lstm.result, 0, 1, input,
                     [&](int64_t, int v, Vec<T> sum) { store(grads + v * kLanes<T>, sum); });
            convert(grads, static_cast<S *>(a.fast) + first, count);
        });
    }
}

template <typename S>
void summarize_gradients_backward(const SummarizeArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    constexpr int64_t C = kBlock<T>, lanes = kLanes<T>;
    const int64_t D = a.D, inputs = a.inputs();
    const auto lstm = Lstm<T>::take(a, std::type_identity<S>{}, scratch);
    const Preprocessing<T> preprocessing(a.p);
    // Of step t: its input, with h of the step before, and its c, with c of the step before in front.
    T *input = lstm.blocks, *gates = input + (a.T + 1) * inputs * C, *c = gates + a.T * 4 * D * C;
    T *squashed = c + (a.T + 1) * D * C, *dh = squashed + a.T * D * C, *dc = dh + D * C, *grads = dc + D * C;
    T *dfast = grads + C, *dfeatures = dfast + C, *sums = dfeatures + 2 * C,
      *result_sums = sums + a.recurrent() * lanes, *total = sums + a.packed() * lanes;
    for (int64_t t = 0; t <= a.T; ++t) fill_row(input + (t * inputs + D) * C, T(1));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        std::memset(sums, 0, 2 * a.packed() * lanes * sizeof(T));
        in_blocks<T>(a.P, chunk, [&](int64_t first, int64_t count) {
            const auto grads_of = [&](int64_t t) {
                load_row(static_cast<const S *>(a.grads) + t * a.P + first, count, grads);
            };
            for (int64_t t = 0; t < a.T; ++t) {
                T *features = input + (t * inputs + D + 1) * C;
                grads_of(t);
                preprocessing.features(grads, features, features + C);
                lstm.step(t == 0, input + t * inputs * C, c + t * D * C, gates + t * 4 * D * C, c + (t + 1) * D * C,
                          squashed + t * D * C, input + (t + 1) * inputs * C);
            }
            load_row(static_cast<const S *>(a.dfast) + first, count, dfast);
            multiply(D, 1, lstm.result, 1, 0, dfast,
                     [=](int64_t j, int v, Vec<T> sum) { store(dh + j * C + v * lanes, sum); });
            std::memset(dc, 0, D * C * sizeof(T));
            for (int64_t t = a.T - 1; t >= 0; --t) {
                T *dgates = gates + t * 4 * D * C;
                lstm.step_backward(t == 0, dgates, c + t * D * C, squashed + t * D * C, dh, dc);
                if (t > 0)
                    multiply(D, 4 * D, lstm.gates, 1, inputs, dgates,
                             [=](int64_t j, int v, Vec<T> sum) { store(dh + j * C + v * lanes, sum); });
                multiply(2, 4 * D, lstm.gates + D + 1, 1, inputs, dgates,
                         [=](int64_t j, int v, Vec<T> sum) { store(dfeatures + j * C + v * lanes, sum); });
                grads_of(t);
                preprocessing.backward(grads, dfeatures, dfeatures + C, grads);
                convert(grads, static_cast<S *>(a.dgrads) + t * a.P + first, count);
            }
            add_products(4 * D, D, a.T - 1, gates + 4 * D * C, 4 * D * C, input + inputs * C, inputs * C, sums, inputs);
            add_products(4 * D, 3, a.T, gates, 4 * D * C, input + D * C, inputs * C, sums + D * lanes, inputs);
            add_products(1, D + 1, 1, dfast, 0, input + a.T * inputs * C, 0, result_sums, D + 1);
            end_run(first, a.packed(), sums, total);
        });
        end_run(kRun - C, a.packed(), sums, total); // the last one, which may be shorter
        sum_lanes_of(total, a.packed(), static_cast<T *>(a.sums) + chunk * a.packed());
    }
}

// The chunks' weight gradients, added up; its range is [0, 1).
template <typename S> void summarize_gradients_total(const SummarizeArgs &a, int64_t, int64_t, void *) {
    const int64_t D = a.D, chunks = chunks_of(a.P), inputs = a.inputs();
    const Arith<S> *gates = static_cast<const Arith<S> *>(a.sums), *result = gates + a.recurrent();
    const auto take = [&](const Arith<S> *sums, int64_t J, int64_t K, int64_t at, int64_t stride, void *target) {
        take_columns<S>(sums, chunks, a.packed(), J, K, at, stride, target);
    };
    take(gates, 4 * D, D, 0, inputs, a.dweight_hh), take(gates, 4 * D, 1, D, inputs, a.dbias);
    take(gates, 4 * D, 2, D + 1, inputs, a.dweight_ih);
    take(result, 1, D, 0, D + 1, a.dweight_out), take(result, 1, 1, D, D + 1, a.dbias_out);
}

} // namespace MANN_ISA
} // namespace mann

MANN_KERNEL(summarize_gradients, SummarizeArgs)
MANN_KERNEL(summarize_gradients_backward, SummarizeArgs)
MANN_KERNEL(summarize_gradients_total, SummarizeArgs)

#if defined(MANN_ENTRY)
#include "entry.h"

namespace mann {

static SummarizeArgs summarize_args(Call &call, const Tensor &grads, const Tensor &weight_ih, const Tensor &weight_hh,
                                    const Tensor &bias, const Tensor &weight_out, const Tensor &bias_out, double p) {
    STD_TORCH_CHECK(grads.dim() > 0 && weight_hh.dim() == 2, "summarize_gradients: wrong number of dimensions");
    SummarizeArgs args{};
    STD_TORCH_CHECK(grads.size(0) > 0, "summarize_gradients: no gradients");
    args.T = grads.size(0), args.P = grads.numel() / args.T;
    const int64_t D = args.D = weight_hh.size(1);
    args.p = p;
    args.grads = call.in(grads, "grads", grads.sizes());
    args.weight_ih = call.in(weight_ih, "weight_ih", {4 * D, 2});
    args.weight_hh = call.in(weight_hh, "weight_hh", {4 * D, D});
    args.bias = call.in(bias, "bias", {4 * D});
    args.weight_out = call.in(weight_out, "weight_out", {1, D});
    args.bias_out = call.in(bias_out, "bias_out", {1});
    return args;
}

static Tensor summarize_gradients_cpu(Tensor grads, Tensor weight_ih, Tensor weight_hh, Tensor bias, Tensor weight_out,
                                      Tensor bias_out, double p) {
    Call call(grads);
    SummarizeArgs args = summarize_args(call, grads, weight_ih, weight_hh, bias, weight_out, bias_out, p);
    Tensor fast = call.empty(rest(grads.sizes()));
    args.fast = out(fast);
    call.run(summarize_gradients_pick(), &args, chunks_of(args.P), summarize_scratch(args),
             double(args.T) * args.P * args.packed());
    return fast;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
summarize_gradients_backward_cpu(Tensor dfast, Tensor grads, Tensor weight_ih, Tensor weight_hh, Tensor bias,
                                 Tensor weight_out, Tensor bias_out, double p) {
    Call call(grads);
    SummarizeArgs args = summarize_args(call, grads, weight_ih, weight_hh, bias, weight_out, bias_out, p);
    const int64_t T = args.T, P = args.P, D = args.D, chunks = chunks_of(P);
    Tensor dgrads = call.empty(grads.sizes()), dweight_ih = call.empty({4 * D, 2}), dweight_hh = call.empty({4 * D, D});
    Tensor dbias = call.empty({4 * D}), dweight_out = call.empty({1, D}), dbias_out = call.empty({1});
    args.dfast = call.in(dfast, "dfast", rest(grads.sizes()));
    args.dgrads = out(dgrads), args.dweight_ih = out(dweight_ih), args.dweight_hh = out(dweight_hh);
    args.dbias = out(dbias), args.dweight_out = out(dweight_out), args.dbias_out = out(dbias_out);
    args.sums = call.scratch(chunks * args.packed());
    call.run(summarize_gradients_backward_pick(), &args, chunks, summarize_backward_scratch(args),
             4.0 * T * P * args.packed());
    call.run(summarize_gradients_total_pick(), &args, 1, 0, 0);
    return {dgrads, dweight_ih, dweight_hh, dbias, dweight_out, dbias_out};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("summarize_gradients", TORCH_BOX(&mann::summarize_gradients_cpu));
    m.impl("summarize_gradients_backward", TORCH_BOX(&mann::summarize_gradients_backward_cpu));
}
#endif
