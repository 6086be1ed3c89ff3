"""What the documentation shows runs: every block of Python of a page in order, the examples at a small size."""

import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from packed import write_packed

import mann_kernels
import mann_kernels.compat
import mann_kernels.distributed
import mann_kernels.testing

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs/pages").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: In README, where code is indented: what begins with an import.
INDENTED = re.compile(r"^\n((?:    .*\n|\n)+)", re.MULTILINE)


def blocks_of(path: Path) -> list[str]:
    text = path.read_text()
    if path.name != "README.md":
        return BLOCK.findall(text)
    blocks = [textwrap.dedent(block) for block in INDENTED.findall(text)]
    return [block for block in blocks if block.lstrip().startswith(("import ", "from "))]


@pytest.mark.compiles
@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.stem)
def test_the_code_of_a_page_runs(path):
    names: dict = {}
    threads = torch.get_num_threads()
    try:
        for block in blocks_of(path):
            exec(compile(block, str(path), "exec"), names)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.compiles
def test_the_notebook_runs():
    """Every cell in order; in so few updates it only has to be better than chance."""
    notebook = json.loads((ROOT / "docs/examples/quick_start.ipynb").read_text())
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(
                compile("".join(cell["source"]).replace("UPDATES = 400", "UPDATES = 120"), "quick_start", "exec"), names
            )
    assert names["accuracy"] > 0.65


def test_there_is_code_to_run():
    counts = {path.stem: len(blocks_of(path)) for path in [ROOT / "README.md", *PAGES]}
    assert counts["README"] >= 2
    assert counts["index"] >= 4
    assert counts["migrate"] >= 5
    assert counts["questions"] >= 10


def test_the_readme_is_one_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 900
    for target in re.findall(r"\]\(([^)h][^)]*)\)", text):
        assert (ROOT / target).exists(), target


def why_no_lstm():
    """torch's own LSTM has no bfloat16 on CPUs without AVX-512, where ours has; None where it runs."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.nn.LSTM(2, 3)(torch.zeros(1, 1, 2))
    except RuntimeError as error:
        return f"nn.LSTM in bfloat16: {error}"
    return None


@pytest.mark.compiles
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "lstm", marks=[pytest.mark.long, pytest.mark.skipif(bool(why_no_lstm()), reason=str(why_no_lstm()))]
        ),
        "mann",
    ],
)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_the_training_script_before_and_after(name, processes):
    """The same script, changed in its import and the line that makes the layer: compiled, under autocast, alone and by two."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
    done = subprocess.run(
        [sys.executable, *launcher, f"docs/examples/{name}.py", "--updates", "50"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert "50 updates: loss" in done.stdout, done.stderr[-3000:]


def test_two_lines_make_the_difference():
    before, after = ((ROOT / f"docs/examples/{name}.py").read_text().splitlines() for name in ("lstm", "mann"))
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(changed) == 3  # the first is what the script says of itself
    assert changed[1][1] == "from mann_kernels.compat import LSTM as Recurrent"
    assert changed[2][0].strip().startswith("self.recurrent = Recurrent(")


@pytest.mark.parametrize(("name", "updates", "least"), [("custom_controller", 250, 0.7), ("metanet", 60, 0.42)])
def test_an_example_learns(name, updates, least):
    names: dict = {"__name__": name}
    exec(compile((ROOT / f"docs/examples/{name}.py").read_text(), name, "exec"), names)
    assert names["main"](updates) > least


def test_the_omniglot_example_draws_a_memory(tmp_path):
    names: dict = {"__name__": "omniglot"}
    exec(compile((ROOT / "docs/examples/omniglot.py").read_text(), "omniglot", "exec"), names)
    data = write_packed(tmp_path / "small.npz", classes=30, drawers=10)
    assert 0 <= names["main"](2, data, tmp_path / "memory.png") <= 1
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def public_names():
    for module in (mann_kernels, mann_kernels.compat, mann_kernels.distributed, mann_kernels.testing):
        for name in module.__all__:
            if name != "__version__":
                yield pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("thing", list(public_names()))
def test_every_public_name_is_documented(thing):
    """Shapes or the kind of each argument, what is raised, and for what computes, where it comes from."""
    text = inspect.getdoc(thing) or ""
    assert len(text) > 60
    if isinstance(thing, type) and issubclass(thing, tuple):
        fields = [name for name in thing._fields if not re.search(rf"\b{name}\b", text)]
        assert not fields, f"not said of {fields}"
        return
    arguments = inspect.signature(thing).parameters.values()
    named = [a.name for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    missing = [name for name in named if not re.search(rf"\b{name}\b", text)]
    assert not missing, f"not said of {missing}"
    if named:
        assert re.search(r"\braises?\b", text, re.IGNORECASE), "does not say what it raises"
