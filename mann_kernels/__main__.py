"""`python -m mann_kernels [--json]`: which implementation of each operator runs on which device, and why others are missing."""

import argparse
import json
import platform

import torch

from mann_kernels import _backend, _library
from mann_kernels._version import __version__


def report() -> dict:
    """Collect which implementation runs where, for float32 tensors, with versions; JSON-ready."""
    operators: dict[str, dict] = {}
    for op in _backend.OPS:
        operators[op] = {}
        for device in ("cpu", "cuda"):
            name, why = _backend.default(op, device, torch.float32)
            missing = {other: _backend.missing(other, op, device, torch.float32) for other in _backend.NAMES}
            operators[op][device] = {"runs": name, "why_no_kernel": why, "missing": missing}
    return {
        "mann_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda_available": torch.cuda.is_available(),
        "cpp_instruction_set": _library.cpu_isa(),
        "cuda_kernels": sorted(_library.cuda_kernels & set(_backend.OPS)),
        "operators": operators,
    }


def as_text(facts: dict) -> str:
    lines = [
        f"mann_kernels {facts['mann_kernels']}, torch {facts['torch']}, Python {facts['python']},"
        f" C++ kernels: {facts['cpp_instruction_set'] or 'none'},"
        f" CUDA kernels: {'built' if facts['cuda_kernels'] else 'none'},"
        f" CUDA device: {'yes' if facts['cuda_available'] else 'no'}",
        "",
        f"{'operator':<22} {'cpu':<10} cuda",
    ]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for op, devices in facts["operators"].items():
        on_gpu = devices["cuda"]["runs"]
        if on_gpu != "reference" and not facts["cuda_available"]:
            on_gpu += " (built, no device)" if on_gpu == "cuda" else " (no device)"
        lines.append(f"{op:<22} {devices['cpu']['runs']:<10} {on_gpu}")
        for device, entry in devices.items():
            for name, why in entry["missing"].items():
                if why is not None:
                    reasons.setdefault((device, name, why), []).append(op)
    lines += ["", "missing:"]
    for (device, name, why), ops in reasons.items():
        which = "all operators" if len(ops) == len(facts["operators"]) else ", ".join(ops)
        lines.append(f"  {name} on {device}, {which}: {why}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m mann_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the same facts, and all of them, as JSON")
    facts = report()
    print(json.dumps(facts, indent=2) if parser.parse_args().json else as_text(facts))
