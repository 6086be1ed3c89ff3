// The arguments of the kernels of summarize_gradients. `steps` support gradients of `count` coordinates.
#pragma once

#if !defined(MANN_CONSTEXPR)
#define MANN_CONSTEXPR constexpr // of the host
#endif

namespace mann::cuda {

template <typename S> struct SummarizeWeights {
    const S *weight_ih, *weight_hh, *bias; // [4D, 2], [4D, D], [4D]
    const S *weight_out, *bias_out;        // [1, D], [1]
};

template <typename S> struct SummarizeForward {
    int steps, count;
    double p, scale; // scale: e^p
    const S *grads;  // [steps, count]
    SummarizeWeights<S> weights;
    S *fast; // [count] out
};

template <typename S> struct SummarizeBackward {
    int steps, count;
    double p, scale;
    const S *dfast; // [count]
    const S *grads; // [steps, count]
    SummarizeWeights<S> weights;
    S *dgrads;        // [steps, count] out
    Arith<S> *states; // [warps of the grid, steps, state], for itself; null: in shared memory
    Arith<S> *sums;   // [parts, sums] out: a part for each block, or for each warp where `sums_of_warps`
};

template <typename S> struct SummarizeTotal {
    int64_t parts;
    const Arith<S> *sums;                                         // [parts, sums]
    S *dweight_ih, *dweight_hh, *dbias, *dweight_out, *dbias_out; // as the weights, out
};

// What the host must know of the kernels' shared memory and sums, in numbers.
struct SummarizeSizes {
    int units, inputs;                     // of a part, see coordinates.h
    int fragments;                         // the weights, once
    int both;                              // as the backward pass has them
    int state, stage;                      // of a warp: for each step, once
    int sums;                              // of a part
    bool sums_of_warps;                    // they are too many for registers
    int forward_threads, backward_threads; // of a block, at most
    MANN_CONSTEXPR explicit SummarizeSizes(int D)
        : units((D + 3) / 4), inputs((units + 2) / 2 * 2), fragments(units * inputs * 32 * (D <= 32 ? 4 : 2)),
          both(D <= 32 ? 2 * fragments : fragments), state(64 * (units + inputs)), stage(256 * units),
          sums(units * inputs * 64 + 32 * (units + 1)), sums_of_warps(units * inputs > 32), forward_threads(384),
          backward_threads(256) {}
};

} // namespace mann::cuda
