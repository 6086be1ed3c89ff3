// What is used of CUDA's driver and of NVRTC, found when the program runs: neither is needed to build or to load this.
// Names, numbers and layouts are those of cuda.h and nvrtc.h, which keep them from one version to the next.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include <dlfcn.h>

namespace mann::cuda {

constexpr int kMaxDynamicShared = 8, kNonPortableCluster = 14; // CUfunction_attribute
constexpr int kMultiprocessors = 16, kCapabilityMajor = 75, kCapabilityMinor = 76, kSharedOptin = 97; // of a device
constexpr int kClusterDimension = 4, kProgrammaticSerialization = 6; // CUlaunchAttributeID

struct alignas(8) LaunchAttribute {
    int id;
    int padding;
    union {
        char all[64];
        unsigned cluster[3];
        int allowed;
    } value;
};
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void *stream;
    LaunchAttribute *attributes;
    unsigned attribute_count;
};

// A shared library that need not be there.
class Library {
  public:
    Library(void *handle, const char *what) : handle_(handle), what_(what) {}
    template <typename F> void find(F &function, const char *name) const {
        if (handle_ == nullptr) throw std::runtime_error(std::string("mann_kernels: no ") + what_ + " found");
        function = reinterpret_cast<F>(dlsym(handle_, name));
        if (function == nullptr)
            throw std::runtime_error(std::string("mann_kernels: ") + what_ + " is too old: it has no " + name);
    }

  private:
    void *handle_;
    const char *what_;
};

struct Driver {
    int (*error_string)(int, const char **);
    int (*get_current)(void **);
    int (*set_current)(void *);
    int (*retain_primary)(void **, int);
    int (*device_attribute)(int *, int, int);
    int (*load)(void **, const void *);
    int (*function)(void **, void *, const char *);
    int (*set_attribute)(void *, int, int);
    int (*launch)(const LaunchConfig *, void *, void **, void **);
    int (*clusters)(int *, void *, const LaunchConfig *);
    bool captures_early_starts; // launches with kProgrammaticSerialization, in a graph: from CUDA 12.3 on

    Driver() {
        const Library library(dlopen("libcuda.so.1", RTLD_NOW), "CUDA driver (libcuda.so.1)");
        library.find(error_string, "cuGetErrorString");
        library.find(get_current, "cuCtxGetCurrent");
        library.find(set_current, "cuCtxSetCurrent");
        library.find(retain_primary, "cuDevicePrimaryCtxRetain");
        library.find(device_attribute, "cuDeviceGetAttribute");
        library.find(load, "cuModuleLoadData");
        library.find(function, "cuModuleGetFunction");
        library.find(set_attribute, "cuFuncSetAttribute");
        library.find(launch, "cuLaunchKernelEx");
        library.find(clusters, "cuOccupancyMaxActiveClusters");
        int (*version)(int *), number = 0;
        library.find(version, "cuDriverGetVersion");
        captures_early_starts = version(&number) == 0 && number >= 12030;
    }
    void check(int error, const std::string &what) const {
        if (error == 0) return;
        const char *text = nullptr;
        error_string(error, &text);
        throw std::runtime_error("mann_kernels: " + what + ": " + (text ? text : "unknown error of the CUDA driver"));
    }
};
inline const Driver &driver() {
    static const Driver found;
    return found;
}

struct Nvrtc {
    int (*version)(int *, int *);
    int (*supported_count)(int *);
    int (*supported)(int *);
    int (*create)(void **, const char *, const char *, int, const char *const *, const char *const *);
    int (*compile)(void *, int, const char *const *);
    int (*log_size)(void *, size_t *);
    int (*log)(void *, char *);
    int (*cubin_size)(void *, size_t *);
    int (*cubin)(void *, char *);
    int (*ptx_size)(void *, size_t *);
    int (*ptx)(void *, char *);
    int (*destroy)(void **);

    Nvrtc() {
        const Library library(open(), "NVRTC (libnvrtc.so.13 or .12, which PyTorch's builds for CUDA bring along)");
        library.find(version, "nvrtcVersion");
        library.find(supported_count, "nvrtcGetNumSupportedArchs");
        library.find(supported, "nvrtcGetSupportedArchs");
        library.find(create, "nvrtcCreateProgram");
        library.find(compile, "nvrtcCompileProgram");
        library.find(log_size, "nvrtcGetProgramLogSize");
        library.find(log, "nvrtcGetProgramLog");
        library.find(cubin_size, "nvrtcGetCUBINSize");
        library.find(cubin, "nvrtcGetCUBIN");
        library.find(ptx_size, "nvrtcGetPTXSize");
        library.find(ptx, "nvrtcGetPTX");
        library.find(destroy, "nvrtcDestroyProgram");
    }
    // That of torch first: its own library that uses it knows where it is.
    static void *open() {
        if (void *torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD)) {
            Dl_info info{};
            if (dladdr(dlsym(torch, "aoti_torch_empty_strided"), &info) != 0 && info.dli_fname != nullptr) {
                const std::string path = info.dli_fname, folder = path.substr(0, path.rfind('/') + 1);
                if (void *found = dlopen((folder + "libcaffe2_nvrtc.so").c_str(), RTLD_NOW)) return found;
            }
        }
        for (const char *name : {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"})
            if (void *found = dlopen(name, RTLD_NOW)) return found;
        return nullptr;
    }
};
inline const Nvrtc &nvrtc() {
    static const Nvrtc found;
    return found;
}

} // namespace mann::cuda
