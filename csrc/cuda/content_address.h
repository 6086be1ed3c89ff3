// What content_address's kernels on clusters are given. B examples, N slots of W numbers, R heads.
#pragma once

namespace mann::cuda {

template <typename S> struct AddressForward {
    double eps;
    const S *memory, *key, *beta; // [B, N, W], [B, R, W], [B, R] or null
    S *read_weights;              // [B, R, N] out
};

template <typename S> struct AddressBackward {
    double eps;
    const S *dread_weights, *memory, *key, *beta, *read_weights; // as forward
    S *dmemory, *dkey, *dbeta;                                   // out; dbeta null where there is no beta
};

} // namespace mann::cuda
