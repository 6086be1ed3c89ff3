// What the entry points of the CUDA kernels share: tensors in and out, the stream, and how an operator is registered.
//
// A kernel's file ends with STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m); the build that runs the kernels on
// the CPU names another library and the CPU there.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "device.h"

#if !defined(MANN_LIBRARY)
#define MANN_LIBRARY mann
#define MANN_KEY CUDA
#endif

namespace mann::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::initializer_list<int64_t>;

inline ScalarType torch_type(const float *) { return ScalarType::Float; }
inline ScalarType torch_type(const double *) { return ScalarType::Double; }
inline ScalarType torch_type(const Bf16 *) { return ScalarType::BFloat16; }
inline ScalarType torch_type(const int32_t *) { return ScalarType::Int; }
inline ScalarType torch_type(const int64_t *) { return ScalarType::Long; }

// Offsets inside an example are 32 bits.
inline void check_offsets(int64_t N, int64_t W, int64_t R) {
    STD_TORCH_CHECK(N > 0 && W > 0 && R > 0 && N * W < int64_t(1) << 31 && N * R < int64_t(1) << 28,
                    "the CUDA kernels take memories of up to 2^31 numbers: got N=", N, ", W=", W, ", R=", R);
}

// A kernel may reach so many numbers from here: what runs it without a GPU checks that.
template <typename S>
inline void known_memory([[maybe_unused]] const char *name, [[maybe_unused]] const S *data,
                         [[maybe_unused]] int64_t numbers) {
#if defined(MANN_CUDA_ON_CPU)
    on_cpu::know_memory(name, data, numbers * int64_t(sizeof(S)), sizeof(S));
#endif
}

// The tensors of one call, all on the device of `model`, which also decides the storage type; and where to launch.
class Call {
  public:
    explicit Call(const Tensor &model) : model_(model), dtype_(model.scalar_type()) {
#if defined(MANN_CUDA_ON_CPU)
        on_cpu::forget_memory();
        STD_TORCH_CHECK(dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16 || dtype_ == ScalarType::Double,
                        "the CUDA kernels on the CPU take float32, bfloat16 and float64");
#else
        STD_TORCH_CHECK(dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16,
                        "the CUDA kernels take float32 and bfloat16");
        int device;
        check(cudaGetDevice(&device), "the CUDA kernels find no device");
        STD_TORCH_CHECK(model.is_cuda(), "the CUDA kernels take CUDA tensors");
        guard_.emplace(model.get_device_index());
#endif
    }

    ScalarType dtype() const { return dtype_; }
    ScalarType arithmetic() const { return dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

    // The data of a contiguous tensor of type S, these sizes and this device: what memory safety needs, whoever
    // calls.
    template <typename S> const S *in(const Tensor &tensor, const char *name, Sizes sizes) {
        check_tensor<S>(tensor, name, sizes);
        const void *data = tensor.const_data_ptr();
        if (!tensor.is_contiguous()) {
            kept_.push_back(torch::stable::contiguous(tensor));
            data = kept_.back().const_data_ptr();
        }
        known_memory(name, static_cast<const S *>(data), tensor.numel());
        return static_cast<const S *>(data);
    }
    template <typename S> const S *in(const std::optional<Tensor> &tensor, const char *name, Sizes sizes) {
        return tensor ? in<S>(*tensor, name, sizes) : nullptr;
    }
    // Rows [G, S] of numbers that may lie apart, by strides in numbers: only the dimensions after the first two must be
    // contiguous.
    template <typename S>
    const S *rows(const Tensor &tensor, const char *name, Sizes sizes, int64_t &task_stride, int64_t &row_stride) {
        check_tensor<S>(tensor, name, sizes);
        int64_t inner = 1;
        bool contiguous = true;
        for (int64_t d = tensor.dim() - 1; d > 1; inner *= tensor.size(d--))
            contiguous &= tensor.size(d) == 1 || tensor.stride(d) == inner;
        task_stride = contiguous ? tensor.stride(0) : tensor.size(1) * inner;
        row_stride = contiguous ? tensor.stride(1) : inner;
        if (!contiguous) return in<S>(tensor, name, sizes);
        const S *data = static_cast<const S *>(tensor.const_data_ptr());
        if (tensor.numel() != 0)
            known_memory(name, data, (tensor.size(0) - 1) * task_stride + (tensor.size(1) - 1) * row_stride + inner);
        return data;
    }
    Tensor empty(Sizes sizes, ScalarType dtype) const { return torch::stable::new_empty(model_, sizes, dtype); }
    Tensor empty(Sizes sizes) const { return empty(sizes, dtype_); }

    // So many numbers of arithmetic type, not initialised. They are torch's again when the call ends, and its allocator
    // hands them on in the order of the stream.
    template <typename T> T *scratch(int64_t elements) {
        kept_.push_back(empty({elements}, arithmetic()));
        T *data = static_cast<T *>(kept_.back().mutable_data_ptr());
        known_memory("scratch", data, elements);
        return data;
    }

    // Bytes of shared memory that a block may have.
    int64_t shared_limit() const {
        int limit = 232448; // as on sm_90
#if !defined(MANN_CUDA_ON_CPU)
        check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, model_.get_device_index()),
              "shared memory");
#endif
        return limit;
    }
    // Whether a block may have so many numbers of arithmetic type there.
    bool fits_shared(int64_t elements) const {
        return elements * (arithmetic() == ScalarType::Double ? 8 : 4) <= shared_limit();
    }

    // Calls f with a value of the storage type: f(S()).
    template <typename F> void with_storage(F &&f) const {
        if (dtype_ == ScalarType::Float) f(float());
#if defined(MANN_ONLY_FLOAT32) // a build for one test
        STD_TORCH_CHECK(dtype_ == ScalarType::Float, "built for float32 alone");
#else
        if (dtype_ == ScalarType::BFloat16) f(Bf16());
#if defined(MANN_CUDA_ON_CPU)
        if (dtype_ == ScalarType::Double) f(double()); // for gradcheck
#endif
#endif
    }

    // torch's current stream on this device.
    Stream stream() const {
#if defined(MANN_CUDA_ON_CPU)
        return Stream();
#else
        // Of the part of torch that is only there where torch has CUDA, so it is looked up, not linked. (The function
        // for it in torch's stable ABI came with 2.13.)
        using Current = int32_t (*)(int32_t, void **);
        static const auto current = reinterpret_cast<Current>(
            dlsym(dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD), "aoti_torch_get_current_cuda_stream"));
        STD_TORCH_CHECK(current != nullptr, "mann_kernels: this torch has no CUDA");
        void *stream = nullptr;
        STD_TORCH_CHECK(current(model_.get_device_index(), &stream) == 0, "mann_kernels: no CUDA stream");
        return static_cast<Stream>(stream);
#endif
    }

  private:
    template <typename S> void check_tensor(const Tensor &tensor, const char *name, Sizes sizes) const {
        STD_TORCH_CHECK(tensor.scalar_type() == torch_type(static_cast<const S *>(nullptr)), name,
                        ": wrong dtype for the CUDA kernel");
        const auto got = tensor.sizes();
        STD_TORCH_CHECK(got.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), got.begin()), name,
                        ": wrong shape for the CUDA kernel");
        STD_TORCH_CHECK(tensor.is_cuda() == model_.is_cuda() && tensor.get_device_index() == model_.get_device_index(),
                        name, ": not on the device of the others");
    }

    const Tensor &model_;
    ScalarType dtype_;
    std::vector<Tensor> kept_;
#if !defined(MANN_CUDA_ON_CPU)
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

template <typename S> S *out(const Tensor &tensor) {
    S *data = static_cast<S *>(tensor.mutable_data_ptr());
    known_memory("out", data, tensor.numel());
    return data;
}

} // namespace mann::cuda
