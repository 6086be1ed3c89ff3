// The formulas of a step, one spelling for every C++ target. V is a number or a vector of numbers: the includer
// provides exponential, exponential_minus_one and square_root for it, and MANN_ISA names the namespace.
#pragma once

#ifndef MANN_INLINE
#define MANN_INLINE inline
#endif

namespace mann::MANN_ISA {

// exponential and exponential_minus_one clamp their argument where their result would leave the exponent range.
template <typename V> MANN_INLINE V sigmoid(V x) {
    const V e = exponential(x);
    return e / (1 + e);
}

// tanh x = (e^2x - 1) / (e^2x + 1), accurate to the last bits near zero too.
template <typename V> MANN_INLINE V hyperbolic_tangent(V x) {
    const V e = exponential_minus_one(x + x);
    return e / (e + 2);
}

// 1 - tanh^2 x without the difference, in which the rounding of tanh would count twice.
template <typename V> MANN_INLINE V hyperbolic_tangent_slope(V x) {
    const V zero{}, e = exponential(x < zero ? x + x : -x - x);
    return 4 * e / ((1 + e) * (1 + e));
}

// Eq. 9 to 15: the new c. The four gates enter before, and leave after, their activation.
template <typename V> MANN_INLINE V lstm_cell_state(V &gate_in, V &gate_forget, V &cell, V &gate_out, V c) {
    gate_in = sigmoid(gate_in);
    gate_forget = sigmoid(gate_forget);
    cell = hyperbolic_tangent(cell);
    gate_out = sigmoid(gate_out);
    return gate_forget * c + gate_in * cell;
}
template <typename V> struct LstmCell {
    V c, h;
};
template <typename V> MANN_INLINE LstmCell<V> lstm_cell(V &gate_in, V &gate_forget, V &cell, V &gate_out, V c) {
    const V new_c = lstm_cell_state(gate_in, gate_forget, cell, gate_out, c);
    return {new_c, gate_out * hyperbolic_tangent(new_c)}; // eq. 16
}

// Gradients before the activations, and of the previous c; squashed is tanh of the cell state after the step, c the one
// before.
template <typename V> struct LstmCellGrad {
    V gate_in, gate_forget, cell, gate_out, c;
};
template <typename V>
MANN_INLINE LstmCellGrad<V> lstm_cell_backward(V gate_in, V gate_forget, V cell, V gate_out, V c, V squashed, V dh,
                                               V dc) {
    dc = dc + dh * gate_out * (1 - squashed * squashed);
    return {dc * cell * gate_in * (1 - gate_in), dc * c * gate_forget * (1 - gate_forget),
            dc * gate_in * (1 - cell * cell), dh * squashed * gate_out * (1 - gate_out), dc * gate_forget};
}

// Eq. 2: key . row / sqrt(|key|^2 |row|^2 + eps).
template <typename V> struct Cosine {
    V value, inverse_norm; // of the denominator
};
template <typename V, typename T> MANN_INLINE Cosine<V> cosine(V dot, V row_square, T key_square, T eps) {
    const V inverse_norm = 1 / square_root(key_square * row_square + eps);
    return {dot * inverse_norm, inverse_norm};
}

} // namespace mann::MANN_ISA
