// NVRTC, the caches and the launch.
#include "jit.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include <sys/stat.h>
#include <unistd.h>

#include "driver.h"

namespace mann::cuda {

// The files of csrc that kernels are made of, which setup.py writes into the library; ends with a null name.
struct File {
    const char *name, *text;
};
extern const File kFiles[];

namespace {

// FNV-1a, twice with different starts: a name for what was compiled.
std::string hash_of(const std::vector<std::string> &parts) {
    uint64_t hashes[2] = {0xcbf29ce484222325u, 0x9ae16a3b2f90404fu};
    for (uint64_t &hash : hashes)
        for (const std::string &part : parts) {
            for (const unsigned char c : part) hash = (hash ^ c) * 0x100000001b3u;
            hash = (hash ^ 0xff) * 0x100000001b3u; // where a part ends
        }
    char text[33];
    std::snprintf(text, sizeof(text), "%016llx%016llx", static_cast<unsigned long long>(hashes[0]),
                  static_cast<unsigned long long>(hashes[1]));
    return text;
}

const std::string &hash_of_files() {
    static const std::string hash = [] {
        std::vector<std::string> parts;
        for (const File *file = kFiles; file->name != nullptr; ++file)
            parts.insert(parts.end(), {file->name, file->text});
        return hash_of(parts);
    }();
    return hash;
}

// ~/.cache/mann_kernels, or where XDG_CACHE_HOME says; empty where there is no such place.
std::string cache_folder() {
    const char *cache = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");
    std::string folder = cache && *cache ? cache : (home && *home ? std::string(home) + "/.cache" : "");
    if (folder.empty()) return folder;
    mkdir(folder.c_str(), 0777);
    folder += "/mann_kernels";
    mkdir(folder.c_str(), 0777);
    return folder;
}

std::string read_file(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Whole or not at all, whoever else writes the same; a full or read-only disk only costs the next process its time.
void write_file(const std::string &path, const std::string &data) {
    const std::string temporary = path + "." + std::to_string(getpid());
    bool written = false;
    {
        std::ofstream file(temporary, std::ios::binary);
        written = static_cast<bool>(file.write(data.data(), std::streamsize(data.size())).flush());
    }
    if (!written || std::rename(temporary.c_str(), path.c_str()) != 0) std::remove(temporary.c_str());
}

// Hopper's own code for Hopper, sm_90a. For what is newer, PTX of compute_90, which its driver compiles: what
// NVRTC 13.0 has for Blackwell crashes now and then on the longest kernels. For what is older, the latest that the
// compiler knows.
std::string target_of(int capability) {
    if (capability == 90) return "sm_90a";
    int count = 0;
    nvrtc().supported_count(&count);
    std::vector<int> known(static_cast<size_t>(count));
    nvrtc().supported(known.data());
    int best = 0;
    for (const int one : known)
        if (one <= std::min(capability, 90)) best = std::max(best, one);
    return (best == capability ? "sm_" : "compute_") + std::to_string(best);
}

std::string compile_text(const Build &build, const std::string &target) {
    std::vector<const char *> names, texts;
    const char *main = nullptr;
    for (const File *file = kFiles; file->name != nullptr; ++file) {
        names.push_back(file->name), texts.push_back(file->text);
        if (build.source() == file->name) main = file->text;
    }
    if (main == nullptr) throw std::runtime_error("mann_kernels: no source " + build.source());
    std::vector<std::string> options = {"--gpu-architecture=" + target, "-std=c++17", "-lineinfo"};
    for (size_t at = 0; at < build.options().size();) {
        const size_t end = std::min(build.options().find(' ', at), build.options().size());
        options.push_back(build.options().substr(at, end - at));
        at = end + 1;
    }
    std::vector<const char *> wanted;
    for (const std::string &option : options) wanted.push_back(option.c_str());
    const Nvrtc &compiler = nvrtc();
    void *program = nullptr;
    int error = compiler.create(&program, main, build.source().c_str(), int(names.size()), texts.data(), names.data());
    if (error == 0) error = compiler.compile(program, int(wanted.size()), wanted.data());
    size_t size = 0;
    if (error != 0) {
        std::string log;
        if (program != nullptr && compiler.log_size(program, &size) == 0 && size > 1) {
            log.resize(size);
            compiler.log(program, log.data());
        }
        compiler.destroy(&program);
        throw std::runtime_error("mann_kernels: " + build.source() + " does not compile for " + target + " with " +
                                 build.options() + ":\n" + log.c_str());
    }
    const bool cubin = target.rfind("sm_", 0) == 0;
    (cubin ? compiler.cubin_size : compiler.ptx_size)(program, &size);
    std::string made(size, '\0');
    (cubin ? compiler.cubin : compiler.ptx)(program, made.data());
    compiler.destroy(&program);
    if (!cubin) made.pop_back(); // the 0 at the end of PTX, which a string has anyway
    return made;
}

// Of the cache on disk where it is there, else compiled and put there; its path to `path`.
std::string binary_of(const Build &build, const std::string &target, std::string *path) {
    int major = 0, minor = 0;
    nvrtc().version(&major, &minor);
    const std::string version = std::to_string(major) + "." + std::to_string(minor), folder = cache_folder();
    const std::string name = hash_of({hash_of_files(), version, target, build.source(), build.options()});
    const std::string file = folder.empty() ? "" : folder + "/" + name + ".bin";
    if (path != nullptr) *path = file;
    std::string binary = file.empty() ? "" : read_file(file);
    if (!binary.empty()) return binary;
    binary = compile_text(build, target);
    if (!file.empty()) write_file(file, binary);
    return binary;
}

// A thread that PyTorch has started has no context before its first call of the runtime.
void make_current(const Device &device) {
    void *context = nullptr;
    driver().check(driver().get_current(&context), "context");
    if (context != nullptr) return;
    driver().check(driver().retain_primary(&context, device.index), "context");
    driver().check(driver().set_current(context), "context");
}

struct Function {
    void *handle = nullptr;
    int64_t shared_bytes = 0; // that it may have by now
    int cluster = 8;
};

Function &function_of(const Device &device, const Build &build, const char *kernel) {
    static std::mutex mutex;
    static std::unordered_map<std::string, Function> functions;
    static std::unordered_map<std::string, void *> modules;
    std::string module_name = std::to_string(device.index) + build.source() + build.options();
    const std::string name = module_name + kernel;
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = functions.find(name); found != functions.end()) return found->second;
    void *&module = modules[module_name];
    if (module == nullptr)
        driver().check(driver().load(&module, binary_of(build, target_of(device.capability), nullptr).data()),
                       "loading " + build.source());
    Function function;
    driver().check(driver().function(&function.handle, module, kernel), std::string("finding ") + kernel);
    return functions[name] = function;
}

struct Launch {
    LaunchAttribute attributes[2]{};
    LaunchConfig config{};
    Function &function;

    Launch(const Device &device, const Build &build, const char *kernel, const Grid &grid, Stream stream)
        : function(function_of(device, build, kernel)) {
        if (grid.shared_bytes > function.shared_bytes) {
            driver().check(driver().set_attribute(function.handle, kMaxDynamicShared, int(grid.shared_bytes)), kernel);
            function.shared_bytes = grid.shared_bytes;
        }
        if (grid.cluster > function.cluster) {
            driver().check(driver().set_attribute(function.handle, kNonPortableCluster, 1), kernel);
            function.cluster = grid.cluster;
        }
        config.grid[0] = unsigned(grid.blocks), config.grid[1] = unsigned(grid.blocks_y), config.grid[2] = 1;
        config.block[0] = unsigned(grid.threads), config.block[1] = config.block[2] = 1;
        config.shared_bytes = unsigned(grid.shared_bytes), config.stream = stream;
        config.attributes = attributes;
        if (grid.cluster > 1) {
            LaunchAttribute &cluster = attributes[config.attribute_count++];
            cluster.id = kClusterDimension, cluster.value.cluster[0] = unsigned(grid.cluster);
            cluster.value.cluster[1] = cluster.value.cluster[2] = 1;
        }
        if (grid.follows && device.capability >= 90 && driver().captures_early_starts) {
            LaunchAttribute &follows = attributes[config.attribute_count++];
            follows.id = kProgrammaticSerialization, follows.value.allowed = 1;
        }
    }
};

} // namespace

const Device &device(int index) {
    static std::mutex mutex;
    static std::map<int, Device> devices;
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = devices.find(index); found != devices.end()) return found->second;
    const auto ask = [&](int what) {
        int value = 0;
        driver().check(driver().device_attribute(&value, what, index), "device");
        return value;
    };
    return devices[index] = {index, ask(kSharedOptin), ask(kMultiprocessors),
                             10 * ask(kCapabilityMajor) + ask(kCapabilityMinor)};
}

void launch(const Device &device, const Build &build, const char *kernel, const Grid &grid, Stream stream,
            const void *args) {
    make_current(device);
    const Launch launch(device, build, kernel, grid, stream);
    void *parameters[] = {const_cast<void *>(args)};
    driver().check(driver().launch(&launch.config, launch.function.handle, parameters, nullptr), kernel);
}

int clusters_at_once(const Device &device, const Build &build, const char *kernel, const Grid &grid) {
    make_current(device);
    const Launch launch(device, build, kernel, grid, nullptr);
    int count = 0;
    driver().check(driver().clusters(&count, launch.function.handle, &launch.config), kernel);
    return count;
}

} // namespace mann::cuda

// Whether kernels can be compiled and launched here: 0, or 1 and why not in `text`. Tries the compiler on a kernel that
// does nothing.
extern "C" __attribute__((visibility("default"))) int mann_cuda_missing(char *text, int64_t size) {
    using namespace mann::cuda;
    try {
        (void)driver();
        const char *const options[] = {"--gpu-architecture=compute_80"};
        void *program = nullptr;
        int error =
            nvrtc().create(&program, "extern \"C\" __global__ void nothing() {}", "nothing.cu", 0, nullptr, nullptr);
        if (error == 0) error = nvrtc().compile(program, 1, options);
        if (program != nullptr) nvrtc().destroy(&program);
        if (error != 0) throw std::runtime_error("mann_kernels: NVRTC does not work: error " + std::to_string(error));
    } catch (const std::exception &error) {
        std::snprintf(text, size_t(size), "%s", error.what());
        return 1;
    }
    return 0;
}

// Compiles `source` with `options` for a compute capability, without a device: 0 and the path of the cubin in `text`,
// or 1 and what was wrong. For tests, and to fill the cache of another machine.
extern "C" __attribute__((visibility("default"))) int mann_cuda_compile(const char *source, const char *options,
                                                                        int capability, char *text, int64_t size) {
    using namespace mann::cuda;
    std::string said;
    int failed = 0;
    try {
        Build build(source);
        for (std::string all = options; !all.empty();) {
            const size_t end = std::min(all.find(' '), all.size()), equals = all.find('=');
            build.set(all.substr(2, equals - 2).c_str(), all.substr(equals + 1, end - equals - 1));
            all.erase(0, end + 1);
        }
        binary_of(build, target_of(capability), &said);
    } catch (const std::exception &error) {
        said = error.what(), failed = 1;
    }
    std::snprintf(text, size_t(size), "%s", said.c_str());
    return failed;
}
