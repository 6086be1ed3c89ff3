"""One time step of the memory: write from the previous step's weights, then read what is there now (eq. 2 to 8)."""

from mann_kernels.reference.content_address import content_address
from mann_kernels.reference.lrua_write_weights import lrua_write_weights
from mann_kernels.reference.memory_update import memory_update


def lrua_step(
    memory, usage, read_weights, key, gate, beta=None, add=None, *,
    lru="per_head", erase="least", decay=0.99, eps=1e-6, least_used=None,
):  # fmt: skip
    """memory [B,N,W], usage [B,N], read_weights [B,R,N], key [B,R,W], gate [B,R], beta [B,R]?, add [B,R,W]?
    -> reads [B,R,W], memory, usage, read_weights.

    add=None writes the key itself, as the paper does. least_used as in lrua_write_weights.
    """
    write_weights, least_used = lrua_write_weights(usage, read_weights, gate, lru=lru, least_used=least_used)
    memory = memory_update(memory, write_weights, key if add is None else add, least_used, erase=erase)
    read_weights = content_address(memory, key, beta, eps=eps)
    reads = read_weights @ memory  # eq. 4
    # eq. 5, summed over heads
    usage = decay * usage + read_weights.detach().sum(-2) + write_weights.detach().sum(-2)
    return reads, memory, usage, read_weights
