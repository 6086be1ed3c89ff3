"""What the compiler makes of the CUDA kernels, for compute capability 9.0, as a table in Markdown: nothing runs.

    python tests/gpu_on_cpu/machine_code.py [ROW ...]  # the rows whose names contain one of these; without any, all

A line for each launch of a training step, forward and backward: how often it is made; what it uses (registers and spilled bytes of
a thread, KiB of shared memory of a block); the instructions of the kernel; and those that one warp goes through that takes part in
everything: the longest way through the kernel, each loop once. Of an episode's kernel that is one pass of its loop over steps; of
its backward pass one of each of the two loops, which recompute and undo a step. Of these instructions: how many stand in loops, and
run as often as these turn; how often the warp waits for what it loaded from global memory, which takes longest of all; and the
kinds of COUNTED. Left out is what only diverged warps, rare values (the slow way to divide) and
a second try of a wait run. What torch launches itself, products before and after an episode, is not there.
The sources are those in the built library (`make setup`).
"""

import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import networkx  # noqa: E402  (torch brings it)
import torch  # noqa: E402
from compiled import compile_for, disassembled, resources  # noqa: E402
from cuda_on_cpu import Launch, cuda_on_cpu, recorded  # noqa: E402

from bench.harness import Work  # noqa: E402
from bench.operators import operators  # noqa: E402

CASES = {
    "mann_sequence": ("paper", "single", "small", "batch", "wide", "many slots", "a million slots"),
    "lrua_sequence": ("paper",),
    "lrua_step": ("paper", "wide"),
    "content_address": ("paper", "wide"),
    "summarize_gradients": ("omniglot",),
    "generate_fast_weights": ("omniglot",),
    "augmented_conv2d": ("conv 28", "conv 14", "conv 7", "conv 4", "conv 2"),
    "augmented_linear": ("fc 64-64", "fc 64-5"),
}
#: By column, the instructions that it counts, with all their variants.
COUNTED = {
    "float32": ("FFMA", "FADD", "FMUL"),
    "HMMA": ("HMMA",),  # products on tensor cores
    "MUFU": ("MUFU",),  # exponentials, reciprocals, roots
    "SHFL": ("SHFL",),
    "LDS": ("LDS", "LDSM"),
    "STS": ("STS",),
    "LDG": ("LDG", "LDGSTS", "LD"),
    "STG": ("STG", "ST"),
    "BAR": ("BAR",),  # barriers of the block
    "waits": ("SYNCS.PHASECHK",),  # for messages of other blocks
    "STAS": ("STAS",),  # messages to other blocks
    "cluster BAR": ("UCGABAR_WAIT",),
}


def rows() -> dict[str, tuple[str, object, torch.dtype]]:
    """By name: operator, shape, dtype."""
    found = {}
    for op, names in CASES.items():
        shapes = {case.name: case.shape for case in operators()[op].cases(False)}
        found |= {f"{op} {name}": (op, shapes[name], torch.float32) for name in names}
    paper = found["mann_sequence paper"][1]
    found["mann_sequence paper bfloat16"] = ("mann_sequence", paper, torch.bfloat16)
    return found


def launches_of(op, shape, dtype) -> Counter[Launch]:
    """How often a training step makes each launch."""
    bench = operators()[op]
    work = Work(bench, bench.inputs(shape, 0), dtype)
    with cuda_on_cpu() as library, recorded(library) as launches:
        work.train(bench.kernel())
    return Counter(launches)


class Instruction(NamedTuple):
    predicate: str
    operation: str
    operands: str


def code_of(text: str) -> tuple[list[Instruction], networkx.DiGraph]:
    """The instructions of a disassembled kernel; and as a graph of their numbers, which follows which on the way of a whole warp
    from the kernel's begin to its end."""
    found, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"([.$]\w+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?\w+)?\s*(\S+)(.*);", line):
            found.append(Instruction(*instruction.groups(default="")))
    graph, ends = networkx.DiGraph(), []
    for at, (predicate, operation, operands) in enumerate(found):
        kind, conditional = operation.split(".")[0], predicate or "P" in operands.split("`")[0]
        if kind == "CALL" and "__cuda_sm" not in operands:  # what divides where a short way does not do
            raise ValueError(f"machine_code: a function is called: {operands}")
        if kind == "BRA" and operation != "BRA.DIV":  # BRA.DIV: where lanes have parted
            graph.add_edge(at, labels[re.search(r"`\((.+?)\)", operands)[1]])
        if kind not in ("BRA", "CALL", "EXIT", "RET") or conditional or operation == "BRA.DIV":
            graph.add_edge(at, at + 1)
        if kind == "EXIT":
            ends.append(at)
    for at, (_, operation, _) in enumerate(found):
        again = [at - 1, at] if at and found[at - 1].operation == "YIELD" else [at]
        if operation.startswith("SYNCS.PHASECHK") and any(
            graph.has_edge(after, first) for first in again for after in range(at + 1, at + 4)
        ):
            graph.remove_node(at)  # waits again
    alive = {0} | networkx.descendants(graph, 0)
    return found, graph.subgraph(alive & set(ends).union(*(networkx.ancestors(graph, end) for end in ends)))


def loops(graph) -> list[set[int]]:
    """The loops that are in no other, the largest first."""
    parts = networkx.strongly_connected_components(graph)
    return sorted((part for part in parts if len(part) > 1), key=len, reverse=True)


def ways_back(graph, loop) -> list[tuple[int, int]]:
    (first,) = {at for at in loop if graph.pred[at].keys() - loop}
    return [(at, first) for at in graph.pred[first] if at in loop]


def one_pass(graph, loop):
    """A loop without the way back to its begin."""
    inside = graph.subgraph(loop).copy()
    inside.remove_edges_from(ways_back(graph, loop))
    return inside


def longest(graph) -> list[int]:
    """The longest way: at the end of each loop it goes on where the loop is left."""
    graph = networkx.DiGraph(graph)
    while repeated := loops(graph):
        for loop in repeated:
            back, onward = ways_back(graph, loop), {after for at in loop for after in graph[at]} - loop
            graph.remove_edges_from(back)
            graph.add_edges_from((at, after) for at, _ in back for after in onward)
    return networkx.dag_longest_path(graph)


def passes(kernel: str, graph) -> dict[str, networkx.DiGraph]:
    """By name, the parts of a kernel that are counted."""
    if kernel.endswith("_sequence_forward"):
        return {"a step": one_pass(graph, loops(graph)[0])}
    if kernel.endswith("_sequence_backward"):
        segment = one_pass(graph, loops(graph)[0])
        undo, recompute = loops(segment)[:2]
        return {"recompute a step": one_pass(segment, recompute), "undo a step": one_pass(segment, undo)}
    return {"all": graph}


def registers_of(operands: str, width: int = 1) -> set[int]:
    """The registers that operands name, each with those behind it that a wide one has too."""
    return {
        int(name) + i
        for name, wide in re.findall(r"\bR(\d+)(\.64)?", operands)
        for i in range(max(width, 2 if wide else 1))
    }


def memory_waits(code: list[Instruction], way: list[int]) -> int:
    """How often a warp waits on its way for what it loaded from global memory: loads that are used together are one wait."""
    waits, awaited, copies = 0, set(), False
    for _, operation, operands in (code[at] for at in way):
        if operation.startswith("LDGSTS"):
            copies = True
            continue
        loads = operation.startswith("LDG.") or operation == "LDG"
        target, _, used = operands.partition(",") if loads else ("", "", operands)
        if awaited & registers_of(used) or (copies and operation.startswith("DEPBAR")):
            waits, awaited, copies = waits + 1, set(), False
        if loads:
            awaited |= registers_of(target, 4 if ".128" in operation else 2 if ".64" in operation else 1)
    return waits


def counts(code: list[Instruction], graph) -> dict[str, int]:
    """Count what a warp goes through: instructions, those among them that a loop repeats, waits for global memory, and COUNTED."""
    way, repeated = longest(graph), set().union(*loops(graph))
    kinds = Counter(code[at].operation for at in way)
    found = {"instructions": len(way), "in loops": len(repeated & set(way)), "memory waits": memory_waits(code, way)}
    return found | {
        column: sum(n for kind, n in kinds.items() if f"{kind}.".startswith(tuple(f"{name}." for name in names)))
        for column, names in COUNTED.items()
    }


def lines_of(launch: Launch, times: int) -> list[dict]:
    """The lines of a launch in the table: one for each part that is counted."""
    failed, made = compile_for(90, launch.source, launch.options)
    if failed:
        raise RuntimeError(made)
    code, graph = code_of(disassembled(Path(made))[launch.kernel])
    used = resources(Path(made))[launch.kernel]
    line = {
        "kernel": launch.kernel,
        "launches": times,
        "blocks": launch.blocks.removesuffix("x1"),
        "threads": launch.threads,
        "cluster": launch.cluster,
        "registers": used.registers,
        "spilled": used.spilled,
        "KiB": f"{(int(launch.shared_bytes) + used.shared) / 1024:.1f}",
        "code": len(code),
    }
    lines = []
    for part, inside in passes(launch.kernel, graph).items():
        found = counts(code, inside)
        instructions = found["instructions"]
        of_block = int(launch.threads) // 32 * instructions
        lines.append(line | {"part": part, "instructions": instructions, "a block": of_block} | found)
    return lines


def table(lines: list[dict]) -> str:
    """In Markdown, the columns aligned."""
    cells = [list(lines[0]), *([str(value) for value in line.values()] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells)


def main(*wanted: str) -> None:
    lines = []
    for name, row in rows().items():
        if not wanted or any(part in name for part in wanted):
            print(name, file=sys.stderr)
            for launch, times in launches_of(*row).items():
                lines += [{"row": name} | line for line in lines_of(launch, times)]
    print(table(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
