// mann_sequence not on clusters: what its kernels there are given, for the step-by-step form.
#pragma once

#include "grid_sequence.h"

#include "mann_plan.h"
#include "mann_sequence.h"

namespace mann::cuda {

struct MannOptions {
    bool write_add, key_strength, squash, shared, erase_all;
};

template <typename Args> GridSizes grid_sizes(const MannSizes &s, const Args &a, const MannOptions &o, double decay) {
    const MemoryOptions memory{s.W, s.R, s.key_strength, s.write_add, true};
    return {s.T, s.B, s.N, a.checkpoint_every, memory, o.shared, o.erase_all, decay, a.eps, a.lengths};
}
template <typename Args> GridController grid_controller(const MannSizes &s, const Args &a, const MannOptions &o) {
    GridController c{};
    c.H = s.H, c.squash = o.squash, c.weight_hh = a.weight_hh, c.weight_head = a.weight_head;
    c.bias_head = a.bias_head, c.c = a.c;
    return c;
}
inline void mann_on_grid(Call &call, const MannSizes &s, const MannForward<void> &a, const MannOptions &o) {
    GridController c = grid_controller(s, a, o);
    c.gates_x = a.gates_x, c.h = a.h, c.reads = a.reads, c.output = a.output, c.h1 = a.h1, c.c1 = a.c1;
    c.reads1 = a.reads1, c.saved_gates = a.saved_gates, c.saved_c = a.saved_c;
    GridForward memory{};
    memory.memory = a.memory, memory.usage = a.usage, memory.read_weights = a.read_weights;
    memory.memory1 = a.memory1, memory.usage1 = a.usage1, memory.read_weights1 = a.read_weights1;
    memory.saved_least_used = a.saved_least_used, memory.saved_memory = a.saved_memory;
    memory.saved_read_weights = a.saved_read_weights;
    grid_mann_forward(call, grid_sizes(s, a, o, a.decay), memory, c);
}
inline void mann_on_grid(Call &call, const MannSizes &s, const MannBackward<void> &a, const MannOptions &o) {
    GridController c = grid_controller(s, a, o);
    c.doutput = a.doutput, c.output_in = a.output, c.dh1 = a.dh1, c.dc1 = a.dc1, c.dreads1 = a.dreads1;
    c.saved_gates = const_cast<void *>(a.saved_gates), c.saved_c = const_cast<void *>(a.saved_c); // only read
    c.dgates = a.dgates, c.dh = a.dh, c.dc = a.dc, c.dreads = a.dreads;
    GridBackward memory{};
    memory.memory = a.memory, memory.read_weights = a.read_weights, memory.dmemory1 = a.dmemory1;
    memory.dread_weights1 = a.dread_weights1, memory.dmemory = a.dmemory, memory.dread_weights = a.dread_weights;
    memory.saved_least_used = a.saved_least_used, memory.saved_memory = a.saved_memory;
    memory.saved_read_weights = a.saved_read_weights, memory.dhead = a.dhead;
    grid_mann_backward(call, grid_sizes(s, a, o, 0), memory, c);
}

} // namespace mann::cuda
