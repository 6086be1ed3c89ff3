// The LSTM controller of mann_sequence step by step: see grid_controller.h. Products are sums over the lanes of a warp,
// in one order.
#include "device.h"

#include "grid_controller.h"

namespace mann::cuda {

using S = MANN_STORAGE;
using T = Arith<S>;

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kHidden = MANN_H, kWidth = MANN_W, kHeads = MANN_R, kWords = kHeads * kWidth;
constexpr bool kBeta = MANN_BETA, kAdd = MANN_ADD, kSquash = MANN_SQUASH;
constexpr int kRecurrent = kHidden + kWords, kHead = kWords + kHeads * (1 + kBeta) + kWords * kAdd;

MANN_INLINE int warp_of_block() { return int(threadIdx.x) / 32; }
MANN_INLINE int lane_of_warp() { return int(threadIdx.x) % 32; }
MANN_INLINE T sum_over_warp(T x) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) x += __shfl_xor_sync(kWholeWarp, x, d);
    return x;
}
MANN_INLINE int length_of(const ControllerSizes &s, int64_t b) {
    return s.lengths ? int(max(min(s.lengths[b], int64_t(s.T)), int64_t(0))) : s.T;
}
MANN_INLINE int64_t row_of(const ControllerSizes &s, int64_t b) { return s.step * s.B + b; }

// Weights that a thread multiplies: at(0), at(1), ... of them, kChunk at once; the first before the launch that this
// one follows has ended, for nobody writes to them.
constexpr int kChunk = 12;
template <typename At, typename Use> MANN_INLINE void with_weights(int count, At &&at, Use &&use) {
    T weights[kChunk];
    const auto load = [&](int from) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) weights[i] = from + i < count ? T(to_arith(*at(from + i))) : T(0);
    };
    start_next();
    load(0);
    wait_for_previous();
    for (int from = 0; from < count;) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i)
            if (from + i < count) use(from + i, weights[i]);
        from += kChunk;
        if (from < count) load(from);
    }
}

using LstmStepArgs = LstmStep<S>;
MANN_KERNEL(lstm_step, kControllerThreads, LstmStepArgs) {
    MANN_SHARED(T, gates, kControllerWarps * kExamples);
    const LstmStep<S> &a = args;
    const ControllerSizes &s = a.sizes;
    const int unit = int(blockIdx.x) * kUnits + warp_of_block() / 4, gate = warp_of_block() % 4;
    const int64_t b0 = int64_t(blockIdx.y) * kExamples;
    const int count = int(min(s.B - b0, int64_t(kExamples)));
    T sum[kExamples] = {};
    const S *weights = a.weight_hh + int64_t(gate * kHidden + unit) * kRecurrent + lane_of_warp();
    const S *before = a.output + ((s.step - 1) * s.B + b0) * kRecurrent;
    const int mine_of_row = unit < kHidden ? (kRecurrent - lane_of_warp() + 31) / 32 : 0;
    with_weights(
        mine_of_row, [&](int i) { return weights + 32 * i; },
        [&](int i, T weight) {
            const int k = lane_of_warp() + 32 * i;
#pragma unroll
            for (int e = 0; e < kExamples; ++e) {
                if (e >= count) break;
                const S x = s.step > 0    ? before[e * kRecurrent + k]
                            : k < kHidden ? a.h[(b0 + e) * kHidden + k]
                                          : a.reads[(b0 + e) * kWords + k - kHidden];
                sum[e] += weight * to_arith(x);
            }
        });
#pragma unroll
    for (int e = 0; e < kExamples; ++e) {
        const T total = sum_over_warp(sum[e]);
        if (lane_of_warp() == 0) gates[warp_of_block() * kExamples + e] = total;
    }
    __syncthreads();
    const int e = int(threadIdx.x) / kUnits, of_block = int(threadIdx.x) % kUnits;
    const int mine = int(blockIdx.x) * kUnits + of_block;
    if (e >= count || mine >= kHidden) return;
    const int64_t b = b0 + e, row = row_of(s, b);
    if (s.step >= length_of(s, b)) {
        a.output[row * kRecurrent + mine] = to_storage<S>(T(0));
        return;
    }
    T made[4];
#pragma unroll
    for (int g = 0; g < 4; ++g)
        made[g] =
            gates[(of_block * 4 + g) * kExamples + e] + to_arith(a.gates_x[row * 4 * kHidden + g * kHidden + mine]);
    const int64_t at = b * kHidden + mine;
    const auto cell = lstm_cell(made[0], made[1], made[2], made[3], s.step == 0 ? T(to_arith(a.c0[at])) : a.c[at]);
    a.c[at] = cell.c;
    if (a.saved_c) a.saved_c[at] = cell.c;
    a.output[row * kRecurrent + mine] = to_storage<S>(cell.h);
#pragma unroll
    for (int g = 0; g < 4; ++g)
        if (a.saved_gates) a.saved_gates[row * 4 * kHidden + g * kHidden + mine] = made[g];
}

MANN_INLINE T activated(int p, T x) {
    if (p < kWords || p >= kWords + kHeads * (1 + kBeta)) return kSquash ? hyperbolic_tangent(x) : x;
    if (p < kWords + kHeads) return sigmoid(x);
    return x > 20 ? x : T(log1p(exponential(x))); // softplus
}
using HeadRowsArgs = HeadRows<S>;
MANN_KERNEL(head_rows, kControllerThreads, HeadRowsArgs) {
    const HeadRows<S> &a = args;
    const int p = int(blockIdx.y) * kControllerWarps + warp_of_block();
    const int64_t r0 = int64_t(blockIdx.x) * kExamples;
    const int count = int(min(a.count - r0, int64_t(kExamples)));
    if (p >= kHead) return;
    const S *weights = a.weight_head + int64_t(p) * kHidden + lane_of_warp();
    const S *h = a.output + (a.first + r0) * kRecurrent + lane_of_warp();
    T sum[kExamples] = {};
    with_weights((kHidden - lane_of_warp() + 31) / 32, [&](int i) { return weights + 32 * i; },
                 [&](int i, T weight) {
#pragma unroll
                     for (int e = 0; e < kExamples; ++e)
                         if (e < count) sum[e] += weight * to_arith(h[e * kRecurrent + 32 * i]);
                 });
    const T bias = to_arith(a.bias_head[p]);
#pragma unroll
    for (int e = 0; e < kExamples; ++e) {
        const T total = sum_over_warp(sum[e]);
        if (lane_of_warp() == 0 && e < count) a.row[(r0 + e) * kHead + p] = activated(p, total + bias);
    }
}

using RecomputeCellsArgs = CellsToRecompute<S>;
MANN_KERNEL(recompute_cells, kControllerThreads, RecomputeCellsArgs) {
    start_next();
    wait_for_previous();
    const CellsToRecompute<S> &a = args;
    const ControllerSizes &s = a.sizes;
    const int64_t at = int64_t(blockIdx.x) * kControllerThreads + threadIdx.x;
    if (at >= s.B * kHidden) return;
    const int64_t b = at / kHidden, unit = at % kHidden;
    const int stop = min(a.stop, length_of(s, b));
    T c = a.saved_c ? a.saved_c[at] : to_arith(a.c0[at]);
#pragma unroll 4
    for (int t = a.start; t < stop; ++t) {
        a.cells[(t - a.start) * s.B * kHidden + at] = c;
        const T *gates = a.saved_gates + (t * s.B + b) * 4 * kHidden + unit;
        c = gates[kHidden] * c + gates[0] * gates[2 * kHidden];
    }
}

using LstmBackwardArgs = LstmBackward<S>;
MANN_KERNEL(lstm_backward, kControllerThreads, LstmBackwardArgs) {
    MANN_SHARED(T, sums, kExamples * kControllerThreads);
    const LstmBackward<S> &a = args;
    const ControllerSizes &s = a.sizes;
    const int unit = int(blockIdx.x) * 32 + lane_of_warp();
    const int64_t b0 = int64_t(blockIdx.y) * kExamples;
    const int count = int(min(s.B - b0, int64_t(kExamples)));
    T sum[kExamples] = {};
    const S *weights = a.weight_head + int64_t(warp_of_block()) * kHidden + unit;
    with_weights(
        unit < kHidden ? (kHead - warp_of_block() + kControllerWarps - 1) / kControllerWarps : 0,
        [&](int i) { return weights + int64_t(i) * kControllerWarps * kHidden; },
        [&](int i, T weight) {
            const int p = warp_of_block() + i * kControllerWarps;
#pragma unroll
            for (int e = 0; e < kExamples; ++e)
                if (e < count) sum[e] += weight * to_arith(a.dhead[row_of(s, b0 + e) * kHead + p]);
        });
#pragma unroll
    for (int e = 0; e < kExamples; ++e) sums[e * kControllerThreads + threadIdx.x] = sum[e];
    __syncthreads();
    const int e = warp_of_block();
    if (e >= count || unit >= kHidden) return;
    const int64_t b = b0 + e, row = row_of(s, b), at = b * kHidden + unit;
    const int length = length_of(s, b);
    S *dgates = a.dgates + row * 4 * kHidden + unit;
    if (s.step >= length) {
#pragma unroll
        for (int g = 0; g < 4; ++g) dgates[g * kHidden] = to_storage<S>(T(0));
        return;
    }
    T dh = to_arith(a.doutput[row * kRecurrent + unit]), dc = 0;
    if (s.step + 1 == length) {
        if (a.dh1) dh += to_arith(a.dh1[at]);
        if (a.dc1) dc = to_arith(a.dc1[at]);
    } else {
#pragma unroll 12
        for (int part = 0; part < a.parts; ++part) dh += a.carried[(part * s.B + b) * kRecurrent + unit];
        dc = a.dc[at];
    }
#pragma unroll
    for (int warp = 0; warp < kControllerWarps; ++warp) dh += sums[e * kControllerThreads + warp * 32 + lane_of_warp()];
    const T *gates = a.saved_gates + row * 4 * kHidden + unit;
    const T gate_in = gates[0], gate_forget = gates[kHidden], cell = gates[2 * kHidden], gate_out = gates[3 * kHidden];
    const T c = a.cells[(s.step - a.start) * s.B * kHidden + at];
    const T squashed = hyperbolic_tangent(gate_forget * c + gate_in * cell);
    const auto grad = lstm_cell_backward(gate_in, gate_forget, cell, gate_out, c, squashed, dh, dc);
    dgates[0] = to_storage<S>(grad.gate_in), dgates[kHidden] = to_storage<S>(grad.gate_forget);
    dgates[2 * kHidden] = to_storage<S>(grad.cell), dgates[3 * kHidden] = to_storage<S>(grad.gate_out);
    a.dc[at] = grad.c;
}

using StateBackwardArgs = StateBackward<S>;
MANN_KERNEL(state_backward, kControllerThreads, StateBackwardArgs) {
    MANN_SHARED(T, sums, kExamples * kControllerThreads);
    constexpr int groups = (kRecurrent + 31) / 32;
    const StateBackward<S> &a = args;
    const ControllerSizes &s = a.sizes;
    const int column = int(blockIdx.x) % groups * 32 + lane_of_warp(), part = int(blockIdx.x) / groups;
    const int64_t b0 = int64_t(blockIdx.y) * kExamples;
    const int count = int(min(s.B - b0, int64_t(kExamples)));
    T sum[kExamples] = {};
    const int first = part * kControllerWarps + warp_of_block(), stride = a.parts * kControllerWarps;
    const S *weights = a.weight_hh + int64_t(first) * kRecurrent + column;
    with_weights(
        column < kRecurrent ? (4 * kHidden - first + stride - 1) / stride : 0,
        [&](int i) { return weights + int64_t(i) * stride * kRecurrent; },
        [&](int i, T weight) {
#pragma unroll
            for (int e = 0; e < kExamples; ++e)
                if (e < count)
                    sum[e] += weight * to_arith(a.dgates[row_of(s, b0 + e) * 4 * kHidden + first + i * stride]);
        });
#pragma unroll
    for (int e = 0; e < kExamples; ++e) sums[e * kControllerThreads + threadIdx.x] = sum[e];
    __syncthreads();
    const int e = warp_of_block();
    if (e >= count || column >= kRecurrent || s.step >= length_of(s, b0 + e)) return;
    T total = 0;
#pragma unroll
    for (int warp = 0; warp < kControllerWarps; ++warp)
        total += sums[e * kControllerThreads + warp * 32 + lane_of_warp()];
    a.carried[(part * s.B + b0 + e) * kRecurrent + column] = total;
}

} // namespace mann::cuda
