// The launches of a sequence, step by step.
#include "grid_sequence.h"

namespace mann::cuda {

namespace {

// Undoing writes rounds, and small rows would drown in what was written to them later: while the steps of a segment are
// recomputed, every so many of them the memory is set aside, to go on from there on the way back; less often where
// that would take more than kMostRestarts bytes.
constexpr int64_t kRestartEvery = 8, kMostRestarts = int64_t(2) << 30;

void *offset(void *data, int64_t numbers, int64_t bytes) {
    return data ? static_cast<char *>(data) + numbers * bytes : nullptr;
}
const void *offset(const void *data, int64_t numbers, int64_t bytes) {
    return data ? static_cast<const char *>(data) + numbers * bytes : nullptr;
}

ControllerSizes controller_sizes(const GridSizes &s, int64_t step = 0) { return {s.B, int(s.T), int(step), s.lengths}; }

// What examples have at the end and is not there yet.
class Finisher {
  public:
    void add(const FinishItem<void> &item) {
        if (item.target) all_.items[count_++] = item, most_ = std::max(most_, item.numbers);
    }
    void run(Call &call, const GridSizes &s) {
        all_.sizes = controller_sizes(s);
        const int64_t enough = divide_up(8 * call.on().multiprocessors, std::max<int64_t>(s.B, 1));
        all_.blocks = int(std::max<int64_t>(std::min(divide_up(most_, kControllerThreads), enough), 1));
        if (count_ > 0)
            call.launch(call.build("grid_finish.cu"), "finish",
                        {s.B * all_.blocks, kControllerThreads, 1, 0, count_, s.T > 0}, all_);
    }

  private:
    Finish<void> all_{};
    int64_t count_ = 0, most_ = 0;
};

// The memory going forward.
class Forward {
  public:
    Forward(Call &call, const GridSizes &s, const GridForward &a)
        : call_(call), s_(s), a_(a), o_(s.memory), narrow_(call.dtype() != call.arithmetic()),
          plan_(memory_plan(call, s.B, s.N, o_.W, o_.R, kMostForward, {a.memory, a.memory1, a.saved_memory})),
          of_write_(memory_build(call, "memory_write.cu", plan_, o_)), of_use_(use_build(call, o_)) {
        const int64_t B = s.B, N = s.N, R = o_.R;
        write_.sizes = memory_sizes(plan_, B, N, s.T, 2), write_.sizes.lengths = s.lengths, write_.head = a.head;
        write_.before.memory = a.memory, write_.before.weights = a.read_weights;
        write_.eps = s.eps, write_.decay = s.decay, write_.shared = s.shared, write_.erase_all = s.erase_all;
        write_.memory = narrow_ ? call.scratch(B * N * o_.W) : a.memory1;
        write_.logits = call.scratch(2 * B * R * N), write_.totals = call.scratch(2 * B * R * 2);
        write_.found = call.scratch(2 * B * plan_.parts() * forward_part(o_));
        write_.usage = a.usage, write_.usage1 = narrow_ ? call.scratch(B * N) : a.usage1;
        candidates_ = call.empty({B, plan_.choosers, R}, ScalarType::Int);
        write_.candidate_usage = call.scratch(B * plan_.choosers * R);
        write_.candidate_slots = out<int32_t>(candidates_), write_.choosers = plan_.choosers;
        write_.least_used = a.saved_least_used;
        use_.sizes = write_.sizes, use_.choosers = plan_.choosers, use_.chooser_slots = plan_.chooser_slots;
        use_.readers = plan_.readers, use_.logits = write_.logits, use_.found = write_.found;
        use_.totals = write_.totals, use_.usage1 = write_.usage1, use_.weights = a.read_weights1;
        use_.reads = a.reads, use_.reads_row = a.reads_row, use_.reads_at = a.reads_at;
        choose();
    }

    void step(int64_t t) {
        const bool copied = a_.saved_memory && (t + 1) % s_.checkpoint_every == 0 && t + 1 < s_.T;
        const int64_t bytes = call_.arith_bytes(), copy = t / s_.checkpoint_every * s_.B;
        write_.sizes.step = use_.sizes.step = int(t);
        write_.memory_copy = copied ? offset(a_.saved_memory, copy * s_.N * o_.W, bytes) : nullptr;
        use_.weights_copy = copied ? offset(a_.saved_read_weights, copy * o_.R * s_.N, bytes) : nullptr;
        const bool chooses = t + 1 < s_.T;
        use_.candidate_usage = chooses ? const_cast<void *>(write_.candidate_usage) : nullptr;
        use_.candidate_slots = chooses ? out<int32_t>(candidates_) : nullptr;
        launch_write(call_, of_write_, write_);
        launch_use(call_, of_use_, use_);
    }
    void set_head(const MemoryHead<void> &head) { write_.head = head; }

    void finish(Finisher &finisher) const {
        const bool some_rest = s_.lengths || s_.T == 0;
        const int64_t numbers[] = {s_.N * o_.W, s_.N};
        if (narrow_ || some_rest) {
            finisher.add(
                {a_.memory1, numbers[0], a_.memory, narrow_ ? write_.memory : nullptr, 1, nullptr, numbers[0], 0});
            finisher.add(
                {a_.usage1, numbers[1], a_.usage, narrow_ ? write_.usage1 : nullptr, 1, nullptr, numbers[1], 0});
        }
        if (some_rest) finisher.add({a_.read_weights1, o_.R * s_.N, a_.read_weights, nullptr, 0, nullptr, 0, 0});
    }

  private:
    // Of the usage before the first step.
    void choose() {
        MemoryUse<void> choose{};
        choose.sizes = write_.sizes, choose.choosers = plan_.choosers, choose.chooser_slots = plan_.chooser_slots;
        choose.usage = a_.usage, choose.candidate_usage = const_cast<void *>(write_.candidate_usage);
        choose.candidate_slots = out<int32_t>(candidates_);
        if (s_.T > 0) launch_use(call_, of_use_, choose, 1, false);
    }

    Call &call_;
    const GridSizes &s_;
    const GridForward &a_;
    const MemoryOptions &o_;
    const bool narrow_;
    const MemoryPlan plan_;
    const Build of_write_, of_use_;
    MemoryWrite<void> write_{};
    MemoryUse<void> use_{};
    Tensor candidates_;
};

// The memory going backward, a segment of steps at a time, the last one first: its steps are recomputed, then taken
// back one by one.
class Backward {
  public:
    // follows: something of this call was launched before.
    Backward(Call &call, const GridSizes &s, const GridBackward &a, bool follows)
        : call_(call), s_(s), a_(a), o_(s.memory), narrow_(call.dtype() != call.arithmetic()), follows_(follows),
          ring_(std::max<int64_t>(std::min(s.T, s.checkpoint_every), 1)),
          forward_plan_(memory_plan(call, s.B, s.N, o_.W, o_.R, kMostForward, {a.memory, a.saved_memory})),
          plan_(memory_plan(call, s.B, s.N, o_.W, o_.R, kMostBackward, {a.memory, a.dmemory1, a.dmemory})),
          of_write_(memory_build(call, "memory_write.cu", forward_plan_, o_)), of_use_(use_build(call, o_)),
          of_backward_(memory_build(call, "memory_backward.cu", plan_, o_)) {
        const int64_t B = s.B, N = s.N, R = o_.R, W = o_.W, memory = B * N * W;
        while ((ring_ - 1) / restart_every_ * memory * call.arith_bytes() > kMostRestarts) restart_every_ *= 2;
        restarts_ = call.scratch((ring_ - 1) / restart_every_ * memory);
        write_.sizes = memory_sizes(forward_plan_, B, N, s.T, ring_), write_.sizes.lengths = s.lengths;
        write_.head = a.head, write_.eps = s.eps, write_.shared = s.shared, write_.erase_all = s.erase_all;
        write_.memory = call.scratch(memory), write_.logits = call.scratch(ring_ * B * R * N);
        write_.totals = call.scratch(ring_ * B * R * 2), write_.sum_parts = 1;
        write_.found = call.scratch(ring_ * B * forward_plan_.parts() * forward_part(o_));
        write_.least_used = const_cast<int32_t *>(a.saved_least_used); // only read: there are no candidates
        write_.overwritten = call.scratch(ring_ * B * R * W);
        use_.sizes = write_.sizes, use_.chooser_slots = plan_.chooser_slots, use_.readers = plan_.readers;
        use_.logits = write_.logits, use_.found = write_.found, use_.totals = write_.totals;
        use_.reads_copy = call.scratch(ring_ * B * R * W), use_.dweights = a.dread_weights1;
        if (use_.dweights) use_.choosers = plan_.choosers, use_.means = call.scratch(B * plan_.choosers * R);
        back_.sizes = memory_sizes(plan_, B, N, s.T, ring_), back_.sizes.lengths = s.lengths, back_.head = a.head;
        back_.eps = s.eps, back_.shared = s.shared, back_.erase_all = s.erase_all;
        back_.memory = write_.memory, back_.dmemory1 = a.dmemory1;
        back_.dmemory = narrow_ ? call.scratch(memory) : a.dmemory;
        back_.logits = write_.logits, back_.totals = write_.totals, back_.dweights1 = a.dread_weights1;
        back_.dweights = narrow_ ? call.scratch(B * R * N) : a.dread_weights;
        back_.dreads = a.dreads, back_.dreads_row = a.dreads_row, back_.dreads_at = a.dreads_at;
        back_.reads = use_.reads_copy, back_.first_means = use_.means, back_.choosers = use_.choosers;
        back_.means = call.scratch(2 * B * plan_.parts() * R);
        back_.found = call.scratch(ring_ * B * plan_.parts() * backward_part(o_));
        back_.least_used = a.saved_least_used, back_.overwritten = write_.overwritten;
        sum_.sizes = back_.sizes, sum_.head = a.head, sum_.found = back_.found, sum_.dhead = a.dhead;
        sum_.dkey = a.dkey, sum_.dgate = a.dgate, sum_.dbeta = a.dbeta, sum_.dadd = a.dadd;
    }

    // What reaches the reads from the step after, beside dreads.
    void carry(const void *carried, int64_t parts, int64_t row, int64_t at, const void *dreads1) {
        back_.carried = carried, back_.carried_parts = int(parts), back_.carried_row = row, back_.carried_at = at;
        back_.dreads1 = dreads1;
    }
    void squash(bool squash) { sum_.squash = squash; }

    void recompute(int64_t start, int64_t stop) {
        start_ = start, stop_ = stop;
        const int64_t bytes = call_.arith_bytes(), copy = (start / s_.checkpoint_every - 1) * s_.B;
        MemoryStart<void> before{};
        before.start = int(start);
        if (start == 0) before.memory = a_.memory, before.weights = a_.read_weights;
        else {
            before.memory_t = offset(a_.saved_memory, copy * s_.N * o_.W, bytes);
            before.weights_t = offset(a_.saved_read_weights, copy * o_.R * s_.N, bytes);
        }
        write_.before = back_.before = before;
        for (int64_t t = start; t < stop; ++t) {
            write_.sizes.step = int(t);
            write_.memory_copy = set_aside(t) ? restart_of(t) : nullptr;
            launch_write(call_, of_write_, write_, follows_);
            follows_ = true;
        }
        use_.sizes.step = int(start);
        launch_use(call_, of_use_, use_, stop - start);
    }
    void take_back(int64_t t) {
        back_.sizes.step = int(t);
        back_.memory_after = set_aside(t) ? restart_of(t) : write_.memory;
        back_.undo = t > start_ && !set_aside(t - 1);
        if (narrow_ && t == 0) back_.dmemory_out = a_.dmemory, back_.dweights_out = a_.dread_weights;
        launch_backward(call_, of_backward_, back_);
    }
    // The gradients of the heads of these steps.
    void give(int64_t start, int64_t stop) {
        sum_.sizes.step = int(start);
        launch_sum(call_, of_backward_, o_, sum_, stop - start);
    }

    void finish(Finisher &finisher) const {
        if (!s_.lengths && s_.T > 0) return;
        finisher.add({a_.dmemory, s_.N * o_.W, a_.dmemory1, nullptr, 0, nullptr, 0, 0});
        finisher.add({a_.dread_weights, o_.R * s_.N, a_.dread_weights1, nullptr, 0, nullptr, 0, 0});
    }

  private:
    bool set_aside(int64_t t) const { return (t - start_ + 1) % restart_every_ == 0 && t + 1 < stop_; }
    void *restart_of(int64_t t) const {
        return offset(restarts_, ((t - start_ + 1) / restart_every_ - 1) * s_.B * s_.N * o_.W, call_.arith_bytes());
    }

    Call &call_;
    const GridSizes &s_;
    const GridBackward &a_;
    const MemoryOptions &o_;
    const bool narrow_;
    bool follows_;
    const int64_t ring_;
    const MemoryPlan forward_plan_, plan_;
    const Build of_write_, of_use_, of_backward_;
    int64_t restart_every_ = kRestartEvery, start_ = 0, stop_ = 0;
    void *restarts_ = nullptr;
    MemoryWrite<void> write_{};
    MemoryUse<void> use_{};
    MemoryBackward<void> back_{};
    MemorySum<void> sum_{};
};

// Calls f(start, stop) for every segment, the last one first.
template <typename F> void for_segments(const GridSizes &s, F &&f) {
    for (int64_t stop = s.T; stop > 0;) {
        const int64_t start = (stop - 1) / s.checkpoint_every * s.checkpoint_every;
        f(start, stop);
        stop = start;
    }
}

Build controller_build(const Call &call, const GridSizes &s, const GridController &c) {
    Build build = call.build("grid_controller.cu");
    build.set("MANN_H", c.H).set("MANN_W", s.memory.W).set("MANN_R", s.memory.R);
    return build.set("MANN_BETA", s.memory.beta).set("MANN_ADD", s.memory.add).set("MANN_SQUASH", c.squash);
}
void launch_heads(Call &call, const Build &build, const GridSizes &s, const HeadRows<void> &a, bool follows) {
    const int64_t blocks = divide_up(a.count, kExamples), rows = divide_up(s.memory.head(), kControllerWarps);
    call.launch(build, "head_rows", {blocks, kControllerThreads, 1, 0, rows, follows}, a);
}

} // namespace

void grid_lrua_forward(Call &call, const GridSizes &s, const GridForward &a) {
    Forward forward(call, s, a);
    for (int64_t t = 0; t < s.T; ++t) forward.step(t);
    Finisher finisher;
    forward.finish(finisher);
    finisher.run(call, s);
}

void grid_lrua_backward(Call &call, const GridSizes &s, const GridBackward &a) {
    Backward backward(call, s, a, false);
    for_segments(s, [&](int64_t start, int64_t stop) {
        backward.recompute(start, stop);
        for (int64_t t = stop - 1; t >= start; --t) backward.take_back(t);
        backward.give(start, stop);
    });
    Finisher finisher;
    backward.finish(finisher);
    finisher.run(call, s);
}

void grid_mann_forward(Call &call, const GridSizes &s, GridForward a, const GridController &c) {
    const MemoryOptions &o = s.memory;
    const int64_t B = s.B, H = c.H, words = o.R * o.W, bytes = call.arith_bytes();
    const Build build = controller_build(call, s, c);
    HeadRows<void> heads{};
    heads.count = B, heads.output = c.output, heads.weight_head = c.weight_head, heads.bias_head = c.bias_head;
    heads.row = call.scratch(B * o.head());
    a.head = {}, a.head.row = heads.row, a.head.head = o.head();
    a.reads = c.output, a.reads_row = H + words, a.reads_at = H;
    LstmStep<void> lstm{};
    lstm.gates_x = c.gates_x, lstm.weight_hh = c.weight_hh, lstm.h = c.h, lstm.reads = c.reads, lstm.c0 = c.c;
    lstm.output = c.output, lstm.c = call.scratch(B * H), lstm.saved_gates = c.saved_gates;
    Forward forward(call, s, a);
    for (int64_t t = 0; t < s.T; ++t) {
        const bool copied = c.saved_c && (t + 1) % s.checkpoint_every == 0 && t + 1 < s.T;
        lstm.sizes = controller_sizes(s, t);
        lstm.saved_c = copied ? offset(c.saved_c, t / s.checkpoint_every * B * H, bytes) : nullptr;
        call.launch(build, "lstm_step", {divide_up(H, kUnits), kControllerThreads, 1, 0, divide_up(B, kExamples), true},
                    lstm);
        heads.first = a.head.first = t * B;
        launch_heads(call, build, s, heads, true);
        forward.set_head(a.head);
        forward.step(t);
    }
    Finisher finisher;
    forward.finish(finisher);
    finisher.add({c.h1, H, c.h, nullptr, 0, c.output, H + words, 0});
    finisher.add({c.c1, H, c.c, lstm.c, 1, nullptr, H, 0});
    finisher.add({c.reads1, words, c.reads, nullptr, 0, c.output, H + words, H});
    finisher.run(call, s);
}

void grid_mann_backward(Call &call, const GridSizes &s, GridBackward a, const GridController &c) {
    const MemoryOptions &o = s.memory;
    const int64_t B = s.B, H = c.H, words = o.R * o.W, K = H + words, bytes = call.arith_bytes();
    const Build build = controller_build(call, s, c);
    HeadRows<void> heads{};
    heads.count = s.T * B, heads.output = c.output_in, heads.weight_head = c.weight_head, heads.bias_head = c.bias_head;
    heads.row = call.scratch(s.T * B * o.head());
    launch_heads(call, build, s, heads, false);
    a.head = {}, a.head.row = heads.row, a.head.head = o.head();
    a.dreads = c.doutput, a.dreads_row = K, a.dreads_at = H;
    const int64_t columns = divide_up(K, 32), most = divide_up(4 * H, kControllerWarps);
    const int64_t parts = std::max<int64_t>(std::min({call.on().multiprocessors / columns, most, int64_t(16)}), 1);
    CellsToRecompute<void> cells{};
    cells.saved_gates = c.saved_gates, cells.cells = call.scratch(std::min(s.T, s.checkpoint_every) * B * H);
    LstmBackward<void> lstm{};
    lstm.doutput = c.doutput, lstm.dhead = a.dhead, lstm.weight_head = c.weight_head, lstm.dh1 = c.dh1;
    lstm.dc1 = c.dc1, lstm.carried = call.scratch(parts * B * K), lstm.parts = int(parts);
    lstm.saved_gates = c.saved_gates, lstm.cells = cells.cells, lstm.dc = call.scratch(B * H), lstm.dgates = c.dgates;
    StateBackward<void> state{};
    state.dgates = c.dgates, state.weight_hh = c.weight_hh, state.parts = int(parts);
    state.carried = const_cast<void *>(lstm.carried);
    Backward backward(call, s, a, true);
    backward.carry(lstm.carried, parts, K, H, c.dreads1);
    backward.squash(c.squash);
    const int64_t groups = divide_up(B, kExamples);
    for_segments(s, [&](int64_t start, int64_t stop) {
        const void *saved = offset(c.saved_c, (start / s.checkpoint_every - 1) * B * H, bytes);
        cells.sizes = controller_sizes(s), cells.start = lstm.start = int(start), cells.stop = int(stop);
        cells.c0 = c.c, cells.saved_c = start == 0 ? nullptr : saved;
        call.launch(build, "recompute_cells", {divide_up(B * H, kControllerThreads), kControllerThreads, 1, 0, 1, true},
                    cells);
        backward.recompute(start, stop);
        for (int64_t t = stop - 1; t >= start; --t) {
            lstm.sizes = state.sizes = controller_sizes(s, t);
            backward.take_back(t);
            backward.give(t, t + 1);
            call.launch(build, "lstm_backward", {divide_up(H, 32), kControllerThreads, 1, 0, groups, true}, lstm);
            call.launch(build, "state_backward", {columns * parts, kControllerThreads, 1, 0, groups, true}, state);
        }
    });
    Finisher finisher;
    backward.finish(finisher);
    finisher.add({c.dh, H, c.dh1, lstm.carried, parts, nullptr, K, 0});
    finisher.add({c.dc, H, c.dc1, lstm.dc, 1, nullptr, H, 0});
    finisher.add({c.dreads, words, c.dreads1, lstm.carried, parts, nullptr, K, H});
    finisher.run(call, s);
}

} // namespace mann::cuda
