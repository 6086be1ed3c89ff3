"""What a user's paths hold: two processes in one folder, and files that are not what they should be.

`python tests/test_paths.py FOLDER SECONDS` is a writer of checkpoints.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, invoke
from packed import write_packed
from safetensors.torch import load, save

from mann_kernels._paths import PART, PathError, about, own
from mann_kernels.evaluate import main as evaluate
from mann_kernels.tasks import load_omniglot
from mann_kernels.train import checkpoint as files
from mann_kernels.train.told import interrupted_between

ROOT = Path(__file__).parent.parent
TRAIN = ["copy", *TINY.split(), "--length", "3", "--log-every", "1", "--test-every", "1000"]
CHECKPOINT = "checkpoint.safetensors"


def said(result):
    return " ".join(result.output.replace("│", " ").split())


def assert_one_sentence(result, *words, status=(2,)):
    """No traceback: an exit status, and a text that has these words."""
    assert isinstance(result.exception, SystemExit), (result.exception, result.output)
    assert result.exit_code in status, result.output
    for word in words:
        assert str(word) in said(result) or str(word) in said(result).replace(" ", ""), said(result)


# --- two processes ---


def write_checkpoints(folder: Path, seconds: float) -> None:
    """Write one after the other; each tensor of one has the same number everywhere."""
    model = torch.nn.Linear(200, 200)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 200)).sum().backward()
    optimizer.step()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(random.random())
        facts = {"settings": {}, "update": 1, "seconds": 0.0, "cpu_seconds": 0.0}
        files.save_checkpoint(folder / CHECKPOINT, model, optimizer, torch.Generator(), facts)


def look(folder: Path, seconds: float, writers: int = 2) -> int:
    """How often a reader found the file whole while so many processes wrote it."""
    call = [sys.executable, __file__, str(folder), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    processes = [subprocess.Popen(call, cwd=ROOT, env=environment) for _ in range(writers)]
    looks = 0
    while any(process.poll() is None for process in processes):
        if not (folder / CHECKPOINT).exists():
            continue
        tensors = load((folder / CHECKPOINT).read_bytes())
        assert files.read_facts(folder / CHECKPOINT)["update"] == 1
        weight = tensors["model.weight"]
        assert (weight == weight[0, 0]).all()
        looks += 1
    assert all(process.returncode == 0 for process in processes)
    assert [path.name for path in folder.iterdir()] == [CHECKPOINT]
    return looks


@pytest.mark.compiles
def test_two_writers_and_a_reader(tmp_path):
    assert look(tmp_path, seconds=1.5) > 10


@pytest.mark.compiles
def test_a_folder_has_one_owner(tmp_path):
    """The second command is told so; when the first is killed, its folder is free and its litter goes."""
    out = tmp_path / "run"
    call = [sys.executable, "-m", "mann_kernels.train", *TRAIN, "--updates", "1000000", "--out", str(out)]
    first = subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not (out / CHECKPOINT).exists():
            assert first.poll() is None
            time.sleep(0.05)
        for more in ([], ["--resume"]):
            result = invoke(*TRAIN, "--updates", "2", "--out", str(out), *more)
            assert_one_sentence(result, "another process is writing its run to this folder", out)
        result = invoke(str(out), "--tasks", "2", command=evaluate)  # which only reads
        assert result.exit_code == 0, result.output
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    (out / f".{CHECKPOINT}.1-00{PART}").write_text("half")
    result = invoke(*TRAIN, "--updates", "1000000", "--minutes", "1e-9", "--out", str(out), "--resume")
    assert result.exit_code == 0, result.output
    assert not list(out.glob(f".*{PART}"))


def test_an_owner_in_one_process(tmp_path):
    first = own(tmp_path)
    assert own(tmp_path) is first
    assert own(tmp_path / ".." / tmp_path.name) is first


@pytest.mark.compiles
def test_ctrl_c_names_resume(tmp_path):
    out = tmp_path / "run"
    call = [sys.executable, "-m", "mann_kernels.train", *TRAIN, "--updates", "1000000", "--out", str(out)]
    process = subprocess.Popen(
        call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
    )  # fmt: skip
    while not (out / CHECKPOINT).exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "--resume goes on from the last checkpoint" in output
    assert "Traceback" not in output


@pytest.fixture
def ctrl_c():
    """Give SIGINT the handler that Python has: a background job of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_not_lost(ctrl_c, capfd):
    """In the callback of a weak reference an exception ends nowhere; a second Ctrl-C does not wait."""
    with interrupted_between() as check:
        check()
        gone = {"any"}
        watch = weakref.ref(gone, lambda _: signal.raise_signal(signal.SIGINT))
        del gone
        assert watch() is None
        with pytest.raises(KeyboardInterrupt):
            check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "Ctrl-C again" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- files that are not what they should be ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two updates."""
    out = tmp_path_factory.mktemp("run")
    result = invoke(*TRAIN, "--updates", "2", "--out", str(out))
    assert result.exit_code == 0, result.output
    return out


def with_facts(content, change):
    """A checkpoint whose facts are changed."""
    size = int.from_bytes(content[:8], "little")
    facts = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["facts"])
    return save(load(content), metadata={"facts": json.dumps(change(facts))})


def settings(**other):
    return lambda facts: facts | {"settings": facts["settings"] | other}


BAD_CHECKPOINTS = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "a byte short": lambda content: content[:-1],
    "text": lambda content: b"update,loss\n1,2\n" * 100,
    "zeros": lambda content: bytes(len(content)),
    "a huge header": lambda content: (2**62).to_bytes(8, "little") + content[8:],
    "another program's": lambda content: save({"weight": torch.zeros(3)}),
    "its facts are no JSON": lambda content: save(load(content), metadata={"facts": "{"}),
    "its facts are a list": lambda content: with_facts(content, lambda facts: [facts]),
    "no settings": lambda content: with_facts(content, lambda facts: {"update": 1}),
    "settings of a newer version": lambda content: with_facts(content, settings(sharpness=3)),
    "settings of another type": lambda content: with_facts(content, settings(hidden_size="many")),
    "absurd sizes": lambda content: with_facts(content, settings(hidden_size=10**30)),
    "no memory has it": lambda content: with_facts(content, settings(hidden_size=2**30)),
    "an unknown learner": lambda content: with_facts(content, settings(learner="oracle")),
    "an unknown task": lambda content: with_facts(content, settings(task="chess")),
    "an update before the first": lambda content: with_facts(content, lambda facts: facts | {"update": -3}),
    "no weights": lambda content: save({}, metadata={"facts": json.dumps(with_facts_of(content))}),
    "weights of other shapes": lambda content: save(
        {name: t[:1] if t.dim() else t for name, t in load(content).items()},
        metadata={"facts": json.dumps(with_facts_of(content))},
    ),
}


def with_facts_of(content):
    size = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["facts"])


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoints(name, run, tmp_path):
    """Neither command ends in a traceback, and both leave everything as it was."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    bad = BAD_CHECKPOINTS[name]((run / CHECKPOINT).read_bytes())
    (out / CHECKPOINT).write_bytes(bad)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for result in (
        invoke(*TRAIN, "--updates", "3", "--out", str(out), "--resume"),
        invoke(str(out), "--tasks", "2", command=evaluate),
    ):
        assert_one_sentence(result, *([] if name in ("no memory has it",) else [CHECKPOINT]))
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_checkpoint_that_is_a_folder_and_a_folder_that_is_a_file(run, tmp_path):
    (tmp_path / "run" / CHECKPOINT).mkdir(parents=True)
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "run", tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none/run")):
        result = invoke(*TRAIN, "--updates", "3", "--out", str(out), "--resume")
        assert_one_sentence(result, out.name)
    for path in (tmp_path / "run", tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("long" * 100)):
        assert_one_sentence(invoke(str(path), command=evaluate))
    plots = invoke(str(run), "--tasks", "2", "--plots", str(tmp_path / "file"), command=evaluate)
    assert_one_sentence(plots, "file")
    assert "loss" not in said(plots)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("text", [b"\x00\xff\xfe", b"a,b\n1,2\n", b"update,tasks,seconds\nmany,2,3\n"])
def test_bad_logs(text, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "log.csv").write_bytes(text)
    for result in (
        invoke(*TRAIN, "--updates", "3", "--out", str(tmp_path / "run"), "--resume"),
        invoke(str(tmp_path / "run"), "--tasks", "2", "--plots", str(tmp_path / "plots"), command=evaluate),
    ):
        assert_one_sentence(result, "log.csv")
    assert (tmp_path / "run" / "log.csv").read_bytes() == text


@pytest.mark.parametrize("at", ["replace", "fsync"])
def test_a_full_disk(at, run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, at, full)
    result = invoke(*TRAIN, "--updates", "3", "--out", str(tmp_path / "run"), "--resume")
    assert_one_sentence(result, "log.csv", "No space left on device", status=(1,))
    monkeypatch.undo()
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before
    assert not list((tmp_path / "run").glob(f".*{PART}"))


def test_nothing_left_to_do(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    result = invoke(*TRAIN, "--updates", "2", "--out", str(tmp_path / "run"), "--resume")
    assert result.exit_code == 0, result.output
    (tmp_path / "run" / "log.csv").unlink()
    result = invoke(*TRAIN, "--updates", "2", "--out", str(tmp_path / "run"), "--resume")
    assert result.exit_code == 0
    assert "nothing to do" in said(result)


def arrays(**named):
    def write(path):
        np.savez(path, **named)

    return write


def zipped(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("images.npy", b"\x93NUMPY\x01\x00rubbish")


IMAGES, PARTS = np.zeros((4, 2, 20, 20), np.uint8), np.array([0, 1, 2, 2])
BAD_DATA = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no data at all"),
    "truncated": lambda path: (write_packed(path), path.write_bytes(path.read_bytes()[:3000])),
    "a flipped byte": lambda path: (
        write_packed(path),
        path.write_bytes(bytes(b ^ (255 * (2000 < i < 2100)) for i, b in enumerate(path.read_bytes()))),
    ),
    "a picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "an array alone": lambda path: path.open("wb").write(b"\x93NUMPY\x01\x00v\x00") and None,
    "a zip of rubbish": zipped,
    "other arrays": arrays(weights=IMAGES),
    "pickled": arrays(images=np.array([{}, {}], object), class_vinyals=PARTS),
    "numbers that are no bytes": arrays(images=IMAGES.astype(float), class_vinyals=PARTS),
    "images that are not square": arrays(images=IMAGES[..., :7], class_vinyals=PARTS),
    "no images": arrays(images=IMAGES[:0], class_vinyals=PARTS[:0]),
    "images of no pixels": arrays(images=IMAGES[:, :, :0, :0], class_vinyals=PARTS),
    "classes that are words": arrays(images=IMAGES, class_vinyals=np.array(["a", "b", "c", "d"])),
    "a folder of nothing": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name, tmp_path):
    data, out = tmp_path / "data.npz", tmp_path / "run"
    BAD_DATA[name](data)
    for task in ("omniglot", "few-shot"):
        result = invoke(task, "--data", str(data), "--out", str(out), *TINY.split(), "--updates", "1", "--ways", "2")
        assert_one_sentence(result)
        assert not out.exists()


def folder_of_pictures(root):
    image = pytest.importorskip("PIL.Image")
    for half in ("background", "evaluation"):
        for n in range(30):
            folder = root / f"images_{half}" / "Latin" / f"character{n:02}"
            folder.mkdir(parents=True)
            for drawing in range(4):
                image.new("1", (28, 28), 1).save(folder / f"{n:04}_{drawing:02}.png")


def test_bad_pictures(tmp_path):
    folder_of_pictures(tmp_path)
    one = tmp_path / "images_background" / "Latin" / "character03" / "0003_01.png"
    for content in (b"", b"text", one.read_bytes()[:40]):
        kept = one.read_bytes()
        one.write_bytes(content)
        result = invoke("few-shot", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--ways", "2")
        assert_one_sentence(result, one.name, "cannot be read as a picture")
        one.write_bytes(kept)


def test_companion_files_are_passed_over(tmp_path):
    folder_of_pictures(tmp_path)
    want = load_omniglot(tmp_path, "background", 28)
    latin = tmp_path / "images_background" / "Latin"
    for path in (latin / "character03" / "._0003_01.png", latin / ".DS_Store", latin / "character03" / "Thumbs.db"):
        path.write_bytes(b"\x00\x05\x16\x07")
    for folder in (
        latin / ".thumbnails",
        tmp_path / "images_background" / "__MACOSX" / "Latin",
        latin / "._character03",
    ):
        folder.mkdir(parents=True)
        (folder / "0003_01.png").write_bytes(b"no picture")
    assert torch.equal(load_omniglot(tmp_path, "background", 28), want)


def test_whatever_a_library_raises_becomes_a_sentence():
    class Strange(BaseException):
        pass

    for error in (
        KeyError("facts"),
        OSError(5, "Input/output error"),
        MemoryError(),
        RuntimeError("a\n  b"),
        Exception(),
    ):
        with pytest.raises(PathError, match=r"^p: cannot be read: \S"), about("p", "cannot be read"):
            raise error
    for error in (KeyboardInterrupt(), Strange()):
        with pytest.raises(type(error)), about("p", "cannot be read"):
            raise error


if __name__ == "__main__":
    write_checkpoints(Path(sys.argv[1]), float(sys.argv[2]))
