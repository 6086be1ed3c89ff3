// The end of a sequence: see grid_controller.h.
#include "device.h"

#include "grid_controller.h"

namespace mann::cuda {

using S = MANN_STORAGE;
using T = Arith<S>;

using FinishArgs = Finish<S>;
MANN_KERNEL(finish, kControllerThreads, FinishArgs) {
    start_next();
    wait_for_previous();
    const ControllerSizes &s = args.sizes;
    const FinishItem<S> &item = args.items[blockIdx.y];
    const int64_t b = int64_t(blockIdx.x) / args.blocks, block = int64_t(blockIdx.x) % args.blocks;
    const int64_t length = s.lengths ? min(s.lengths[b], int64_t(s.T)) : int64_t(s.T);
    for (int64_t i = block * kControllerThreads + threadIdx.x; i < item.numbers;
         i += args.blocks * kControllerThreads) {
        S *target = item.target + b * item.numbers + i;
        if (length <= 0) {
            *target = item.initial ? item.initial[b * item.numbers + i] : to_storage<S>(T(0));
        } else if (item.parts) {
            const T sum = sum_of<12>(0, int(item.count), 1,
                                     [&](int part) { return item.parts + (part * s.B + b) * item.row + item.at + i; });
            *target = to_storage<S>(sum);
        } else if (item.rows) {
            *target = item.rows[((length - 1) * s.B + b) * item.row + item.at + i];
        }
    }
}

} // namespace mann::cuda
