// What the entry points share: tensors in and out of the kernels, and the parallel loop. Compiled once (MANN_ENTRY).
#pragma once

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../tensors.h"
#include "kernel.h"

namespace mann {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Memory that nothing is written to yet. Large blocks in large pages, where the system has them: a step touches memory
// far apart.
struct Block {
    struct Free {
        void operator()(char *memory) const { std::free(memory); }
    };
    std::unique_ptr<char, Free> memory;
    int64_t bytes = 0;

    void allocate(int64_t size) {
        constexpr int64_t page = int64_t(2) << 20;
        const int64_t alignment = size < page ? 64 : page;
        memory.reset(); // first, so that there are never two
        bytes = 0;
        void *block = nullptr;
        STD_TORCH_CHECK(posix_memalign(&block, alignment, size) == 0, "mann_kernels: no memory for ", size,
                        " bytes of scratch");
        memory.reset(static_cast<char *>(block));
        bytes = size;
#if defined(MADV_HUGEPAGE)
        if (alignment == page) madvise(block, size, MADV_HUGEPAGE);
#endif
    }
};

// The tensors of one call: their storage type, and the contiguous copies that must live until the kernel is done.
class Call {
  public:
    // `model` decides the storage type.
    explicit Call(const Tensor &model) : model_(model), dtype_(model.scalar_type()) {
        STD_TORCH_CHECK(dtype_ == ScalarType::Float || dtype_ == ScalarType::Double || dtype_ == ScalarType::BFloat16,
                        "the C++ kernels take float32, float64 and bfloat16");
    }

    Storage storage() const {
        return dtype_ == ScalarType::Float ? Storage::kFloat
                                           : (dtype_ == ScalarType::Double ? Storage::kDouble : Storage::kBf16);
    }
    ScalarType dtype() const { return dtype_; }
    ScalarType arithmetic() const { return dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

    // The data of a contiguous tensor of this type and these sizes: what memory safety needs, whoever calls.
    const void *in(const Tensor &tensor, ScalarType dtype, const char *name, Sizes sizes) {
        STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": wrong dtype for the C++ kernel");
        STD_TORCH_CHECK(fits(tensor, sizes), name, ": wrong shape for the C++ kernel");
        if (!tensor.is_contiguous()) {
            kept_.push_back(torch::stable::contiguous(tensor));
            return kept_.back().const_data_ptr();
        }
        return tensor.const_data_ptr();
    }
    const void *in(const Tensor &tensor, const char *name, Sizes sizes) { return in(tensor, dtype_, name, sizes); }
    const void *in(const std::optional<Tensor> &tensor, const char *name, Sizes sizes) {
        return tensor ? in(*tensor, dtype_, name, sizes) : nullptr;
    }
    // Rows [G, S] of numbers that may lie apart.
    FastRows rows(const Tensor &tensor, const char *name, Sizes sizes) {
        STD_TORCH_CHECK(tensor.scalar_type() == dtype_ && fits(tensor, sizes), name,
                        ": wrong dtype or shape for the C++ kernel");
        const RowStrides strides = row_strides(tensor, sizes);
        return {strides.contiguous ? tensor.const_data_ptr() : in(tensor, name, sizes), strides.task, strides.row};
    }
    const int64_t *lengths(const std::optional<Tensor> &tensor, int64_t batch) {
        return tensor ? static_cast<const int64_t *>(in(*tensor, ScalarType::Long, "lengths", {batch})) : nullptr;
    }
    // Slot numbers, each checked against the number of slots.
    const int32_t *slots(const Tensor &tensor, const char *name, Sizes sizes, int64_t number_of_slots) {
        const int32_t *data = static_cast<const int32_t *>(in(tensor, ScalarType::Int, name, sizes));
        for (int64_t i = 0; i < tensor.numel(); ++i)
            STD_TORCH_CHECK(data[i] >= 0 && data[i] < number_of_slots, name, ": got slot ", data[i],
                            ", want one in [0, ", number_of_slots, ")");
        return data;
    }
    Tensor empty(Sizes sizes, ScalarType dtype) const { return torch::stable::new_empty(model_, sizes, dtype); }
    Tensor empty(Sizes sizes) const { return empty(sizes, dtype_); }

    // So many numbers of arithmetic type on a cache line, not initialised, until the call ends. The n-th block of a
    // call stays with its thread for the n-th of the next, unless it is huge: the pages of fresh memory cost more than
    // what a step does with them.
    void *scratch(int64_t elements) {
#if defined(__SANITIZE_ADDRESS__)
        constexpr int64_t huge = 0; // every block is exact and its own, so that the sanitizer sees where it ends
#else
        constexpr int64_t huge = int64_t(64) << 20;
#endif
        static thread_local std::vector<Block> kept;
        const int64_t bytes = std::max<int64_t>(elements, 1) * (arithmetic() == ScalarType::Double ? 8 : 4);
        if (bytes <= huge && kept.size() <= scratch_used_) kept.resize(scratch_used_ + 1);
        Block &block = bytes > huge ? huge_.emplace_back() : kept[scratch_used_++];
        if (block.bytes < bytes) block.allocate(bytes);
        return block.memory.get();
    }

    // Runs the kernel over `batch` examples, in at most one part per thread. A part has `elements` numbers of scratch;
    // `work` is roughly how many multiply-adds the whole call has: below 2^17 the threads would cost more than they
    // give.
    void run(Kernel kernel, const void *args, int64_t batch, int64_t elements, double work) {
        if (batch == 0) return;
        const int64_t threads = torch::stable::get_num_threads();
        const int64_t parts = work < (1 << 17) ? 1 : std::min<int64_t>(threads, batch);
        const int64_t stride = parts == 1 ? elements : (elements + 31) / 32 * 32; // parts do not share a cache line
        const int64_t size = arithmetic() == ScalarType::Double ? 8 : 4;
        char *base = static_cast<char *>(scratch(parts * stride));
        torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
            for (int64_t part = first; part < last; ++part)
                kernel(storage(), args, batch * part / parts, batch * (part + 1) / parts, base + part * stride * size);
        });
    }

  private:
    const Tensor &model_;
    ScalarType dtype_;
    std::vector<Tensor> kept_;
    std::vector<Block> huge_;
    size_t scratch_used_ = 0;
};

inline void *out(const Tensor &tensor) { return tensor.mutable_data_ptr(); }

} // namespace mann
