// The second half of the runtime of cuda_on_cpu.h: what threads wait for each other at, and the memory that they share.
#include "cuda_on_cpu_runtime.h"

#include <string_view>

namespace mann::on_cpu {

void misaligned(const void *address, size_t alignment, const char *what) {
    fail("misaligned: " + std::string(what) + " at an address that is " +
         std::to_string(reinterpret_cast<uintptr_t>(address) % alignment) + " past a multiple of " +
         std::to_string(alignment));
}

// Barriers

namespace {

void release_block(Block &block) {
    block.arrived = 0;
    ++block.generation;
    for (Warp &warp : block.warps) {
        make_ready(warp, warp.at_barrier);
        warp.at_barrier = 0;
    }
}

void release_cluster() {
    cluster->arrived = cluster->waiting = 0;
    ++cluster->generation;
    for (Block &block : cluster->blocks)
        for (Warp &warp : block.warps) {
            make_ready(warp, warp.at_cluster);
            warp.at_cluster = 0;
        }
}

} // namespace

void block_barrier(Place place) {
    Block &block = *running->warp->block;
    const int threads =
        static_cast<int>(running->thread.block_size.x * running->thread.block_size.y * running->thread.block_size.z);
    if (block.alive != threads) fail("divergent barrier: threads of the block have ended before " + at(place));
    if (block.arrived != 0 && (block.place.line() != place.line() ||
                               std::string_view(block.place.file_name()) != std::string_view(place.file_name())))
        fail("divergent barrier: reaches " + at(place) + " while others wait at " + at(block.place));
    block.place = place;
    char *synchronised = &block.synchronised[block.generation & 1];
    sanitized_release(synchronised);
    running->warp->at_barrier |= 1u << running->thread.lane;
    if (++block.arrived == threads) release_block(block);
    wait(place);
    sanitized_acquire(synchronised);
}

int block_count(bool predicate, Place place) {
    Block &block = *running->warp->block;
    int &count = block.count[block.generation & 1];
    count += predicate;
    block_barrier(place);
    const int found = count;
    block_barrier(place);
    count = 0;
    return found;
}

void cluster_arrive(Place place) {
    if (running->arrived) fail("divergent barrier: arrives twice at the barrier of the cluster, at " + at(place));
    const int threads = static_cast<int>(cluster->fibers.size());
    if (cluster->alive != threads) fail("divergent barrier: threads of the cluster have ended before " + at(place));
    running->arrived = true;
    running->generation = cluster->generation;
    running->place = cluster->place = place;
    sanitized_release(&cluster->synchronised[cluster->generation & 1]);
    if (++cluster->arrived == threads) release_cluster();
}

void cluster_wait(Place place) {
    if (!running->arrived) fail("divergent barrier: waits for the cluster and has not arrived, at " + at(place));
    if (running->generation == cluster->generation) {
        running->warp->at_cluster |= 1u << running->thread.lane;
        ++cluster->waiting;
        wait(place);
    } else {
        pause();
    }
    running->arrived = false;
    sanitized_acquire(&cluster->synchronised[running->generation & 1]);
}

// Shared memory

// No memory is allocated here: it would count as written by the thread that runs.
char *array_of(Block &block, const void *key, size_t size) {
    size_t total = size;
    for (const Array &array : block.shared) {
        if (array.key == key) return array.data;
        total += array.key == nullptr ? 0 : array.size;
    }
    if (key != nullptr && (total > MOST_STATIC || block.shared.size() == MOST_ARRAYS))
        fail("shared memory: a block wants " + std::to_string(total) + " bytes of static arrays");
    char *data = block.memory + block.used;
    block.used += (size + 15) / 16 * 16 + BETWEEN_ARRAYS;
    sanitized_whole(data, size);
    block.shared.push_back({key, data, size});
    fill(block.shared.back());
    return data;
}

void *dynamic_shared() { return running->warp->block->shared[0].data; }

void *static_shared(const void *key, size_t size) { return array_of(*running->warp->block, key, size); }

void *of_rank(void *shared, int rank) {
    const char *address = static_cast<char *>(shared);
    if (rank < 0 || rank >= current->cluster_size)
        fail("of_rank: got rank " + std::to_string(rank) + " of a cluster of " + std::to_string(current->cluster_size));
    for (const Array &array : running->warp->block->shared)
        if (array.data <= address && address < array.data + array.size) {
            Block &other = cluster->blocks[rank];
            if (other.started && other.alive == 0)
                fail("of_rank: the block of rank " + std::to_string(rank) + " has ended");
            return array_of(other, array.key, array.size) + (address - array.data);
        }
    fail("of_rank: got a pointer that is not to shared memory of this block");
}

// Mailboxes

namespace {

void complete(Box &box) {
    if (box.pending != 0 || box.bytes != 0) return;
    ++box.phase;
    box.pending = 1;
    for (Fiber *fiber : box.waiting) make_ready(*fiber->warp, 1u << fiber->thread.lane);
    box.waiting.clear();
}

Box &box_at(const void *address) {
    const auto found = cluster->boxes.find(address);
    if (found == cluster->boxes.end()) fail("mailbox: used before it was opened");
    return found->second;
}

} // namespace

void mailbox_open(void *box, int64_t bytes) {
    check_aligned(box, 8, "mailbox");
    Box &opened = cluster->boxes[box] = Box();
    opened.pending = 0, opened.bytes = bytes;
    complete(opened);
}

void mailbox_expect(void *address, int64_t bytes, Place place) {
    Box &box = box_at(address);
    if (box.pending == 0) fail("mailbox: expects a message twice, at " + at(place));
    box.pending = 0, box.bytes += bytes;
    complete(box);
}

void mailbox_wait(const void *address, int phase, Place place) {
    Box &box = box_at(address);
    if (box.phase != phase && box.phase != phase + 1)
        fail("mailbox: waits for message " + std::to_string(phase) + " where " + std::to_string(box.phase) +
             " are there, at " + at(place));
    if (box.phase == phase) {
        box.waiting.push_back(running);
        wait(place);
    } else {
        pause();
    }
    sanitized_acquire(&box.synchronised);
}

void send(void *target, int rank, void *box, const void *data, int64_t bytes) {
    Message message{of_rank(target, rank), of_rank(box, rank), &cluster->blocks[static_cast<size_t>(rank)], bytes, {}};
    sanitized_release(&box_at(message.box).synchronised);
    std::memcpy(message.data, data, static_cast<size_t>(bytes));
    cluster->messages.push_back(message);
}

void deliver(size_t number) {
    auto &messages = cluster->messages;
    const Message message = messages[number];
    messages[number] = messages.back();
    messages.pop_back();
    std::memcpy(message.to, message.data, static_cast<size_t>(message.bytes));
    Box &box = box_at(message.box);
    box.bytes -= message.bytes;
    complete(box);
}

// Collectives of a warp

namespace {

float of_bf16(uint32_t pair, int which) { return __uint_as_float(which == 0 ? pair << 16 : pair & 0xFFFF0000u); }

// Of a TF32 number the GPU takes the upper 19 bits.
float of_tf32(uint32_t bits) { return __uint_as_float(bits & 0xFFFFE000u); }

// As tensor cores round their sums.
float toward_zero(double x) {
    const float nearest = static_cast<float>(x);
    return std::abs(double(nearest)) > std::abs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// Fragments as the PTX manual has them: lane 4 g + t holds, of the 16 rows of a, g and g + 8. Taken exactly, rounded
// once.
void multiply_fragments(Fiber *lanes, bool tf32) {
    double a[16][16] = {}, b[16][8] = {};
    for (int lane = 0; lane < WARP; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            if (tf32) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = of_tf32(lanes[lane].a[i]);
            for (int half = 0; !tf32 && half < 2; ++half)
                a[g + 8 * (i % 2)][2 * t + half + 8 * (i / 2)] = of_bf16(lanes[lane].a[i], half);
        }
        for (int i = 0; i < 2; ++i) {
            if (tf32) b[t + 4 * i][g] = of_tf32(lanes[lane].b[i]);
            for (int half = 0; !tf32 && half < 2; ++half) b[2 * t + half + 8 * i][g] = of_bf16(lanes[lane].b[i], half);
        }
    }
    for (int lane = 0; lane < WARP; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            double sum = lanes[lane].d[i];
            for (int j = 0; j < 16; ++j) sum += a[row][j] * b[j][column];
            lanes[lane].d[i] = toward_zero(sum);
        }
}

// All of `mask` are here: what each takes away.
void complete(Warp &warp, Fiber::Kind kind, unsigned mask) {
    Fiber *lanes = warp.fibers;
    if (kind == Fiber::PRODUCT || kind == Fiber::PRODUCT_TF32)
        return multiply_fragments(lanes, kind == Fiber::PRODUCT_TF32);
    if (kind == Fiber::BARRIER) ++lanes[__builtin_ctz(mask)].barriers;
    uint64_t yes = 0;
    for (int i = 0; i < WARP; ++i)
        if (mask >> i & 1) yes |= (lanes[i].value & 1) << i;
    for (int i = 0; i < WARP; ++i)
        if (mask >> i & 1) {
            const int from = lanes[i].from & (WARP - 1);
            const bool known = mask >> from & 1; // what another lane gives is undefined: NaN
            lanes[i].result = kind == Fiber::BALLOT ? yes : known ? lanes[from].value : ~0ULL;
        }
}

void wait_for_warp(Fiber::Kind kind, unsigned mask, Place place) {
    Fiber &me = *running;
    Warp &warp = *me.warp;
    if (!(mask >> me.thread.lane & 1))
        fail("collective of a warp: its mask does not name the lane that calls, at " + at(place));
    if (mask & ~warp.alive) fail("exited lane: the mask names a lane that has ended or never was, at " + at(place));
    me.kind = kind;
    me.mask = mask;
    const unsigned here = warp.in_collective & mask;
    if (here != 0) {
        const Fiber &other = warp.fibers[__builtin_ctz(here)];
        if (other.mask != mask || other.kind != kind)
            fail("collective of a warp: others of its lanes are in another one, at " + at(place) + " and " +
                 at(other.place));
    }
    warp.in_collective |= 1u << me.thread.lane;
    if ((warp.in_collective & mask) == mask) {
        complete(warp, kind, mask);
        warp.in_collective &= ~mask;
        make_ready(warp, mask);
    }
    wait(place);
}

} // namespace

void warp_barrier(unsigned mask, Place place) {
    Fiber &first = running->warp->fibers[mask == 0 ? 0 : __builtin_ctz(mask)];
    char *synchronised = &first.synchronised[first.barriers & 1];
    sanitized_release(synchronised);
    wait_for_warp(Fiber::BARRIER, mask, place);
    sanitized_acquire(synchronised);
}

uint64_t shuffle(unsigned mask, uint64_t value, int from, Place place) {
    running->value = value;
    running->from = from;
    wait_for_warp(Fiber::SHUFFLE, mask, place);
    return running->result;
}

unsigned ballot(unsigned mask, bool predicate, Place place) {
    running->value = predicate;
    wait_for_warp(Fiber::BALLOT, mask, place);
    return static_cast<unsigned>(running->result);
}

void multiply(bool tf32, float *d, const uint32_t *a, const uint32_t *b, Place place) {
    running->d = d;
    running->a = a;
    running->b = b;
    wait_for_warp(tf32 ? Fiber::PRODUCT_TF32 : Fiber::PRODUCT, ~0u, place);
}

} // namespace mann::on_cpu
