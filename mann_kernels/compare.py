"""`python -m mann_kernels.compare RUN ... --out PNG`: the tests of several runs in one picture."""

from pathlib import Path
from typing import Annotated

import typer

from mann_kernels.train.checkpoint import write_atomically
from mann_kernels.train.log import plot_tests, read_log
from mann_kernels.train.told import told


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or logs.")],
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("tests.png"),
):
    """Draw how well runs did on test tasks, over the tasks that each was trained on."""
    with told():
        logs = {path: path / "log.csv" if path.is_dir() else path for path in runs}
        if missing := [str(path) for path, log in logs.items() if not log.exists()]:
            raise ValueError(f"RUN: {', '.join(missing)}: no log there, want folders of runs, or logs")
        write_atomically(out, plot_tests({path.stem: read_log(log) for path, log in logs.items()}))


if __name__ == "__main__":
    typer.run(main)
