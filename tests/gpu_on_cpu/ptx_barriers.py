"""Barriers of the PTX machine: of a block, of a cluster; who of a cluster has come how far, and what that orders."""

import numpy as np
from ptx import PTXError
from ptx_memory import CLUSTER_SHIFT, RANK_SHIFT, WARP_BITS, Shadow, SharedMemory, parts_of
from ptx_ops import flags_of, operation, put

SEVERAL = -2  # in place of a program


class Barriers:
    """Where the threads of a wave wait.

    `half` counts, for each thread, the halves of cluster barriers that it came through: it is odd between the two.
    """

    def __init__(self, wave):
        self.wave, self.waiting = wave, {}  # waiting: block of instructions that follows -> [(instruction, mask)]
        self.half = np.zeros(wave.lanes, np.int64)

    def block(self, instruction, following):
        """What bar.sync does: a function of the mask that gives ((block, mask), ...) to go on with."""
        wave = self.wave
        sync = "sync" in instruction.modifiers and "red" not in instruction.modifiers
        numbers = instruction.operands
        if not sync or not numbers or (len(numbers) > 1 and numbers[1] != wave.machine.threads):
            raise instruction.error("a barrier of other than all threads")

        def arrive(mask):
            if mask is None:
                wave.epoch += 1
                wave.stamp()
                wave.stats.barriers += wave.count
                return ((following, None),)
            self.waiting.setdefault(following, []).append((instruction, mask))
            return ()

        return arrive

    def arrive_at_cluster(self, instruction, mask):
        lanes = slice(None) if mask is None else mask
        if (self.half[lanes] % 2).any():
            raise instruction.error("divergent barrier: arrives twice at the barrier of the cluster")
        self.half[lanes] += 1
        self.wave.stamp()

    def cluster(self, instruction, following):
        """What barrier.cluster.wait does."""
        if not {"wait", "acquire", "aligned", "cluster"} >= set(instruction.modifiers):
            raise instruction.error("unknown modifiers")

        def wait(mask):
            lanes = slice(None) if mask is None else mask
            if not (self.half[lanes] % 2).all():
                raise instruction.error("divergent barrier: waits for the cluster and has not arrived")
            if self._complete()[lanes].all():
                return ((following, self._pass(mask)),)
            self.waiting.setdefault(following, []).append((instruction, mask))
            return ()

        return wait

    def _complete(self):
        """Whether all threads of its cluster have arrived where a thread has."""
        return self.half <= self._slowest()

    def _slowest(self):
        clusters = self.half.reshape(-1, self.wave.machine.threads * self.wave.machine.cluster)
        return np.repeat(clusters.min(axis=1), clusters.shape[1])

    def _pass(self, mask):
        lanes = slice(None) if mask is None else mask
        self.half[lanes] += 1
        self.wave.epoch[lanes] += 1
        self.wave.stamp()
        return mask

    def release(self):
        """All threads that are left wait at barriers: let go on those whose barrier is complete."""
        wave, here, complete = self.wave, np.zeros(self.wave.count, np.int64), self._complete()
        ready, left = {}, {}
        for following, arrivals in self.waiting.items():
            instruction, mask = arrivals[0][0], np.any([mask for _, mask in arrivals], axis=0)
            programs = np.unique(wave.program[mask])
            if here[programs].any():
                raise instruction.error("divergent barrier: threads of one program wait at different ones")
            here[programs] += 1
            if "cluster" in instruction.modifiers:
                rest = mask & ~complete
                if rest.any():
                    left[following] = [(instruction, rest)]
                    self._none_has_ended(instruction, rest, wave.machine.cluster)
                mask = self._pass(mask & complete)
            else:
                self._none_has_ended(instruction, mask, 1)
                wave.epoch[mask] += 1
                wave.stats.barriers += len(programs)
            if mask.any():
                ready[following] = None if mask.all() else mask
        if not ready:
            raise next(iter(left.values()))[0][0].error("deadlock: others of the cluster never arrive")
        self.waiting = left
        wave.stamp()
        return ready

    def _none_has_ended(self, instruction, mask, together):
        """Of the programs, `together` of them, whose threads in `mask` wait."""
        if np.isin(self.wave.program[self.wave.gone] // together, self.wave.program[mask] // together).any():
            raise instruction.error("divergent barrier: threads of the program or its cluster have ended before it")

    def of_clusters(self):
        """How many barriers all clusters came through together."""
        return int(self._slowest()[:: self.wave.machine.threads * self.wave.machine.cluster].sum()) // 2

    def ended(self):
        """Which programs have no thread left, or None if all have some."""
        gone = self.wave.gone
        return gone.reshape(self.wave.count, -1).all(axis=1) if gone.any() else None


class ClusterShadow(Shadow):
    """Who touched an element of shared memory that all blocks of a cluster reach."""

    def __init__(self, size, programs):
        super().__init__(size, 1)
        self.count, self.who = programs, {}  # kind -> the program of each element since the last barrier, or SEVERAL

    def clashes(self, other, at, stamps):
        if other not in self.last:
            return np.zeros(1, bool)
        last, who = self.last[other][at], self.who[other][at]
        (then, epoch, program), (now, my_epoch, mine) = parts_of(last, self.count), parts_of(stamps, self.count)
        together = epoch == my_epoch
        # What a thread does between the halves of a barrier, the barrier does not order before what others do after it.
        together |= (my_epoch - epoch == 1) & (now - then == 1) & (then % 2 == 1)
        own = (program == mine) & together & ((last ^ stamps) & ((1 << WARP_BITS) - 1) != 0)
        return (last >= 0) & (own | (near(then, now) & (who != mine)))

    def _note(self, kind, at, stamps):
        if kind not in self.who:
            self.who[kind] = np.full(self.size, -1, np.int32)
        last, table = self.last[kind][at], self.who[kind]
        super()._note(kind, at, stamps)
        (then, _, _), (now, _, mine) = parts_of(last, self.count), parts_of(stamps, self.count)
        several = (last >= 0) & near(then, now) & (table[at] != mine)
        new = np.where(several, SEVERAL, mine).astype(np.int32)
        table[at] = new
        table[at[table[at] != new]] = SEVERAL  # of several programs in this very instruction


def near(then, now):
    """Whether no barrier of the cluster is between what was done after `then` and after `now` halves."""
    apart = np.abs(now - then)
    return (apart <= 1) | ((apart == 2) & (then % 2 == 1))


class ClusterMemory(SharedMemory):
    """Shared memory, of which a thread reaches that of its cluster's other blocks too: by addresses that mapa makes."""

    def __init__(self, wave, size, granule):
        super().__init__(size, wave.count, granule, wave.stats)
        self.wave, self.shadow = wave, ClusterShadow(self.written.size, wave.machine.programs)

    def locate(self, instruction, addresses, active):
        rank, size = addresses >> RANK_SHIFT, self.wave.machine.cluster
        if not rank.any():
            return super().locate(instruction, addresses, active)
        programs = np.where(rank == 0, active.programs, active.programs // size * size + rank - 1)
        foreign = programs != active.programs
        if foreign.any():
            if (active.stamps[foreign] >> CLUSTER_SHIFT < 2).any():
                raise instruction.error("of another block: before the first barrier of the cluster it may not be there")
            ended = self.wave.barriers.ended()
            if ended is not None and ended[programs[foreign]].any():
                raise instruction.error("of another block: one that has ended")
        return addresses & ((1 << RANK_SHIFT) - 1), programs


@operation("mapa")
def map_address(wave, instruction):
    """The address of the same variable in another block of the cluster; the block's rank, plus one, stands in its bits."""
    flags_of(instruction, ("shared::cluster",), ("u64", "u32"), 3)
    kind = instruction.type
    target, address = wave.target(instruction.operands[0], kind), wave.source(instruction.operands[1], kind)
    rank = wave.source(instruction.operands[2], "u32")
    own = ((1 << RANK_SHIFT) - 1) | (0xFF << 56 if kind == "u64" else 0)

    def step(mask):
        to = np.broadcast_to(rank, wave.lanes)
        if ((to >= wave.machine.cluster) & (True if mask is None else mask)).any():
            raise instruction.error(f"no block of this rank in a cluster of {wave.machine.cluster}")
        bits = (to.astype(address.dtype) + address.dtype.type(1)) << address.dtype.type(RANK_SHIFT)
        put(target, (address & address.dtype.type(own)) | bits, mask)

    return step


def arrive(wave, instruction):
    """barrier.cluster.arrive."""
    known = {"cluster", "arrive", "release", "aligned"}
    if set(instruction.modifiers) - known or instruction.operands:
        raise PTXError("unknown modifiers of a barrier")
    return lambda mask: wave.barriers.arrive_at_cluster(instruction, mask)
