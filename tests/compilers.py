"""The C++ kernels under clang, for this processor and for aarch64, without a warning: what `make compilers` runs.

Clang comes as the package ziglang, which brings the headers of every target. Nothing is linked, nothing runs.
"""

import concurrent.futures
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent

with mock.patch("setuptools.setup"):
    BUILD = runpy.run_path(str(ROOT / "setup.py"))

#: For every target, the instruction sets that setup.py compiles there: one beside the baseline where the vectors are others.
TARGETS = {"x86_64-linux-gnu": ("baseline", "avx512"), "aarch64-linux-gnu": ("baseline",)}


def compiled(target: str, flags: str, source: Path, folder: str) -> str:
    """Compile one file into a folder; the compiler's words, empty where it has none."""
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, *BUILD["FLAGS"].split(), "-O1", "-Werror"]
    command += [*flags.split(), *BUILD["torch_flags"]()[0].split(), "-c", str(source), "-o", "one.o"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return f"{target} {source.name}: {done.stderr or done.returncode}" if done.returncode else ""


def main() -> None:
    work = [
        (target, BUILD["ISAS"][isa], source)
        for target, isas in TARGETS.items()
        for isa in isas
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    ]

    def alone(job) -> str:
        with tempfile.TemporaryDirectory() as folder:
            return compiled(*job, folder)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        said = [words for words in pool.map(alone, work) if words]
    print(*said, f"{len(work)} files compiled by clang, {len(said)} of them not without a word", sep="\n")
    sys.exit(bool(said))


if __name__ == "__main__":
    main()
