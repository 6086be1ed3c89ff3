import ast
import contextlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from against_reference import PLACES, class_of, run
from torch.utils._python_dispatch import TorchDispatchMode

import mann_kernels
from mann_kernels import _backend, _library, compat, distributed

ROOT = Path(__file__).parent.parent


def test_every_operator_stands_everywhere():
    def names(folder, pattern, prefix=""):
        found = {path.stem.removeprefix(prefix) for path in (ROOT / folder).glob(pattern)}
        return {name for name in found if not name.startswith("_")}

    ops = set(_backend.OPS)
    assert names("mann_kernels/ops", "*.py") == ops
    assert names("mann_kernels/reference", "*.py") == ops
    assert ops <= names("bench", "bench_*.py", "bench_")
    assert ops <= names("tests", "test_*.py", "test_")
    assert ops <= names("csrc/cpu", "*.cpp")
    assert ops <= set(re.findall(r"::: mann_kernels\.(\w+)", (ROOT / "docs/pages/operators.md").read_text()))


def test_imports_point_one_way():
    above = ("testing", "train", "tasks", "modules", "ops", "reference")
    forbidden = {folder: above[: above.index(folder)] for folder in above[3:]}
    forbidden["tasks"] = ("testing", "train", "modules", "ops", "reference")
    for folder, words in forbidden.items():
        for path in (ROOT / "mann_kernels" / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module:
                    assert not any(node.module.startswith(f"mann_kernels.{word}") for word in words), path


def test_no_pragma_hangs_on_a_condition():
    """Where an `if constexpr` does not hold, NVRTC drops the loop that its pragma stands before, and the loop after that."""
    for path in [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/*/*")]:
        hanging = re.findall(r"^ *(?:\} )?(?:if\b.*\)|else)\n#pragma.*", path.read_text(), re.MULTILINE)
        assert not hanging, (path, hanging)


def test_triton_kernels_are_launched_by_keyword():
    """Two pointers swapped among sixty that are known by their place would compile."""
    launches = [
        (path.stem, node)
        for path in (ROOT / "mann_kernels/triton").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert {name for name, _ in launches} == set(_backend.OPS)
    assert not [(name, node.lineno) for name, node in launches if node.args]


def public_callables():
    """(name, signature) of every public function, class and method."""
    made = [getattr(mann_kernels, name) for name in mann_kernels.__all__]
    made += [compat.LSTM, compat.DNC, compat.load_tristandeleu, distributed.ShardedMANN]
    for each in (one for one in made if callable(one)):
        yield each.__name__, inspect.signature(each)
        for name, member in vars(each).items() if inspect.isclass(each) else ():
            if not name.startswith("_") and callable(getattr(each, name)):
                yield (
                    f"{each.__name__}.{name}",
                    inspect.signature(member.__func__ if hasattr(member, "__func__") else member),
                )


def test_every_public_argument_is_spelled_out():
    """With its type: an editor shows it. What a preset hands on is a typed dictionary; `to` takes what torch.Tensor.to takes."""
    for name, signature in public_callables():
        for argument in signature.parameters.values():
            if argument.name in ("self", "cls"):
                continue
            assert argument.annotation is not argument.empty, (name, str(signature))
            if argument.kind is argument.VAR_KEYWORD and not name.endswith(".to"):
                assert "Unpack[" in str(argument.annotation), (name, str(signature))


SCRIPT = """
import importlib.util, sys, warnings
for name in ("triton", "numpy", "rich", "typer", "ninja", "safetensors", "matplotlib"):
    sys.modules[name] = None
if {hide}:
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "mann_kernels._C" else find(name, *rest)
import torch, mann_kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    mann = mann_kernels.MANN(3, hidden_size=4, num_slots=5, slot_size=2, num_heads=1)
    for _ in range(2):
        mann(torch.ones(2, 2, 3))[0].sum().backward()
print(len([w for w in caught if "mann_kernels" in str(w.message)]))
"""


@pytest.mark.compiles
@pytest.mark.parametrize(("hide", "warnings"), [(False, 0), (True, 1)])
def test_works_with_torch_alone_and_without_the_extension(hide, warnings):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(hide=hide)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(warnings)


def test_backend_requests():
    x = torch.zeros(1, 2, 3), torch.zeros(1, 1, 3)
    with mann_kernels.backend("reference"):
        with mann_kernels.backend("cpp"):
            assert _backend.select("content_address", x[0]) == "cpp"
        assert _backend.select("content_address", x[0]) == "reference"
    assert _backend.select("content_address", x[0]) == "cpp"
    with mann_kernels.backend("cpp"), pytest.raises(RuntimeError, match=r"not torch\.float16"):
        mann_kernels.content_address(*(tensor.half() for tensor in x))
    with pytest.raises(ValueError, match="backend: got 'fast'"), mann_kernels.backend("fast"):
        pass


@pytest.mark.parametrize("op", _backend.OPS)
def test_a_request_that_cannot_be_met_raises(op):
    for name in ("triton", "cuda"):
        with (
            mann_kernels.backend(name),
            pytest.raises(RuntimeError, match=f"'{name}' was asked for, but cannot run {op}"),
        ):
            _backend.select(op, torch.zeros(1))
    with mann_kernels.backend("cpp"), pytest.raises(RuntimeError, match="not on meta"):
        _backend.select(op, torch.zeros(1, device="meta"))
    with mann_kernels.backend("reference"):
        assert _backend.select(op, torch.zeros(1).half()) == "reference"


def test_an_operator_without_a_triton_kernel(monkeypatch):
    monkeypatch.setattr(_library, "cuda_kernels", frozenset())
    monkeypatch.setattr(_backend, "TRITON_KERNELS", _backend.TRITON_KERNELS - {"lrua_step"})
    assert _backend.default("lrua_step", "cuda", torch.float32) == (
        "reference",
        "this version has no Triton kernel for lrua_step",
    )
    assert _backend.default("memory_update", "cuda", torch.float32) == ("triton", None)


def test_triton_launches_where_its_tensors_are(monkeypatch):
    """Triton launches on the current device, which need not be that of the tensors."""
    order = []

    @contextlib.contextmanager
    def device_of(tensor):
        order.append(tensor)
        yield
        order.append("back")

    module = SimpleNamespace(forward=lambda *args: order.append("forward"), backward=None)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(_library.importlib, "import_module", lambda name: module)
    memory = torch.zeros(1)
    _library._run_triton("content_address", None, memory, 1e-6)
    assert order[0] is memory
    assert order[1:] == ["forward", "back"]


def test_a_request_ends_with_its_block_after_an_exception():
    with pytest.raises(KeyError), mann_kernels.backend("reference"):
        raise KeyError
    assert _backend.select("content_address", torch.zeros(1)) == "cpp"


def test_float16_falls_back_with_one_warning():
    _backend._warn_once.cache_clear()
    x = torch.zeros(1, 2, 3).half(), torch.zeros(1, 1, 3).half()
    with pytest.warns(UserWarning, match="plain PyTorch") as caught:
        [mann_kernels.content_address(*x) for _ in range(3)]
    assert len(caught) == 1


@pytest.mark.compiles
def test_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "mann_kernels", "--json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)
    assert set(facts["operators"]) == set(_backend.OPS)
    assert facts["operators"]["mann_sequence"]["cpu"]["runs"] == "cpp"


class _Calls(TorchDispatchMode):
    """Notes every call of an operator of this package."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("mann"):
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
@pytest.mark.parametrize("op", _backend.OPS)
def test_opcheck(op, dtype, device):
    """The operators that a training step calls, forward and backward, with every set of options and every type they take."""
    tests = class_of(op)
    backend = _backend.select(op, torch.zeros(1, dtype=dtype, device=device))
    assert device != "cpu" or backend == "cpp"
    library = "mann_triton" if backend == "triton" else "mann"
    for options in tests.options:
        with _Calls() as calls:
            run(getattr(mann_kernels, op), tests.inputs(1, 3, 7, 5, 2, **options).to(dtype).on(device))
        if backend != "reference":
            assert [func.name() for func, _ in calls.made] == [f"{library}::{op}", f"{library}::{op}_backward"]
        for func, args in calls.made:
            torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.compiles
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("op", _backend.OPS)
def test_a_profile_names_the_operator(op, compiled):
    """Forward and backward, once for a call, in eager mode and in a compiled graph without a break."""
    function, tests = getattr(mann_kernels, op), class_of(op)
    inputs = tests.inputs(1, 3, 7, 5, 2, **tests.options[0]).to(torch.float32)
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
        run(function, inputs)  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(function, inputs)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert (counts.get(f"mann::{op}"), counts.get(f"mann::{op}_backward")) == (1, 1)


def test_imported_again_after_it_left():
    """As some test runners and notebooks do: the operators are defined anew, and what was made before still runs."""
    code = """
import sys, torch, mann_kernels, gc
torch.manual_seed(0)
x, old = torch.randn(3, 2, 4), mann_kernels.MANN(4, 5, 9, 3, 2)
for _ in range(2):
    for name in [name for name in sys.modules if name.split('.')[0] == 'mann_kernels']:
        del sys.modules[name]
    import mann_kernels
    gc.collect()
    new = mann_kernels.MANN(4, 5, 9, 3, 2)
    new.load_state_dict(old.state_dict())
    with mann_kernels.backend('cpp'):
        a, b = new(x)[0], old(x)[0]
    assert torch.equal(a, b)
    a.sum().backward(), b.sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
