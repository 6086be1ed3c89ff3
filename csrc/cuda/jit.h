// Kernels compiled when they are first needed, by NVRTC, with every size a constant; kept in memory and on disk.
// Knows nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace mann::cuda {

using Stream = void *; // a CUstream

// A file of kernels and the macros that it is compiled with: one binary for each set of them.
class Build {
  public:
    explicit Build(std::string source) : source_(std::move(source)) {}
    Build &set(const char *name, int64_t value) { return set(name, std::to_string(value)); }
    Build &set(const char *name, const std::string &value) {
        options_ += std::string(options_.empty() ? "" : " ") + "-D" + name + "=" + value;
        return *this;
    }
    const std::string &source() const { return source_; }
    const std::string &options() const { return options_; }

  private:
    std::string source_, options_;
};

// How many blocks (x, y), of how many threads, in clusters of how many blocks along x, with how many bytes of dynamic
// shared memory each; follows: may be started before the launch ahead of it in the stream has ended, for which it waits
// itself: wait_for_previous() of device.h.
struct Grid {
    int64_t blocks;
    int threads;
    int cluster = 1;
    int64_t shared_bytes = 0;
    int64_t blocks_y = 1;
    bool follows = false;
};

struct Device {
    int index;
    int64_t shared_bytes; // that a block may have
    int multiprocessors;
    int capability; // 90 for 9.0
};
// What is known of a device; throws without a driver.
const Device &device(int index);

// Compiles where that was not done before and launches; throws with the compiler's or CUDA's reason where that fails.
// Waits for nothing: may be captured in a graph. `args` is the one parameter of the kernel.
void launch(const Device &device, const Build &build, const char *kernel, const Grid &grid, Stream stream,
            const void *args);

// How many clusters of this launch run at once.
int clusters_at_once(const Device &device, const Build &build, const char *kernel, const Grid &grid);

} // namespace mann::cuda
