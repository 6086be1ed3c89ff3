// How the entry points read the sizes of tensors, for the CPU and for CUDA.
//
// The tensors of an augmented layer may lack their first dimension, that of tasks, where there is one task alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

namespace mann {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Whether a tensor has these sizes, of which a first one of 1 may be missing.
inline bool fits(const torch::stable::Tensor &tensor, Sizes sizes) {
    const int64_t missing = int64_t(sizes.size()) - tensor.dim();
    if (missing != 0 && (missing != 1 || sizes[0] != 1)) return false;
    const auto got = tensor.sizes();
    return std::equal(got.begin(), got.end(), sizes.begin() + missing);
}

// The sizes of what comes out: without the first, that of tasks, where x has none.
inline Sizes of_tasks(bool tasks, Sizes sizes) { return {sizes.begin() + !tasks, sizes.size() - !tasks}; }

// The sizes without the first: of one of several gradients.
inline Sizes rest(Sizes sizes) { return of_tasks(false, sizes); }

// Rows [G, S] of numbers that may lie apart: their strides in numbers. Only what is inside a row must be contiguous.
struct RowStrides {
    bool contiguous; // inside a row
    int64_t task, row;
};
inline RowStrides row_strides(const torch::stable::Tensor &tensor, Sizes sizes) {
    const int64_t rows = tensor.dim() + 1 - int64_t(sizes.size()); // their dimension
    RowStrides found{true, 0, 0};
    int64_t inner = 1;
    for (int64_t d = tensor.dim() - 1; d > rows; inner *= tensor.size(d--))
        found.contiguous &= tensor.size(d) == 1 || tensor.stride(d) == inner;
    if (!found.contiguous) return {false, tensor.size(rows) * inner, inner};
    return {true, rows == 1 ? tensor.stride(0) : 0, tensor.stride(rows)};
}

} // namespace mann
