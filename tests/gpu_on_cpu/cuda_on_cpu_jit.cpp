// The launch of csrc/cuda/jit.h on the CPU: a file of kernels is compiled by g++ when it is first needed, as NVRTC
// would.
#include "cuda_on_cpu.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>

#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../csrc/cuda/jit.h"

namespace mann::cuda {

namespace {

std::string command, folder, record; // of mann_cuda_on_cpu_compiler
bool recording = false;

using Kernel = void (*)(const void *);

Device pretended{};

void *library_of(const Build &build) {
    static std::map<std::string, void *> libraries;
    void *&library = libraries[build.source() + build.options()];
    if (library != nullptr) return library;
    const std::string name = std::to_string(std::hash<std::string>()(command + build.source() + build.options()));
    const std::string file = folder + "/" + name + ".so", made = file + "." + std::to_string(getpid());
    struct stat found{};
    if (stat(file.c_str(), &found) != 0) {
        const std::string log = made + ".txt";
        const std::string full =
            command + "/" + build.source() + " " + build.options() + " -o " + made + " > " + log + " 2>&1";
        if (std::system(full.c_str()) != 0)
            throw std::runtime_error("CUDA on the CPU: " + build.source() + " with " + build.options() +
                                     " does not compile, see " + log);
        std::remove(log.c_str());
        std::rename(made.c_str(), file.c_str());
    }
    library = dlopen(file.c_str(), RTLD_NOW);
    if (library == nullptr) throw std::runtime_error(std::string("CUDA on the CPU: ") + dlerror());
    return library;
}

} // namespace

const Device &device(int) { return pretended; }

void launch(const Device &device, const Build &build, const char *kernel, const Grid &grid, Stream, const void *args) {
    if (grid.shared_bytes > device.shared_bytes)
        throw std::runtime_error(std::string(kernel) + ": got " + std::to_string(grid.shared_bytes) +
                                 " bytes of shared memory, the device has " + std::to_string(device.shared_bytes));
    if (recording) {
        record += build.source() + "|" + build.options() + "|" + kernel + "|" + std::to_string(grid.blocks) + "x" +
                  std::to_string(grid.blocks_y) + "|" + std::to_string(grid.threads) + "|" +
                  std::to_string(grid.cluster) + "|" + std::to_string(grid.shared_bytes) + "\n";
        return;
    }
    const auto run = reinterpret_cast<Kernel>(dlsym(library_of(build), kernel));
    if (run == nullptr) throw std::runtime_error(build.source() + " has no kernel " + kernel);
    on_cpu::launch(
        kernel, dim3(unsigned(grid.blocks), unsigned(grid.blocks_y)), dim3(unsigned(grid.threads)), grid.cluster,
        size_t(grid.shared_bytes), [&] { run(args); }, grid.follows);
}

int clusters_at_once(const Device &device, const Build &, const char *, const Grid &grid) {
    return device.multiprocessors / 9 * 8 / grid.cluster;
}

} // namespace mann::cuda

// How to compile, up to the folder of the sources, and where to put what was made.
extern "C" __attribute__((visibility("default"))) void mann_cuda_on_cpu_compiler(const char *command,
                                                                                 const char *folder) {
    mann::cuda::command = command;
    mann::cuda::folder = folder;
}
// The device that launches are planned for: bytes of shared memory of a block, multiprocessors, compute capability.
extern "C" __attribute__((visibility("default"))) void mann_cuda_on_cpu_device(int64_t shared_bytes,
                                                                               int multiprocessors, int capability) {
    mann::cuda::pretended = {0, shared_bytes, multiprocessors, capability};
}
// From now on launches are written down instead of run, or run again: a line each of source, options, kernel, blocks,
// threads, cluster, bytes of shared memory. The lines so far.
extern "C" __attribute__((visibility("default"))) const char *mann_cuda_on_cpu_record(int on) {
    static std::string lines;
    lines = mann::cuda::record;
    mann::cuda::record.clear();
    mann::cuda::recording = on != 0;
    return lines.c_str();
}
