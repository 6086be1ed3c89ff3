#include "mann_plan.h"

#include <algorithm>
#include <cmath>

namespace mann::cuda {

namespace {

MannPlan forced; // by mann_cuda_plan
bool is_forced = false;

constexpr int64_t kThreads = kRowThreads, kWarps = kThreads / 32;

int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t padded(int64_t n) { return divided(n, 4) * 4; }

// How the slots of a part stand in the registers of a block, as in rows.h.
struct RowShape {
    int64_t slots, lanes = 1, rows, columns;

    RowShape(const MannSizes &s, int64_t parts) : slots(divided(s.N, parts)) {
        while (2 * lanes <= 32 && 2 * lanes <= s.W && 2 * lanes * slots <= (lanes < 4 ? 2 : 1) * kThreads) lanes *= 2;
        rows = divided(slots, kThreads / lanes), columns = divided(s.W, lanes);
    }
};

// The hidden units of a block as in controller.h: of a warp, of the warps that have some, of all blocks.
struct UnitShape {
    int64_t units, of_warp = 1, padded, hidden;

    UnitShape(const MannSizes &s, const MannPlan &p) : units(divided(s.H, p.blocks)) {
        while (p.tensor ? of_warp < 4 : of_warp * kWarps < units) of_warp *= 2;
        padded = divided(units, of_warp) * of_warp, hidden = p.blocks * padded;
    }
};

// What ForwardShared and BackwardShared take, or a little more.
int64_t shared_bytes(const MannSizes &s, const MannPlan &p, bool backward) {
    const UnitShape shape(s, p);
    const int64_t E = p.examples, C = p.blocks, P = p.parts, units = shape.units, words = s.words();
    const int64_t head = padded(s.head()), part = padded(words + 2 * s.R), R = padded(s.R);
    const bool held = backward ? p.held_backward : p.held_forward;
    const auto fragments = [](int64_t count) { return divided(count, 16); };
    int64_t numbers = held ? 4 : 4 * units * ((backward ? s.H : shape.hidden) + words);
    if (p.tensor) { // and what is multiplied has room for whole fragments
        numbers = backward ? fragments(s.recurrent()) * fragments(4 * units)
                           : shape.padded / 4 * (fragments(shape.hidden) + fragments(words));
        numbers = numbers * 32 * s.fragment + 3 * 32 * E;
    }
    numbers += units * head + (s.write_add ? 2 : 1) * s.W * R + 8 * R + head + part + 2 * kWarps * s.R + 512;
    if (!backward) {
        numbers += 2 * shape.hidden * E + C * head + E * P * part + 8 * P * s.R + divided(s.N, P);
        numbers += words * E + shape.padded * E + kWarps * part;
    } else {
        numbers += 2 * C * units * E + C * padded(words) + E * P * padded(s.head() + s.R);
        numbers += head * E + 4 * units * E + (s.write_add ? 2 : 1) * kWarps * words + 4 * kWarps * s.R;
        numbers += 2 * words + head + 2 * s.W * R + 4 * P * R;
    }
    return numbers * s.number_bytes + 1024;
}

// Clocks of a step forward and backward. From what an H100 was measured to take (an exchange 1,100 clocks and a clock
// more for every 14 bytes, 128 bytes of shared memory a clock) and what the compiler makes of a step, of which four
// schedulers issue 0.7 instructions a clock each.
double clocks_of(const MannSizes &s, const MannPlan &p, const UnitShape &shape, const RowShape &rows) {
    const double E = p.examples, C = p.blocks, P = p.parts, units = double(shape.units), padded = double(shape.padded);
    const double words = double(s.words()), head = double(s.head()), R = double(s.R), exchange = 1100;
    const double memory = double(rows.slots) * words / 128, recurrent = double(s.recurrent());
    // Products with weight_hh: by arithmetic, or by the loads where the weights are not in registers.
    const auto product = [&](double count, double columns, bool held) {
        if (p.tensor) return count * columns / 16; // five instructions for 16 columns of 4 units
        return std::max(4 * count * E * columns / 90, held ? 0 : count * columns / 8);
    };
    const double forward = product(padded, words, p.held_forward) + units * head * E / 90 + 9 * memory +
                           (E * P * head + units * E * C + C * (words + R)) * 4 / 14 + (C * head + E * P * words) / 64;
    const double backward = product(units, recurrent, p.held_backward) + units * head * E / 90 + 22 * memory +
                            (C * (head + R) + double(s.H) * E + words * E * P) * 4 / 14 +
                            (E * P * head + C * words) / 64;
    const double again = 14 * memory + (p.parts > 1 ? exchange : 0);
    return forward + backward + again + 4 * exchange + 7000;
}

// Clusters of so many blocks that an H100 takes at once: 132 multiprocessors, in groups of 16 to 18.
int64_t clusters_at_once(int blocks, int multiprocessors) {
    const int64_t of_h100 = blocks == 1 ? 132 : blocks == 2 ? 66 : blocks == 4 ? 32 : blocks == 8 ? 15 : 7;
    return std::max<int64_t>(of_h100 * multiprocessors / 132, 1);
}

// A thread has 255 registers.
bool held_forward(const MannSizes &s, const UnitShape &shape) {
    return shape.of_warp * 4 * (divided(shape.hidden, 32) + divided(s.words(), 32)) <= 64;
}
bool held_backward(const MannSizes &s, int64_t units, const RowShape &shape) {
    return divided(s.recurrent(), kThreads) * units * 4 <= 64 && shape.rows * shape.columns <= 24;
}

} // namespace

MannPlan lrua_plan(const MannSizes &s, int64_t shared_limit, int multiprocessors) {
    MannPlan best;
    double least = 0;
    for (int parts = 1; parts <= 16; parts *= 2) {
        if (is_forced && parts != forced.parts) continue;
        const RowShape shape(s, parts);
        const int64_t R = padded(s.R), words = s.words(), head = padded(s.head());
        const int64_t common = s.W * R * (s.write_add ? 3 : 2) + 16 * R + head + (kWarps + 3 * parts) * words + 512 +
                               (2 * kWarps + 16 * parts) * s.R;
        MannPlan p{parts, 1, parts};
        p.forward_bytes = (common + shape.slots + 8 * parts * s.R) * s.number_bytes + 1024;
        p.backward_bytes = (common + 3 * parts * (head + R) + (s.write_add ? 2 : 1) * kWarps * words +
                            6 * kWarps * s.R + 2 * words + 4 * R) *
                               s.number_bytes +
                           1024;
        const bool fits = std::max(p.forward_bytes, p.backward_bytes) <= shared_limit;
        if (!fits || divided(s.N, shape.slots) != parts || (parts > 1 && s.N < parts * s.R)) continue;
        if (shape.rows * shape.columns > 80 || s.R > 16) continue;
        // Two exchanges a step forward, two backward.
        const double clocks = 45 * double(shape.slots * words) / 128 + (parts > 1 ? 4 * 1100 : 0) + 6000;
        const int64_t at_once = clusters_at_once(parts, multiprocessors);
        const double whole = clocks * double(divided(std::max<int64_t>(s.B, 1), at_once));
        if (best.blocks == 0 || whole < least) best = p, least = whole;
    }
    return best;
}

MannPlan mann_plan(const MannSizes &s, int64_t shared_limit, int multiprocessors) {
    const auto filled = [&](MannPlan p) {
        p.tensor = s.fragment > 0 && divided(s.H, p.blocks) <= 4 * kWarps;
        p.held_forward &= !p.tensor, p.held_backward &= !p.tensor;
        p.forward_bytes = shared_bytes(s, p, false), p.backward_bytes = shared_bytes(s, p, true);
        return p;
    };
    if (is_forced) return forced.blocks > 0 ? filled(forced) : forced;
    MannPlan best;
    double least = 0;
    for (int blocks = 2; blocks <= 16; blocks *= 2) // a block alone cannot send messages
        for (int examples = 1; examples <= 8 && examples <= blocks; examples *= 2)
            for (int parts = 1; examples * parts <= blocks; parts *= 2) {
                const RowShape shape(s, parts);
                MannPlan p{blocks, examples, parts};
                const UnitShape plain(s, p);
                p.held_forward = held_forward(s, plain), p.held_backward = held_backward(s, plain.units, shape);
                p = filled(p);
                const UnitShape units(s, p);
                const bool fits = std::max(p.forward_bytes, p.backward_bytes) <= shared_limit;
                if (!fits || divided(s.N, shape.slots) != parts || (parts > 1 && s.N < parts * s.R)) continue;
                if (shape.rows * shape.columns > 80 || s.R * shape.columns > 128 || s.R > 16 ||
                    parts * s.R > kThreads || units.of_warp * examples > 32)
                    continue;
                const int64_t clusters = divided(std::max<int64_t>(s.B, 1), examples);
                const double clocks = clocks_of(s, p, units, shape) *
                                      double(divided(clusters, clusters_at_once(blocks, multiprocessors)));
                if (best.blocks == 0 || clocks < least) best = p, least = clocks;
            }
    return best;
}

} // namespace mann::cuda

// From now on the form that mann_sequence runs in, for tests and for measuring; blocks 0: chosen again, -1: not on
// clusters.
extern "C" __attribute__((visibility("default"))) void mann_cuda_plan(int blocks, int examples, int parts,
                                                                      int held_forward, int held_backward) {
    using namespace mann::cuda;
    is_forced = blocks != 0;
    forced = {std::max(blocks, 0), examples, parts, held_forward != 0, held_backward != 0};
}
// The form for these sizes, to plan [7]: blocks (0: no cluster), examples, parts, held forward and backward, bytes.
extern "C" __attribute__((visibility("default"))) void mann_cuda_planned(const int64_t *sizes, int64_t shared_limit,
                                                                         int multiprocessors, int64_t *plan) {
    using namespace mann::cuda;
    const MannSizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6] != 0, sizes[7] != 0, 4};
    const MannPlan p = mann_plan(s, shared_limit, multiprocessors);
    const int64_t found[] = {p.blocks,        p.examples,      p.parts,         p.held_forward,
                             p.held_backward, p.forward_bytes, p.backward_bytes};
    std::copy(found, found + 7, plan);
}
