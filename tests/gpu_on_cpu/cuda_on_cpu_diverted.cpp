// Launches that go to the machine of ptx_machine.py instead of the fibers: which memory a call may reach, and how to
// hand over.
#include "cuda_on_cpu.h"

#include <stdexcept>
#include <string>

namespace mann::on_cpu {

Diversion diversion = nullptr;

namespace {

std::vector<Memory> memory; // of this call

} // namespace

void know_memory(const char *name, const void *data, int64_t bytes, int64_t item) {
    if (diversion != nullptr && bytes != 0) memory.push_back({name, data, bytes, item});
}

void forget_memory() { memory.clear(); }

void divert(const char *name, Launch what) {
    what.memories = static_cast<int64_t>(memory.size());
    what.memory = memory.data();
    if (diversion(&what) != 0) throw std::runtime_error(std::string("diverted launch of ") + name + " failed");
}

} // namespace mann::on_cpu

// From now on launches go to `to`; to the fibers again for null.
extern "C" __attribute__((visibility("default"))) void mann_cuda_on_cpu_divert(mann::on_cpu::Diversion to) {
    mann::on_cpu::diversion = to;
}
