// The arguments of the kernels of generate_fast_weights, for `count` coordinates.
#pragma once

#if !defined(MANN_CONSTEXPR)
#define MANN_CONSTEXPR constexpr // of the host
#endif

namespace mann::cuda {

template <typename S> struct GenerateWeights {
    const S *weight1, *bias1; // [D, 2], [D]
    const S *weight2, *bias2; // [D, D], [D]
    const S *weight3, *bias3; // [1, D], [1]
};

template <typename S> struct GenerateForward {
    int count;
    double p, scale; // scale: e^p
    const S *grads;  // [count]
    GenerateWeights<S> weights;
    S *fast; // [count] out
};

// Where backward lets a gradient through, 1 or 0: at the two features, the first hidden layer and the second.
template <typename S> struct GenerateSides {
    int count, hidden; // hidden: D, or 0 for the features alone
    double p, scale;
    const S *grads;             // [count]
    GenerateWeights<S> weights; // but for the last two, which are null
    uint8_t *sides;             // [2 + 2 hidden, count] out
};

template <typename S> struct GenerateBackward {
    int count;
    double p, scale;
    const S *dfast, *grads; // [count]
    GenerateWeights<S> weights;
    S *dgrads;      // [count] out
    Arith<S> *sums; // [parts, sums] out: a part for each block, or for each warp where `sums_of_warps`
};

template <typename S> struct GenerateTotal {
    int64_t parts;
    const Arith<S> *sums;                                         // [parts, sums]
    S *dweight1, *dbias1, *dweight2, *dbias2, *dweight3, *dbias3; // as the weights, out
};

// What the host must know of the kernels' shared memory and sums, in numbers.
struct GenerateSizes {
    int units, pairs;                      // see coordinates.h
    int fragments, first;                  // the weights of the second layer, once; of the others
    int stage;                             // of a warp
    int groups;                            // of 16 units of the second layer
    bool sums_of_warps;                    // they are too many for registers
    int sums;                              // of a part
    int forward_threads, backward_threads; // of a block, at most
    MANN_CONSTEXPR explicit GenerateSizes(int D)
        : units((D + 3) / 4), pairs((units + 2) / 2), fragments(pairs * pairs * 32 * (D <= 32 ? 4 : 2)),
          first(16 * units), stage(128 * pairs + (pairs + 1) / 2 * 256), groups((pairs + 1) / 2),
          sums_of_warps(groups * pairs > 16), sums(32 * (groups * pairs * 4 + 4 * units + 1)), forward_threads(512),
          backward_threads(384) {}
};

} // namespace mann::cuda
