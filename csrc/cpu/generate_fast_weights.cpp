// MetaNet's m: gradient preprocessing and a network of two hidden layers at every coordinate.
#include "coordinates.h"

namespace mann {

struct FastWeightsArgs {
    int64_t P, D;
    double p;
    const void *grads;           // [P]
    const void *weight1, *bias1; // [D, 2], [D]
    const void *weight2, *bias2; // [D, D], [D]
    const void *weight3, *bias3; // [1, D], [1]; null for sides
    void *fast;                  // [P] out, forward only
    uint8_t *sides;              // [2 + 2D, P] out, of sides only
    const void *dfast;           // [P], of the fast weights; backward only, as is all that follows
    void *dgrads;                // [P] out
    void *sums;                  // [chunks, packed()] of arithmetic type, the weight gradients of each chunk, out
    void *dweight1, *dbias1, *dweight2, *dbias2, *dweight3, *dbias3; // as the weights, out

    // The three layers behind each other, with their biases: [D, 3], [D, D + 1], [1, D + 1].
    int64_t first() const { return 3 * D; }
    int64_t second() const { return D * (D + 1); }
    int64_t packed() const { return first() + second() + D + 1; }
};

// Scratch: weights; features [3, C], hidden1 and hidden2 [D + 1, C], grads [C]; backward also dhidden2 and dhidden1
// [D, C], dfast, dfeatures [2, C], and a vector for each weight. Blocks C and vectors of any instruction set.
inline int64_t fast_weights_scratch(const FastWeightsArgs &a) {
    return a.packed() + kMostLanes + (2 * a.D + 6) * kMostBlock;
}
inline int64_t fast_weights_backward_scratch(const FastWeightsArgs &a) {
    return fast_weights_scratch(a) + (2 * a.D + 3) * kMostBlock + 2 * a.packed() * kMostLanes;
}

namespace MANN_ISA {

template <typename T> struct Layers {
    int64_t D;
    T *one, *two, *three; // [D, 3], [D, D + 1], [1, D + 1]
    T *features;          // magnitude, sign, ones [C]
    T *hidden1, *hidden2; // [D, C] and ones [C]
    T *grads;             // [C]
    T *rest;              // what follows in scratch

    template <typename S> static Layers take(const FastWeightsArgs &a, std::type_identity<S>, void *scratch) {
        const int64_t D = a.D;
        // The weights first: they leave what follows on a cache line.
        T *one = static_cast<T *>(scratch), *two = one + a.first(), *three = two + a.second();
        T *blocks = one + (a.packed() + kMostLanes - 1) / kMostLanes * kMostLanes;
        put_columns<S>(a.weight1, D, 2, 0, 3, one), put_columns<S>(a.bias1, D, 1, 2, 3, one);
        put_columns<S>(a.weight2, D, D, 0, D + 1, two), put_columns<S>(a.bias2, D, 1, D, D + 1, two);
        if (a.weight3) put_columns<S>(a.weight3, 1, D, 0, D + 1, three), put_columns<S>(a.bias3, 1, 1, D, D + 1, three);
        constexpr int64_t C = kBlock<T>;
        T *hidden1 = blocks + 3 * C, *hidden2 = hidden1 + (D + 1) * C, *grads = hidden2 + (D + 1) * C;
        fill_row(blocks + 2 * C, T(1)), fill_row(hidden1 + D * C, T(1)), fill_row(hidden2 + D * C, T(1));
        return {D, one, two, three, blocks, hidden1, hidden2, grads, grads + C};
    }

    // relu(weight in + bias), to the rows of `out`.
    void layer(const T *weight, int64_t inner, const T *in, T *out) const {
        multiply(D, inner + 1, weight, inner + 1, 1, in, [=](int64_t j, int v, Vec<T> sum) {
            store(out + j * kBlock<T> + v * kLanes<T>, maximum(Vec<T>{}, sum)); // NaN passes
        });
    }
    void hidden(const Preprocessing<T> &preprocessing) const {
        preprocessing.features(grads, features, features + kBlock<T>);
        layer(one, 2, features, hidden1);
        layer(two, D, hidden1, hidden2);
    }
};

template <typename S> void generate_fast_weights(const FastWeightsArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const auto layers = Layers<T>::take(a, std::type_identity<S>{}, scratch);
    const Preprocessing<T> preprocessing(a.p);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        in_blocks<T>(a.P, chunk, [&](int64_t first, int64_t count) {
            load_row(static_cast<const S *>(a.grads) + first, count, layers.grads);
            layers.hidden(preprocessing);
            multiply(1, a.D + 1, layers.three, 0, 1, layers.hidden2,
                     [&](int64_t, int v, Vec<T> sum) { store(layers.grads + v * kLanes<T>, sum); });
            convert(layers.grads, static_cast<S *>(a.fast) + first, count);
        });
    }
}

// Where backward lets a gradient through: at the two features, the first hidden layer and the second; 1 or 0.
template <typename S>
void generate_fast_weights_sides(const FastWeightsArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    const auto layers = Layers<T>::take(a, std::type_identity<S>{}, scratch);
    const Preprocessing<T> preprocessing(a.p);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        in_blocks<T>(a.P, chunk, [&](int64_t first, int64_t count) {
            const auto put = [&](const T *rows, int64_t number, int64_t row) {
                for (int64_t j = 0; j < number; ++j)
                    for (int64_t i = 0; i < count; ++i)
                        a.sides[(row + j) * a.P + first + i] = !(rows[j * kBlock<T> + i] <= 0); // NaN passes
            };
            load_row(static_cast<const S *>(a.grads) + first, count, layers.grads);
            layers.hidden(preprocessing);
            put(layers.hidden1, a.D, 2), put(layers.hidden2, a.D, 2 + a.D);
            preprocessing.sides(layers.grads, layers.features, layers.features + kBlock<T>);
            put(layers.features, 2, 0);
        });
    }
}

// Keeps what comes back to a row of hidden units where their ReLU let something through.
template <typename T> inline auto behind_relu(const T *hidden, T *dhidden) {
    return [=](int64_t j, int v, Vec<T> sum) {
        const int64_t at = j * kBlock<T> + v * kLanes<T>;
        store(dhidden + at, load(hidden + at) <= 0 ? Vec<T>{} : sum);
    };
}

template <typename S>
void generate_fast_weights_backward(const FastWeightsArgs &a, int64_t begin, int64_t end, void *scratch) {
    using T = Arith<S>;
    constexpr int64_t C = kBlock<T>, lanes = kLanes<T>;
    const int64_t D = a.D;
    const auto layers = Layers<T>::take(a, std::type_identity<S>{}, scratch);
    const Preprocessing<T> preprocessing(a.p);
    T *dhidden1 = layers.rest, *dhidden2 = dhidden1 + D * C, *dfast = dhidden2 + D * C, *dfeatures = dfast + C;
    T *sums = dfeatures + 2 * C, *total = sums + a.packed() * lanes;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        std::memset(sums, 0, 2 * a.packed() * lanes * sizeof(T));
        in_blocks<T>(a.P, chunk, [&](int64_t first, int64_t count) {
            load_row(static_cast<const S *>(a.grads) + first, count, layers.grads);
            load_row(static_cast<const S *>(a.dfast) + first, count, dfast);
            layers.hidden(preprocessing);
            multiply(D, 1, layers.three, 1, 0, dfast, behind_relu(layers.hidden2, dhidden2));
            multiply(D, D, layers.two, 1, D + 1, dhidden2, behind_relu(layers.hidden1, dhidden1));
            multiply(2, D, layers.one, 1, 3, dhidden1,
                     [=](int64_t j, int v, Vec<T> sum) { store(dfeatures + j * C + v * lanes, sum); });
            add_products(D, 3, 1, dhidden1, 0, layers.features, 0, sums, 3);
            add_products(D, D + 1, 1, dhidden2, 0, layers.hidden1, 0, sums + a.first() * lanes, D + 1);
            add_products(1, D + 1, 1, dfast, 0, layers.hidden2, 0, sums + (a.first() + a.second()) * lanes, D + 1);
            end_run(first, a.packed(), sums, total);
            preprocessing.backward(layers.grads, dfeatures, dfeatures + C, layers.grads);
            convert(layers.grads, static_cast<S *>(a.dgrads) + first, count);
        });
        end_run(kRun - C, a.packed(), sums, total); // the last one, which may be shorter
        sum_lanes_of(total, a.packed(), static_cast<T *>(a.sums) + chunk * a.packed());
    }
}

// The chunks' weight gradients, added up; its range is [0, 1).
template <typename S> void generate_fast_weights_total(const FastWeightsArgs &a, int64_t, int64_t, void *) {
    using T = Arith<S>;
    const int64_t D = a.D, chunks = chunks_of(a.P);
    const T *one = static_cast<const T *>(a.sums), *two = one + a.first(), *three = two + a.second();
    const auto take = [&](const T *sums, int64_t J, int64_t K, int64_t at, int64_t stride, void *target) {
        take_columns<S>(sums, chunks, a.packed(), J, K, at, stride, target);
    };
    take(one, D, 2, 0, 3, a.dweight1), take(one, D, 1, 2, 3, a.dbias1);
    take(two, D, D, 0, D + 1, a.dweight2), take(two, D, 1, D, D + 1, a.dbias2);
    take(three, 1, D, 0, D + 1, a.dweight3), take(three, 1, 1, D, D + 1, a.dbias3);
}

} // namespace MANN_ISA
} // namespace mann

MANN_KERNEL(generate_fast_weights, FastWeightsArgs)
MANN_KERNEL(generate_fast_weights_sides, FastWeightsArgs)
MANN_KERNEL(generate_fast_weights_backward, FastWeightsArgs)
MANN_KERNEL(generate_fast_weights_total, FastWeightsArgs)

#if defined(MANN_ENTRY)
#include "entry.h"

namespace mann {

static FastWeightsArgs hidden_layers_args(Call &call, const Tensor &grads, const Tensor &weight1, const Tensor &bias1,
                                          const Tensor &weight2, const Tensor &bias2, double p) {
    STD_TORCH_CHECK(bias1.dim() == 1, "generate_fast_weights: wrong number of dimensions");
    FastWeightsArgs args{};
    args.P = grads.numel();
    const int64_t D = args.D = bias1.size(0);
    args.p = p;
    args.grads = call.in(grads, "grads", grads.sizes());
    args.weight1 = call.in(weight1, "weight1", {D, 2}), args.bias1 = call.in(bias1, "bias1", {D});
    args.weight2 = call.in(weight2, "weight2", {D, D}), args.bias2 = call.in(bias2, "bias2", {D});
    return args;
}

static FastWeightsArgs fast_weights_args(Call &call, const Tensor &grads, const Tensor &weight1, const Tensor &bias1,
                                         const Tensor &weight2, const Tensor &bias2, const Tensor &weight3,
                                         const Tensor &bias3, double p) {
    FastWeightsArgs args = hidden_layers_args(call, grads, weight1, bias1, weight2, bias2, p);
    args.weight3 = call.in(weight3, "weight3", {1, args.D}), args.bias3 = call.in(bias3, "bias3", {1});
    return args;
}

static Tensor generate_fast_weights_sides_cpu(Tensor grads, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2,
                                              double p) {
    Call call(grads);
    FastWeightsArgs args = hidden_layers_args(call, grads, weight1, bias1, weight2, bias2, p);
    Tensor sides = call.empty({2 + 2 * args.D, args.P}, ScalarType::Byte);
    args.sides = static_cast<uint8_t *>(out(sides));
    call.run(generate_fast_weights_sides_pick(), &args, chunks_of(args.P), fast_weights_scratch(args),
             double(args.P) * args.packed());
    return sides;
}

static Tensor generate_fast_weights_cpu(Tensor grads, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2,
                                        Tensor weight3, Tensor bias3, double p) {
    Call call(grads);
    FastWeightsArgs args = fast_weights_args(call, grads, weight1, bias1, weight2, bias2, weight3, bias3, p);
    Tensor fast = call.empty(grads.sizes());
    args.fast = out(fast);
    call.run(generate_fast_weights_pick(), &args, chunks_of(args.P), fast_weights_scratch(args),
             double(args.P) * args.packed());
    return fast;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
generate_fast_weights_backward_cpu(Tensor dfast, Tensor grads, Tensor weight1, Tensor bias1, Tensor weight2,
                                   Tensor bias2, Tensor weight3, Tensor bias3, double p) {
    Call call(grads);
    FastWeightsArgs args = fast_weights_args(call, grads, weight1, bias1, weight2, bias2, weight3, bias3, p);
    const int64_t P = args.P, D = args.D, chunks = chunks_of(P);
    Tensor dgrads = call.empty(grads.sizes()), dweight1 = call.empty({D, 2}), dbias1 = call.empty({D});
    Tensor dweight2 = call.empty({D, D}), dbias2 = call.empty({D}), dweight3 = call.empty({1, D});
    Tensor dbias3 = call.empty({1});
    args.dfast = call.in(dfast, "dfast", grads.sizes());
    args.dgrads = out(dgrads), args.dweight1 = out(dweight1), args.dbias1 = out(dbias1);
    args.dweight2 = out(dweight2), args.dbias2 = out(dbias2), args.dweight3 = out(dweight3), args.dbias3 = out(dbias3);
    args.sums = call.scratch(chunks * args.packed());
    call.run(generate_fast_weights_backward_pick(), &args, chunks, fast_weights_backward_scratch(args),
             3.0 * P * args.packed());
    call.run(generate_fast_weights_total_pick(), &args, 1, 0, 0);
    return {dgrads, dweight1, dbias1, dweight2, dbias2, dweight3, dbias3};
}

} // namespace mann

STABLE_TORCH_LIBRARY_IMPL(mann, CPU, m) {
    m.impl("generate_fast_weights", TORCH_BOX(&mann::generate_fast_weights_cpu));
    m.impl("generate_fast_weights_sides", TORCH_BOX(&mann::generate_fast_weights_sides_cpu));
    m.impl("generate_fast_weights_backward", TORCH_BOX(&mann::generate_fast_weights_backward_cpu));
}
#endif
