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
#: What a file holds, and the columns that each of its rows must have.
TABLES = {
    "verification": {"stem", "device", "backend", "dtype", "quantities", "worst", "ok"},
    "timings": {
        *("stem", "shape", "pass", "contestant", "threads", "device", "dtype", "same_work", "note", "rounds"),
        *("median_ms", "q1_ms", "q3_ms", "min_ms", "max_ms", "mean_ms", "stddev_ms"),
        *("saved_mb", "peak_mb", "compile_s", "flops", "bytes", "least_ms"),
    },
    "sweep": {
        *("variable", "value", "contestant", "threads", "device", "dtype", "note", "dominates"),
        *("median_ms", "q1_ms", "q3_ms", "min_ms", "saved_mb"),
    },
}
#: Columns of the predicted ratios.
PREDICTED = {
    *("stem", "shape", "dtype", "backend", "gpu", "ours_us", "ours_host_us", "ours_device_us"),
    *("eager_us", "eager_ratio", "compiled_us", "compiled_ratio", "graph_us", "graph_ratio"),
}


def writable(path: Path | None) -> Path | None:
    """The path of an option, where a file can be written; nothing is changed there.

    Raises:
        typer.BadParameter: it cannot. That is asked before anything is timed.
    """
    if path is None:
        return None
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise typer.BadParameter(f"--json: {path}: cannot be written: {error.strerror or error}") from None
    return path


def summary(verification: list[dict]) -> list[dict]:
    """One row for every stem, device, backend and dtype: how many quantities, and the worst error as a part of what is allowed."""
    found: dict[tuple, dict] = {}
    for row in verification:
        key = {name: row[name] for name in ("stem", "device", "backend", "dtype")}
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
        place = " ".join(str(row[key]) for key in ("stem", "shape", "pass", "device", "dtype"))
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


def write(path: Path, machine: dict, verification=(), timings=(), sweep=()) -> None:
    """All or nothing: a run cut short leaves the old file."""
    result = {"machine": machine, "verification": summary(verification), "timings": list(timings), "sweep": list(sweep)}
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


def _checked(path: Path, result, keys, tables: dict[str, set[str]], command: str) -> dict:
    wants = f"want a file that `{command} --json` wrote"
    missing = [key for key in (*keys, *tables) if not isinstance(result, dict) or key not in result]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: {wants}")
    for name, columns in tables.items():
        for number, row in enumerate(result[name]):
            lacking = columns - row.keys() if isinstance(row, dict) else columns
            if lacking:
                raise ValueError(f"{path}: row {number} of {name} has no {', '.join(sorted(lacking))}: {wants}")
    return result


def read(path: Path) -> dict:
    """What a file holds.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    return _checked(path, _loaded(path), ("machine",), TABLES, "python -m bench")


def predictions(paths: list[Path]) -> dict[Path, dict]:
    """What those of the files hold that `python -m bench cost` wrote; of their rows, the ratios.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    found = {}
    for path in paths:
        result = _loaded(path)
        if isinstance(result, dict) and "prediction" in result:
            _checked(path, result, ("assumptions",), {"rows": {"table"}}, "python -m bench cost")
            ratios = [row for row in result["rows"] if row["table"] == "ratios"]
            found[path] = _checked(path, result | {"rows": ratios}, (), {"rows": PREDICTED}, "python -m bench cost")
    return found


def read_together(paths: list[Path]) -> dict:
    """The rows of several files of one machine.

    Raises:
        ValueError: naming the file that is wrong, or of another machine.
    """
    first, *rest = (read(path) for path in paths)
    for path, more in zip(paths[1:], rest, strict=True):
        for key in ("cpu", "torch"):
            if more["machine"].get(key) != first["machine"].get(key):
                got, want = more["machine"].get(key), first["machine"].get(key)
                raise ValueError(f"{path} is of another machine than {paths[0]}: {key} {got!r}, want {want!r}")
        for name in TABLES:
            first[name] += more[name]
    return first
