// What the launches of augmented_linear are given, and their tiles.
#pragma once

#include "augmented.h"

namespace mann::cuda {

// A block's tile of a product: groups of 4 x 4 numbers, one to a thread, and slices of the depth, summed at the end.
struct LinearTile {
    int row_groups, column_groups, slices;
    MANN_CONSTEXPR explicit LinearTile(bool large)
        : row_groups(large ? 8 : 2), column_groups(large ? 8 : 4), slices(large ? 4 : 32) {}
    MANN_CONSTEXPR int rows() const { return 4 * row_groups; }
    MANN_CONSTEXPR int columns() const { return 4 * column_groups; }
    MANN_CONSTEXPR int64_t tiles(int64_t height, int64_t width) const {
        return ceil_div(height, rows()) * ceil_div(width, columns());
    }
};
constexpr int kLinearThreads = 256, kLinearDepth = 64; // deep at once

template <typename S> struct LinearForward {
    AugmentedLayer<S> layer;
    const S *bias;    // [O] or null
    S *y;             // [G, L, O] out
    Arith<S> *slopes; // [2, G, L, O] out, slow and fast; or null
};
template <typename S> struct LinearBackward {
    AugmentedLayer<S> layer;
    const S *dy;                     // [G, L, O]
    const Arith<S> *slopes;          // [2, G, L, O] or null (1)
    S *dx, *dweight, *dfast, *dbias; // [G, L, I], [O, I], [G, rows, O, I], [O] out
    Arith<S> *dots;                  // [tiles of I, G, L, rows] out, the parts of dmix; or null
    int64_t x_blocks;                // the first blocks are for dx and dmix, the others for the weights
};
template <typename S> struct LinearMix {
    int64_t count, parts;
    const Arith<S> *dots; // [parts, count]
    S *dmix;              // [count] out
};

} // namespace mann::cuda
