"""Results as JSON: what a file holds, how it is written and read, and the form that `pytest-benchmark compare` takes."""

import json
import os
import re
import tempfile
from importlib import metadata
from pathlib import Path

import typer

#: Results that are kept, one file a machine and day.
HISTORY = Path(__file__).parent / "results"
#: What earlier files call an operator.
FORMERLY = "stem"
#: What a file holds, and the columns that each of its rows must have.
TABLES = {
    "verification": {"op", "device", "backend", "dtype", "quantities", "worst", "ok"},
    "timings": {
        *("op", "shape", "pass", "contestant", "threads", "device", "dtype", "same_work", "note", "rounds"),
        *("median_ms", "q1_ms", "q3_ms", "min_ms", "max_ms", "mean_ms", "stddev_ms"),
        *("saved_mb", "peak_mb", "compile_s", "flops", "bytes", "least_ms"),
    },
    "sweep": {
        *("variable", "value", "contestant", "threads", "device", "dtype", "note", "dominates"),
        *("median_ms", "q1_ms", "q3_ms", "min_ms", "saved_mb"),
    },
}


def key_of(row: dict) -> tuple:
    """Name the row of a summary of verification: operator, device, implementation and dtype."""
    return tuple(row[name] for name in ("op", "device", "backend", "dtype"))


def writable(path: Path | None) -> Path | None:
    """The path of an option, where a file can be written: its folder is made, and a file that is there stays as it is.

    Raises:
        typer.BadParameter: it cannot. That is asked before anything is timed.
    """
    if path is None:
        return None
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise typer.BadParameter(f"--json: {path}: cannot be written: {error.strerror or error}") from None
    return path


def summary(verification: list[dict]) -> list[dict]:
    """One row for every operator, device, backend and dtype: how many quantities, the worst error as a part of what is allowed."""
    found: dict[tuple, dict] = {}
    for row in verification:
        key = {name: row[name] for name in ("op", "device", "backend", "dtype")}
        one = found.setdefault(tuple(key.values()), key | {"quantities": 0, "worst": 0.0, "ok": True})
        one["quantities"] += 1
        one["worst"] = max(one["worst"], row["error"] / row["budget"] if row["error"] else 0.0)
        one["ok"] = one["ok"] and row["ok"]
    return list(found.values())


def pytest_benchmarks(result: dict) -> dict:
    """The timings as pytest-benchmark stores its own: seconds, by the name and group of a benchmark."""
    benchmarks = []
    for row in result["timings"]:
        if row["median_ms"] is None:
            continue
        place = " ".join(str(row[key]) for key in ("op", "shape", "pass", "device", "dtype"))
        name = f"{place} {row['contestant']}"
        stats = {key: row[f"{key}_ms"] / 1e3 for key in ("min", "max", "mean", "stddev", "median", "q1", "q3")}
        stats |= {"iqr": stats["q3"] - stats["q1"], "ops": 1 / stats["mean"], "rounds": row["rounds"], "iterations": 1}
        stats |= {"outliers": "0;0", "total": stats["mean"] * row["rounds"]}
        shown = {"group": place, "name": name, "fullname": name, "params": None, "param": None, "extra_info": {}}
        benchmarks.append(shown | {"options": {}, "stats": stats})
    return {
        "machine_info": {key: result["machine"][key] for key in ("cpu", "cores", "torch", "python")},
        "commit_info": {},
        "datetime": result["machine"]["date"],
        "version": metadata.version("pytest-benchmark"),
        "benchmarks": benchmarks,
    }


def write(path: Path, machine: dict, verification=(), timings=(), sweep=(), summed=()) -> None:
    """Write a file whole or not at all. `summed` is verification that was summed up before."""
    known = summary(verification)
    known = [row for row in summed if all(key_of(row) != key_of(one) for one in known)] + known
    result = {"machine": machine, "verification": known, "timings": list(timings), "sweep": list(sweep)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.resolve().parent, delete=False) as file:
        json.dump(result | pytest_benchmarks(result), file, indent=1)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def history_file(machine: dict, suite: str, folder: Path = HISTORY) -> Path:
    """Where the results of a machine are kept: its name, or its GPU's, the suite and the day."""
    gpu = machine["devices"].get("cuda", {}).get("name")
    name = re.sub(r"[^a-z0-9]+", "-", (gpu or machine["cpu"]).lower()).strip("-")
    return folder / f"{name}_{suite}_{machine['date'][:10]}.json"


def _loaded(path: Path):
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read(path: Path) -> dict:
    """Read a file of results.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    result = _loaded(path)
    wants = "want a file that `python -m bench --json` wrote"
    missing = [key for key in ("machine", *TABLES) if not isinstance(result, dict) or key not in result]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: {wants}")
    for name, columns in TABLES.items():
        for number, row in enumerate(result[name]):
            if isinstance(row, dict) and FORMERLY in row:
                row["op"] = row.pop(FORMERLY)
            lacking = columns - row.keys() if isinstance(row, dict) else columns
            if lacking:
                raise ValueError(f"{path}: row {number} of {name} has no {', '.join(sorted(lacking))}: {wants}")
    return result


def same_machine(path: Path, machine: dict, other: str, want: dict) -> None:
    """Refuse a file of another machine.

    Raises:
        ValueError: naming both and what differs.
    """
    for key in ("cpu", "torch"):
        if machine.get(key) != want.get(key):
            raise ValueError(
                f"{path} is of another machine than {other}: {key} {machine.get(key)!r}, want {want.get(key)!r}"
            )


def read_together(paths: list[Path]) -> dict:
    """The rows of several files of one machine.

    Raises:
        ValueError: naming the file that is wrong, or of another machine.
    """
    first, *rest = (read(path) for path in paths)
    for path, more in zip(paths[1:], rest, strict=True):
        same_machine(path, more["machine"], str(paths[0]), first["machine"])
        for name in TABLES:
            first[name] += more[name]
    return first
