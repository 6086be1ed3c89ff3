// The first half of the runtime of cuda_on_cpu.h: fibers, the schedule, launches.
//
// Compiled without sanitizers, whatever the kernels are compiled with: what it does itself is no business of theirs. It
// tells AddressSanitizer (MANN_ASAN) which stack is in use and which memory is gone, and ThreadSanitizer (MANN_TSAN)
// which fiber runs and what orders two fibers: __syncthreads, __syncwarp and the barrier of a cluster, and nothing
// else. A shuffle does not.
#include "cuda_on_cpu_runtime.h"

#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>

#ifndef __x86_64__
#error "switch_stack is written for x86-64"
#endif
// Saves what a function must keep, and the stack pointer; then goes on where another fiber did the same.
asm(R"(
    .text
    .hidden mann_switch_stack
    .globl mann_switch_stack
    .type mann_switch_stack, @function
mann_switch_stack:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
    .size mann_switch_stack, .-mann_switch_stack
)");
extern "C" void mann_switch_stack(void **save, void *load);

namespace mann::on_cpu {

Thread *current = nullptr;
Fiber *running = nullptr;
Cluster *cluster = nullptr;

namespace {

constexpr size_t PAGE = 4096;

// All launches come one after the other.
std::mutex mutex;
uint64_t random_state = 1;
Fiber host, *previous = nullptr;
const std::function<void()> *body = nullptr;
const char *kernel_name = "";
std::exception_ptr error;
std::vector<Warp *> ready[2]; // those that may run; of slow blocks, which run when no other can
unsigned patience = 1;        // how many times in a row the same warp runs, about
char ends_of_threads = 0;

// Memory that kernels of a call write to. While a cluster is ahead of the launch that it follows, it is NaN.
struct Written {
    char *data;
    std::vector<char> kept;
};
std::vector<Written> written;
bool early = false, waited = false; // the latter: some thread, for the launch that this one follows

unsigned draw(unsigned below) { // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return static_cast<unsigned>(((random_state * 0x2545F4914F6CDD1DULL) >> 32) * below >> 32);
}

std::string name_of(const Thread &thread) {
    const auto three = [](auto v) {
        return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
    };
    return "thread " + three(thread.thread) + " of block " + three(thread.block);
}

void no_longer_ready(Warp &warp) {
    auto &list = ready[warp.block->slow];
    list.back()->position = warp.position;
    list[warp.position] = list.back();
    list.pop_back();
}

// One of the threads that may run, taken from the list; the host where there is none. Now and then a message arrives.
Fiber *choose() {
    auto &messages = cluster->messages;
    while (!messages.empty() && ((ready[0].empty() && ready[1].empty()) || draw(8) == 0))
        deliver(draw(static_cast<unsigned>(messages.size())));
    Warp *warp = running->warp;
    if (warp == nullptr || warp->ready == 0 || draw(patience) == 0) {
        const auto &list = ready[ready[0].empty()];
        if (list.empty()) return &host;
        warp = list[draw(static_cast<unsigned>(list.size()))];
    }
    const unsigned turn = draw(WARP);
    const unsigned turned = warp->ready >> turn | warp->ready << ((WARP - turn) % WARP);
    const unsigned lane = (__builtin_ctz(turned) + turn) % WARP;
    warp->ready &= ~(1u << lane);
    if (warp->ready == 0) no_longer_ready(*warp);
    return &warp->fibers[lane];
}

void start(Block &block) {
    block.started = true;
    for (const Array &array : block.shared) fill(array);
}

// What the fiber that goes on does first.
void arrived_from(Fiber *from) {
    sanitized_after_switch(running->sanitized, from->stack, from->stack_size);
    current = running == &host ? nullptr : &running->thread;
    if (running != &host && !running->warp->block->started) start(*running->warp->block);
}

void switch_to(Fiber *next) {
    if (next == running) return;
    Fiber *me = running;
    previous = me;
    running = next;
    sanitized_before_switch(me->sanitized, me->ended, next->sanitized, next->stack, next->stack_size);
    mann_switch_stack(&me->stack_pointer, next->stack_pointer);
    arrived_from(previous);
}

} // namespace

std::string at(Place place) { return std::string(place.file_name()) + ":" + std::to_string(place.line()); }

void fail(const std::string &what) {
    const std::string who = current == nullptr ? "launch" : name_of(*current);
    throw std::runtime_error("CUDA on the CPU: " + std::string(kernel_name) + ": " + who + ": " + what);
}

// Every byte 0xFF, which is NaN; not by memset, which sanitizers watch.
void fill(const Array &array) {
    volatile char *data = array.data;
    for (size_t i = 0; i < array.size; ++i) data[i] = static_cast<char>(0xFF);
}

void make_ready(Warp &warp, unsigned lanes) {
    auto &list = ready[warp.block->slow];
    if (warp.ready == 0 && lanes != 0) {
        warp.position = static_cast<int>(list.size());
        list.push_back(&warp);
    }
    warp.ready |= lanes;
}

void wait(Place place) {
    running->place = place;
    switch_to(choose());
}
void pause() {
    make_ready(*running->warp, 1u << running->thread.lane);
    switch_to(choose());
}

void may_be_written(void *data, int64_t bytes) {
    if (bytes > 0) written.push_back({static_cast<char *>(data), std::vector<char>(size_t(bytes))});
}
void new_call() { written.clear(); }

namespace {

void go_ahead() {
    cluster->ahead = true;
    for (Written &some : written) {
        std::copy_n(some.data, some.kept.size(), some.kept.data());
        fill({nullptr, some.data, some.kept.size()});
    }
}
// The launch before has ended: what it wrote is there.
void no_longer_ahead() {
    cluster->ahead = false;
    for (Written &some : written) std::copy(some.kept.begin(), some.kept.end(), some.data);
    for (Fiber &fiber : cluster->fibers)
        if (fiber.ahead) fiber.ahead = false, make_ready(*fiber.warp, 1u << fiber.thread.lane);
}

} // namespace

bool is_ahead() { return cluster->ahead; }
void wait_for_previous(Place place) {
    waited = true;
    if (!cluster->ahead) return;
    if (++cluster->at_previous == cluster->alive) return no_longer_ahead();
    running->ahead = true;
    wait(place);
}

namespace {

// Everything that a thread of a GPU may not leave undone.
void check_end(const Fiber &me) {
    const Warp &warp = *me.warp;
    for (int i = 0; i < WARP; ++i)
        if (warp.in_collective >> i & 1 && warp.fibers[i].mask >> me.thread.lane & 1)
            fail("exited lane: ends while others of its warp wait for it at " + at(warp.fibers[i].place));
    if (warp.block->arrived != 0) fail("divergent barrier: ends while others wait at " + at(warp.block->place));
    if (me.arrived) fail("divergent barrier: ends between cluster_arrive and cluster_wait at " + at(me.place));
    if (cluster->waiting != 0) fail("divergent barrier: ends while others wait at " + at(cluster->place));
    if (!me.thread.copies.empty()) fail("asynchronous copies that nobody waited for");
}

void end_block(Block &block) {
    for (const Message &message : cluster->messages)
        if (message.block == &block) fail("ends before a message that was sent to it is there");
    for (const Array &array : block.shared) {
        fill(array);
        sanitized_gone(array.data, array.size);
    }
}

void run_thread() {
    arrived_from(previous);
    try {
        (*body)();
        check_end(*running);
    } catch (...) {
        error = std::current_exception();
    }
    Warp &warp = *running->warp;
    warp.alive &= ~(1u << running->thread.lane);
    if (--cluster->alive == cluster->at_previous && cluster->ahead) no_longer_ahead();
    try {
        if (--warp.block->alive == 0 && !error) end_block(*warp.block);
    } catch (...) {
        error = std::current_exception();
    }
    running->ended = true;
    sanitized_release(&ends_of_threads);
    switch_to(error ? &host : choose());
    std::abort();
}

// Launches

// Stacks of the threads that run at once, and what lies below each to stop it.
class Stacks {
  public:
    char *at(size_t number) {
        while (stacks.size() <= number) {
            char *low = map(STACK + PAGE);
            mprotect(low, PAGE, PROT_NONE);
            stacks.push_back(low + PAGE);
        }
        return stacks[number];
    }
    void clear() {
        for (char *stack : stacks) munmap(stack - PAGE, STACK + PAGE);
        stacks.clear();
    }

  private:
    std::vector<char *> stacks;
} stacks;

void set_up_fiber(Fiber &fiber, Warp &warp, size_t number) {
    char *stack = stacks.at(number);
    fiber.warp = &warp;
    fiber.stack = stack;
    // Tops at different distances from a page, or all of them would want the same places of the cache.
    void **top = reinterpret_cast<void **>(stack + STACK - number % 64 * 320) - 2;
    *--top = nullptr; // where run_thread would return to
    *--top = reinterpret_cast<void *>(run_thread);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.stack_pointer = top;
    sanitized_start(fiber.sanitized, stack, STACK);
}

uint3 place_of(size_t number, dim3 size) {
    const size_t row = number / size.x;
    return {static_cast<unsigned>(number % size.x), static_cast<unsigned>(row % size.y),
            static_cast<unsigned>(row / size.y)};
}

void set_up_block(Block &block, int rank, uint3 where, dim3 grid, dim3 size, size_t shared) {
    const int threads = block.alive;
    block.memory_size = shared + MOST_STATIC + MOST_ARRAYS * (BETWEEN_ARRAYS + 16);
    block.memory = map(block.memory_size);
    sanitized_gone(block.memory, block.memory_size);
    block.used = BETWEEN_ARRAYS;
    block.shared.reserve(MOST_ARRAYS);
    array_of(block, nullptr, shared);
    block.warps.resize((threads + WARP - 1) / WARP);
    for (int i = 0; i < threads; ++i) {
        const size_t number = static_cast<size_t>(rank) * threads + i;
        Warp &warp = block.warps[i / WARP];
        Fiber &fiber = cluster->fibers[number];
        if (i % WARP == 0) warp.block = &block, warp.fibers = &fiber;
        warp.alive |= 1u << i % WARP;
        Thread &thread = fiber.thread;
        thread.thread = place_of(i, size);
        thread.block = where;
        thread.block_size = size;
        thread.grid = grid;
        thread.lane = i % WARP;
        thread.cluster_rank = rank;
        thread.cluster_size = static_cast<int>(cluster->blocks.size());
        set_up_fiber(fiber, warp, number);
    }
    for (Warp &warp : block.warps) make_ready(warp, warp.alive);
}

std::string who_waits() {
    std::string text = "deadlock: ";
    for (const Block &block : cluster->blocks)
        for (const Warp &warp : block.warps)
            if (warp.alive != 0) {
                const Fiber &first = warp.fibers[__builtin_ctz(warp.alive)];
                text += name_of(first.thread) + " waits at " + at(first.place) + "; ";
                break;
            }
    return text;
}

// The blocks from number `first` on, one cluster of them.
void run_cluster(Cluster &mine, size_t first, int size, dim3 grid, dim3 block, size_t shared, bool ahead) {
    const int threads = static_cast<int>(block.x * block.y * block.z);
    cluster = &mine;
    mine.blocks.resize(size);
    mine.fibers.resize(static_cast<size_t>(size) * threads);
    mine.alive = size * threads;
    patience = 1u << draw(6);
    const int slow = draw(2) != 0 ? static_cast<int>(draw(size)) : size; // one block after all others, or none
    for (auto &list : ready) {
        list.clear();
        list.reserve(mine.fibers.size());
    }
    for (int rank = 0; rank < size; ++rank) {
        mine.blocks[rank].cluster = &mine;
        mine.blocks[rank].alive = threads;
        mine.blocks[rank].slow = rank == slow;
        set_up_block(mine.blocks[rank], rank, place_of(first + rank, grid), grid, block, shared);
    }
    if (ahead) go_ahead();
    switch_to(choose());
    if (mine.ahead) no_longer_ahead();
    if (!error && mine.alive != 0)
        error = std::make_exception_ptr(
            std::runtime_error("CUDA on the CPU: " + std::string(kernel_name) + ": " + who_waits()));
    if (SEPARATE_CLUSTERS) stacks.clear();
}

} // namespace

void launch(const char *name, dim3 grid, dim3 block, int cluster_blocks, size_t shared,
            const std::function<void()> &kernel, bool follows) {
    const std::lock_guard<std::mutex> lock(mutex);
    kernel_name = name;
    const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
    const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
    if (threads == 0 || threads > 1024) fail("got blocks of " + std::to_string(threads) + " threads, want 1 to 1024");
    if (blocks == 0 || grid.y > 65535 || grid.z > 65535) fail("got a grid without blocks, or one too large");
    if (cluster_blocks < 1 || cluster_blocks > 16 || grid.x % cluster_blocks != 0)
        fail("got clusters of " + std::to_string(cluster_blocks) + " blocks in a grid of " + std::to_string(grid.x));
    if (shared > MOST_SHARED) fail("got " + std::to_string(shared) + " bytes of shared memory");
    body = &kernel;
    error = nullptr;
    waited = false;
    running = &host;
    sanitized_host(host.sanitized);
    std::vector<size_t> order(blocks / cluster_blocks);
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(static_cast<unsigned>(i))]);
    std::vector<std::unique_ptr<Cluster>> clusters;
    for (size_t number : order)
        if (!error) {
            clusters.push_back(std::make_unique<Cluster>());
            run_cluster(*clusters.back(), number * cluster_blocks, cluster_blocks, grid, block, shared,
                        early && follows);
            if (!SEPARATE_CLUSTERS) clusters.clear();
        }
    sanitized_acquire(&ends_of_threads);
    if (error) std::rethrow_exception(error);
    if (follows && !waited) fail("never waits for the launch that it follows");
}

} // namespace mann::on_cpu

// From now on a launch that follows another starts before that has written anything (1), or after it has ended (0).
extern "C" __attribute__((visibility("default"))) void mann_cuda_on_cpu_early(int on) { mann::on_cpu::early = on != 0; }

// The schedules of the launches that follow come from `seed`.
extern "C" __attribute__((visibility("default"))) void mann_cuda_on_cpu_seed(unsigned seed) {
    mann::on_cpu::random_state = (seed + 1) * 0x9E3779B97F4A7C15ULL;
}
