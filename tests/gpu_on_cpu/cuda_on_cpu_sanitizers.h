// What the runtime of CUDA on the CPU tells the sanitizers that its kernels are compiled with.
#pragma once

#include <cstddef>

#if defined(MANN_TSAN)
extern "C" {
void *__tsan_get_current_fiber();
void *__tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void *fiber);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *address);
void __tsan_release(void *address);
}
#elif defined(MANN_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void **save, const void *stack, size_t size);
void __sanitizer_finish_switch_fiber(void *saved, const void **old_stack, size_t *old_size);
void __asan_poison_memory_region(const volatile void *address, size_t size);
void __asan_unpoison_memory_region(const volatile void *address, size_t size);
}
#endif

namespace mann::on_cpu {

// Whether what one cluster leaves behind must stay apart from what the next one does. ThreadSanitizer takes a new fiber
// for an old one that ended, so none does before all have run: about 8,000 threads to a launch.
#if defined(MANN_TSAN)
constexpr bool SEPARATE_CLUSTERS = true;
#else
constexpr bool SEPARATE_CLUSTERS = false;
#endif

struct Sanitized {
    void *fiber = nullptr; // its name for ThreadSanitizer, or its fake stack
};

inline void sanitized_before_switch([[maybe_unused]] Sanitized &from, [[maybe_unused]] bool ended,
                                    [[maybe_unused]] Sanitized &to, [[maybe_unused]] char *stack,
                                    [[maybe_unused]] size_t size) {
#if defined(MANN_TSAN)
    __tsan_switch_to_fiber(to.fiber, 1); // 1: one after the other, and yet not ordered
#elif defined(MANN_ASAN)
    __sanitizer_start_switch_fiber(ended ? nullptr : &from.fiber, stack, size);
#endif
}

// `stack` and `size` are those of the fiber that ran before: of the host they become known here.
inline void sanitized_after_switch([[maybe_unused]] Sanitized &to, [[maybe_unused]] char *&stack,
                                   [[maybe_unused]] size_t &size) {
#if defined(MANN_ASAN)
    const void *old = nullptr;
    __sanitizer_finish_switch_fiber(to.fiber, &old, &size);
    stack = static_cast<char *>(const_cast<void *>(old));
#endif
}

inline void sanitized_host([[maybe_unused]] Sanitized &host) {
#if defined(MANN_TSAN)
    host.fiber = __tsan_get_current_fiber();
#endif
}
inline void sanitized_start([[maybe_unused]] Sanitized &fiber, [[maybe_unused]] char *stack,
                            [[maybe_unused]] size_t size) {
#if defined(MANN_TSAN)
    fiber.fiber = __tsan_create_fiber(0);
#elif defined(MANN_ASAN)
    fiber.fiber = nullptr;
    __asan_unpoison_memory_region(stack, size); // the frames of a thread that was abandoned here
#endif
}
inline void sanitized_end([[maybe_unused]] Sanitized &fiber) {
#if defined(MANN_TSAN)
    __tsan_destroy_fiber(fiber.fiber);
#endif
}

// All that was done before the release is ordered before what comes after the acquire.
inline void sanitized_release([[maybe_unused]] char *synchronised) {
#if defined(MANN_TSAN)
    __tsan_release(synchronised);
#endif
}
inline void sanitized_acquire([[maybe_unused]] char *synchronised) {
#if defined(MANN_TSAN)
    __tsan_acquire(synchronised);
#endif
}

// Memory of which every byte is out of bounds, and within them again.
inline void sanitized_gone([[maybe_unused]] char *data, [[maybe_unused]] size_t size) {
#if defined(MANN_ASAN)
    __asan_poison_memory_region(data, size);
#endif
}
inline void sanitized_whole([[maybe_unused]] char *data, [[maybe_unused]] size_t size) {
#if defined(MANN_ASAN)
    __asan_unpoison_memory_region(data, size);
#endif
}

} // namespace mann::on_cpu
