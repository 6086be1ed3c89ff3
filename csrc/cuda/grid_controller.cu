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

// Weights *weight(i) that a thread multiplies with *operand(i, e) of each of some examples: sum[e] is the sum over
// i < count. kChunk at once; the first weights before the launch that this one follows has ended, for nobody writes to
// them.
constexpr int kChunk = 12;
template <typename Weight, typename Operand>
MANN_INLINE void multiply(T (&sum)[kExamples], int count, int examples, Weight &&weight, Operand &&operand) {
    S next[kChunk];
    const auto load = [&](int from) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) next[i] = load_if(from + i < count, weight(from + i));
    };
    load(0);
    wait_for_previous();
#pragma unroll
    for (int e = 0; e < kExamples; ++e) sum[e] = 0;
#pragma unroll 1
    for (int from = 0; from < count; from += kChunk) {
        decltype(load_if(true, operand(0, 0))) loaded[kExamples][kChunk];
        T weights[kChunk];
#pragma unroll
        for (int i = 0; i < kChunk; ++i) weights[i] = to_arith(next[i]);
#pragma unroll
        for (int e = 0; e < kExamples; ++e)
            if (e < examples) {
#pragma unroll
                for (int i = 0; i < kChunk; ++i) loaded[e][i] = load_if(from + i < count, operand(from + i, e));
            }
        load(from + kChunk);
#pragma unroll
        for (int e = 0; e < kExamples; ++e)
            if (e < examples) {
#pragma unroll
                for (int i = 0; i < kChunk; ++i) sum[e] += weights[i] * to_arith(loaded[e][i]);
            }
    }
}

using LstmStepArgs = LstmStep<S>;
MANN_KERNEL(lstm_step, MANN_BOUNDS(kControllerThreads, 1), LstmStepArgs) {
    MANN_SHARED(T, gates, kControllerWarps * kExamples);
    const LstmStep<S> &a = args;
    const ControllerSizes &s = a.sizes;
    const int unit = int(blockIdx.x) * kUnits + warp_of_block() / 4, gate = warp_of_block() % 4;
    const int64_t b0 = int64_t(blockIdx.y) * kExamples;
    const int count = int(min(s.B - b0, int64_t(kExamples)));
    const S *weights = a.weight_hh + int64_t(gate * kHidden + unit) * kRecurrent + lane_of_warp();
    const S *before = a.output + ((s.step - 1) * s.B + b0) * kRecurrent;
    // of the cell that this thread makes at the end
    const int cell_e = int(threadIdx.x) / kUnits, of_block = int(threadIdx.x) % kUnits;
    const int mine = int(blockIdx.x) * kUnits + of_block;
    const int64_t b = b0 + cell_e, row = row_of(s, b), at = b * kHidden + mine;
    const bool has_cell = cell_e < count && mine < kHidden;
    start_next();
    S made_of_x[4];
#pragma unroll
    for (int g = 0; g < 4; ++g) made_of_x[g] = load_if(has_cell, a.gates_x + row * 4 * kHidden + g * kHidden + mine);
    T sum[kExamples];
    const int of_unit = unit < kHidden ? (kRecurrent - lane_of_warp() + 31) / 32 : 0;
    const auto weight = [&](int i) { return weights + 32 * i; };
    if (s.step > 0) {
        multiply(sum, of_unit, count, weight,
                 [&](int i, int e) { return before + e * kRecurrent + lane_of_warp() + 32 * i; });
    } else {
        multiply(sum, of_unit, count, weight, [&](int i, int e) {
            const int k = lane_of_warp() + 32 * i;
            return k < kHidden ? a.h + (b0 + e) * kHidden + k : a.reads + (b0 + e) * kWords + k - kHidden;
        });
    }
    const T c = s.step == 0 ? T(to_arith(load_if(has_cell, a.c0 + at))) : load_if(has_cell, a.c + at);
#pragma unroll
    for (int e = 0; e < kExamples; ++e) {
        const T total = sum_over_warp(sum[e]);
        if (lane_of_warp() == 0) gates[warp_of_block() * kExamples + e] = total;
    }
    __syncthreads();
    if (!has_cell) return;
    if (s.step >= length_of(s, b)) {
        a.output[row * kRecurrent + mine] = to_storage<S>(T(0));
        return;
    }
    T made[4];
#pragma unroll
    for (int g = 0; g < 4; ++g) made[g] = gates[(of_block * 4 + g) * kExamples + cell_e] + to_arith(made_of_x[g]);
    const auto cell = lstm_cell(made[0], made[1], made[2], made[3], c);
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
    start_next();
    const T bias = to_arith(a.bias_head[p]);
    T sum[kExamples];
    multiply(
        sum, (kHidden - lane_of_warp() + 31) / 32, count, [&](int i) { return weights + 32 * i; },
        [&](int i, int e) { return h + e * kRecurrent + 32 * i; });
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
    constexpr int at_once = 4;
    for (int t0 = a.start; t0 < stop; t0 += at_once) {
        T gates[at_once][3]; // input, forget, cell
#pragma unroll
        for (int i = 0; i < 3 * at_once; ++i)
            gates[i / 3][i % 3] = load_if(t0 + i / 3 < stop, a.saved_gates + ((t0 + i / 3) * s.B + b) * 4 * kHidden +
                                                                 i % 3 * kHidden + unit);
#pragma unroll
        for (int i = 0; i < at_once; ++i) {
            if (t0 + i >= stop) break;
            a.cells[(t0 + i - a.start) * s.B * kHidden + at] = c;
            c = gates[i][1] * c + gates[i][0] * gates[i][2];
        }
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
    const S *weights = a.weight_head + int64_t(warp_of_block()) * kHidden + unit;
    start_next();
    T sum[kExamples];
    multiply(
        sum, unit < kHidden ? (kHead - warp_of_block() + kControllerWarps - 1) / kControllerWarps : 0, count,
        [&](int i) { return weights + int64_t(i) * kControllerWarps * kHidden; },
        [&](int i, int e) { return a.dhead + row_of(s, b0 + e) * kHead + warp_of_block() + i * kControllerWarps; });
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
        dh += sum_of<12>(0, a.parts, 1, [&](int part) { return a.carried + (part * s.B + b) * kRecurrent + unit; });
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
    const int first = part * kControllerWarps + warp_of_block(), stride = a.parts * kControllerWarps;
    const S *weights = a.weight_hh + int64_t(first) * kRecurrent + column;
    start_next();
    T sum[kExamples];
    multiply(
        sum, column < kRecurrent ? (4 * kHidden - first + stride - 1) / stride : 0, count,
        [&](int i) { return weights + int64_t(i) * stride * kRecurrent; },
        [&](int i, int e) { return a.dgates + row_of(s, b0 + e) * 4 * kHidden + first + i * stride; });
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
