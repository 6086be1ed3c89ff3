// What the entry points of the CUDA kernels share: tensors in and out, the stream, the launch, and how an operator is
// registered. Plain C++, against torch's stable ABI.
//
// An entry's file ends with STABLE_TORCH_LIBRARY_IMPL(MANN_LIBRARY, MANN_KEY, m); the build that runs the kernels on
// the CPU names another library and the CPU there.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../tensors.h"
#include "jit.h"

#if !defined(MANN_LIBRARY)
#define MANN_LIBRARY mann
#define MANN_KEY CUDA
#endif

#if defined(MANN_CUDA_ON_CPU)
namespace mann::on_cpu {
// The memory that kernels of this call write to; and that another call begins.
void may_be_written(void *data, int64_t bytes);
void new_call();
} // namespace mann::on_cpu
#endif

namespace mann::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
// Entries fill in a kernel's arguments for S = void: pointers without a type.
template <typename S> using Arith = S;

// Offsets inside an example are 32 bits.
inline void check_offsets(int64_t N, int64_t W, int64_t R) {
    STD_TORCH_CHECK(N > 0 && W > 0 && R > 0 && N * W < int64_t(1) << 31 && N * R < int64_t(1) << 28,
                    "the CUDA kernels take memories of up to 2^31 numbers: got N=", N, ", W=", W, ", R=", R);
}

// The tensors of one call, all on the device of `model`, which also decides the storage type; and where to launch.
class Call {
  public:
    explicit Call(const Tensor &model) : model_(model), dtype_(model.scalar_type()) {
#if defined(MANN_CUDA_ON_CPU)
        STD_TORCH_CHECK(dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16 || dtype_ == ScalarType::Double,
                        "the CUDA kernels on the CPU take float32, bfloat16 and float64");
        on_cpu::new_call();
#else
        STD_TORCH_CHECK(dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16,
                        "the CUDA kernels take float32 and bfloat16");
        STD_TORCH_CHECK(model.is_cuda(), "the CUDA kernels take CUDA tensors");
        guard_.emplace(model.get_device_index());
#endif
    }

    ScalarType dtype() const { return dtype_; }
    ScalarType arithmetic() const { return dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

    // The data of a contiguous tensor of this type, these sizes and this device: what memory safety needs, whoever
    // calls. Without a type, that of the model.
    const void *in(const Tensor &tensor, const char *name, Sizes sizes, ScalarType dtype) {
        check_tensor(tensor, name, sizes, dtype);
        if (tensor.is_contiguous()) return tensor.const_data_ptr();
        kept_.push_back(torch::stable::contiguous(tensor));
        return kept_.back().const_data_ptr();
    }
    const void *in(const Tensor &tensor, const char *name, Sizes sizes) { return in(tensor, name, sizes, dtype_); }
    const void *in(const std::optional<Tensor> &tensor, const char *name, Sizes sizes) {
        return tensor ? in(*tensor, name, sizes) : nullptr;
    }
    // Numbers of arithmetic type, indices, lengths.
    template <typename T = void> const T *in_arith(const Tensor &tensor, const char *name, Sizes sizes) {
        return static_cast<const T *>(in(tensor, name, sizes, arithmetic()));
    }
    const int32_t *in_int32(const Tensor &tensor, const char *name, Sizes sizes) {
        return static_cast<const int32_t *>(in(tensor, name, sizes, ScalarType::Int));
    }
    const int64_t *in_int64(const std::optional<Tensor> &tensor, const char *name, Sizes sizes) {
        return tensor ? static_cast<const int64_t *>(in(*tensor, name, sizes, ScalarType::Long)) : nullptr;
    }
    // Rows [G, S] of numbers that may lie apart, by strides in numbers.
    const void *rows(const Tensor &tensor, const char *name, Sizes sizes, int64_t &task_stride, int64_t &row_stride) {
        check_tensor(tensor, name, sizes, dtype_);
        const RowStrides strides = row_strides(tensor, sizes);
        task_stride = strides.task, row_stride = strides.row;
        return strides.contiguous ? tensor.const_data_ptr() : in(tensor, name, sizes);
    }
    Tensor empty(Sizes sizes, ScalarType dtype) const {
        Tensor made = torch::stable::new_empty(model_, sizes, dtype);
#if defined(MANN_CUDA_ON_CPU)
        on_cpu::may_be_written(made.mutable_data_ptr(), made.numel() * made.element_size());
#endif
        return made;
    }
    Tensor empty(Sizes sizes) const { return empty(sizes, dtype_); }

    // So many numbers of arithmetic type, not initialised. They are torch's again when the call ends, and its allocator
    // hands them on in the order of the stream.
    template <typename T = void> T *scratch(int64_t elements) {
        kept_.push_back(empty({elements}, arithmetic()));
        return static_cast<T *>(kept_.back().mutable_data_ptr());
    }

    const Device &on() const { return device(model_.get_device_index()); }
    int64_t arith_bytes() const { return arithmetic() == ScalarType::Double ? 8 : 4; }

    // Of the kernels in this file of csrc/cuda, for numbers stored as those of the call.
    Build build(const char *source) const {
        Build build(source);
        build.set("MANN_STORAGE", dtype_ == ScalarType::Float      ? "float"
                                  : dtype_ == ScalarType::BFloat16 ? "Bf16"
                                                                   : "double");
        return build;
    }
    // `args` is the struct that the kernel takes, of pointers without a type.
    template <typename Args> void launch(const Build &build, const char *kernel, const Grid &grid, const Args &args) {
        static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= 4096);
        if (grid.blocks > 0 && grid.blocks_y > 0) cuda::launch(on(), build, kernel, grid, stream(), &args);
    }

    // torch's current stream on this device.
    Stream stream() const {
#if defined(MANN_CUDA_ON_CPU)
        return nullptr;
#else
        // Of the part of torch that is only there where torch has CUDA, so it is looked up, not linked. (The function
        // for it in torch's stable ABI came with 2.13.)
        using Current = int32_t (*)(int32_t, void **);
        static const auto current = reinterpret_cast<Current>(
            dlsym(dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD), "aoti_torch_get_current_cuda_stream"));
        STD_TORCH_CHECK(current != nullptr, "mann_kernels: this torch has no CUDA");
        void *stream = nullptr;
        STD_TORCH_CHECK(current(model_.get_device_index(), &stream) == 0, "mann_kernels: no CUDA stream");
        return stream;
#endif
    }

  private:
    void check_tensor(const Tensor &tensor, const char *name, Sizes sizes, ScalarType dtype) const {
        STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": wrong dtype for the CUDA kernel");
        STD_TORCH_CHECK(fits(tensor, sizes), name, ": wrong shape for the CUDA kernel");
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

// torch.backends.cuda.matmul.allow_tf32. torch's stable ABI does not tell, so it is looked up; no where it cannot be.
inline bool allows_tf32() {
    using Context = const void *(*)();
    using Allowed = bool (*)(const void *);
    static void *const torch_cpu = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    static const auto context = reinterpret_cast<Context>(dlsym(torch_cpu, "_ZN2at13globalContextEv"));
    static const auto allowed = reinterpret_cast<Allowed>(dlsym(torch_cpu, "_ZNK2at7Context15allowTF32CuBLASEv"));
    if (context == nullptr || allowed == nullptr) return false;
    try {
        return allowed(context());
    } catch (...) { // where its old and its new settings disagree
        return false;
    }
}

template <typename T = void> T *out(const Tensor &tensor) { return static_cast<T *>(tensor.mutable_data_ptr()); }

} // namespace mann::cuda
