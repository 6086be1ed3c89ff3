// What the two halves of the runtime of cuda_on_cpu.h share: the threads of a cluster, and who of them may run.
#pragma once

#include "cuda_on_cpu.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include "cuda_on_cpu_sanitizers.h"

#include <map>
#include <string>
#include <sys/mman.h>

namespace mann::on_cpu {

constexpr size_t STACK = 64 * 1024;
constexpr size_t MOST_SHARED = 232448, MOST_STATIC = 48 * 1024;
constexpr size_t MOST_ARRAYS = 64, BETWEEN_ARRAYS = 64;
constexpr int WARP = 32;

struct Block;
struct Cluster;

struct Fiber {
    Thread thread;
    struct Warp *warp = nullptr;
    void *stack_pointer = nullptr;
    char *stack = nullptr;
    size_t stack_size = STACK;
    Sanitized sanitized;
    Place place; // where it waits
    bool ended = false, arrived = false;
    bool ahead = false;      // waits for the launch that its own follows
    unsigned generation = 0; // of the cluster barrier that it arrived at
    // What it brings to a collective of its warp, and takes from it.
    enum Kind { BARRIER, SHUFFLE, BALLOT, PRODUCT, PRODUCT_TF32 } kind = BARRIER;
    unsigned mask = 0;
    int from = 0;
    uint64_t value = 0, result = 0;
    float *d = nullptr;
    const uint32_t *a = nullptr, *b = nullptr;
    unsigned barriers = 0; // of the warp, of which it was the first lane
    char synchronised[2] = {0, 0};
};

// One bit for each thread of the warp: those that may run, that wait, that have not ended.
struct Warp {
    Block *block = nullptr;
    Fiber *fibers = nullptr; // of its threads
    unsigned ready = 0, in_collective = 0, at_barrier = 0, at_cluster = 0, alive = 0;
    int position = -1; // in the list of warps that may run
};

struct Array {
    const void *key;
    char *data;
    size_t size;
};

struct Block {
    Cluster *cluster = nullptr;
    std::vector<Warp> warps;
    std::vector<Array> shared; // the dynamic one first, by the key null
    char *memory = nullptr;    // where they lie, one after the other
    size_t memory_size = 0, used = 0;
    int alive = 0, arrived = 0, slow = 0, count[2] = {0, 0};
    bool started = false;
    unsigned generation = 0;
    Place place;
    char synchronised[2] = {0, 0};
};

inline char *map(size_t size) {
    void *at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char *>(at);
}

// What a mailbox counts, as an mbarrier does: who has still to say how many bytes come, and bytes still to come.
struct Box {
    int64_t pending = 1, bytes = 0;
    int phase = 0; // messages that are there
    std::vector<Fiber *> waiting;
    char synchronised = 0;
};
struct Message {
    void *to, *box;
    Block *block;
    int64_t bytes;
    char data[32];
};

struct Cluster {
    ~Cluster() {
        for (Fiber &fiber : fibers) sanitized_end(fiber.sanitized);
        for (Block &block : blocks) {
            sanitized_whole(block.memory, block.memory_size);
            munmap(block.memory, block.memory_size);
        }
    }
    std::vector<Block> blocks;
    std::vector<Fiber> fibers;
    int alive = 0, arrived = 0, waiting = 0;
    bool ahead = false;  // of the launch that it follows
    int at_previous = 0; // threads that wait for that
    unsigned generation = 0;
    Place place;
    char synchronised[2] = {0, 0};
    std::map<const void *, Box> boxes;
    std::vector<Message> messages; // that are on their way
};

extern Fiber *running;   // the host, or a thread
extern Cluster *cluster; // that runs

[[noreturn]] void fail(const std::string &what);
std::string at(Place place);

void make_ready(Warp &warp, unsigned lanes);
void wait(Place place); // others run, until this thread is ready and drawn
void pause();           // others may run

void deliver(size_t number); // one of the messages

void fill(const Array &array);
char *array_of(Block &block, const void *key, size_t size); // made where there is none of this name

} // namespace mann::on_cpu
