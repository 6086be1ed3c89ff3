import io
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from against_reference import OnePercentOff
from rich.console import Console
from typer.testing import CliRunner

import mann_kernels
from bench import __main__ as front
from bench import groups, harness, limits, report, store, sweep, tables
from bench.operators import operators

MACHINE = {"cpu": "A Chip (TM) 9", "cores": 2, "threads": 1, "torch": "2.13.0", "python": "3.11"}
MACHINE |= {"devices": {"cpu": {}}, "date": "2026-01-02T03:04:05+00:00", "limits": {"cpu": {"float32": {"x": 50.0}}}}
VERIFIED = {
    "op": "lrua_step",
    "device": "cpu",
    "backend": "cpp",
    "dtype": "float32",
    "error": 1.0,
    "budget": 2.0,
    "ok": True,
}


def invoke(*arguments):
    return CliRunner().invoke(front.app, [str(argument) for argument in arguments])


def row(contestant, median, shape="paper", spread=0.1, **more):
    found = dict.fromkeys(store.TABLES["timings"]) | {"op": "lrua_step", "shape": shape, "pass": "fwd+bwd"}
    found |= {
        "contestant": contestant,
        "threads": 1,
        "device": "cpu",
        "dtype": "float32",
        "same_work": True,
        "rounds": 11,
    }
    for name in ("median_ms", "mean_ms"):
        found[name] = median
    if median is not None:
        found |= {"q1_ms": median - spread, "q3_ms": median + spread, "min_ms": 0.9 * median, "max_ms": 1.2 * median}
        found |= {"stddev_ms": 0.01, "flops": 10**6, "bytes": 10**6, "least_ms": 0.5}
    return found | more


def written(path, timings, rows=()):
    store.write(path, MACHINE, verification=[VERIFIED, VERIFIED], timings=timings, sweep=rows)
    return path


TIMINGS = [
    row("mann_kernels", 2.0),
    row("eager", 5.0),
    row("lstm", 1.0, same_work=False, least_ms=None, flops=None, bytes=None),
    row("compile_step", None, note="RuntimeError: <no> compiler"),
    row("mann_kernels", 4.0, "wide"),
    row("eager", 2.0, "wide"),
]
SHAKEN = [
    row("mann_kernels", 2.0, of_ours_q1=1.0, of_ours=1.0, of_ours_q3=1.0),
    row("eager", 5.0, of_ours_q1=2.75, of_ours=3.0, of_ours_q3=3.5),
    row("slow", 4.0, of_ours_q1=3.5, of_ours=4.0, of_ours_q3=4.5),
]


def test_the_ratio_is_against_the_fastest_that_does_the_same_work():
    won, lost = groups.grouped(TIMINGS)
    assert [one["contestant"] for one in won.rows] == ["lstm", "mann_kernels", "eager", "compile_step"]
    assert (won.gain, lost.gain) == (2.5, 0.5)
    assert (won.rival["contestant"], lost.rival["contestant"]) == ("eager", "eager")
    assert [won.of_fastest(one) for one in won.rows] == [0.5, 1, 2.5, None]
    assert lost.of_fastest(lost.ours) == 2
    assert [groups.of_limit(one) for one in won.rows] == [None, 0.25, 0.1, None]
    paired = groups.grouped(SHAKEN)[0]  # what the rounds say counts, not the medians
    assert (paired.gain, paired.rival["contestant"]) == (3.0, "eager")
    assert (paired.gain_quartiles, won.gain_quartiles) == ((2.75, 3.5), None)
    assert [paired.of_fastest(one) for one in paired.rows] == [1, 3, 4]
    nobody = groups.grouped([row("mann_kernels", None, note="out of memory"), row("eager", 1.0)])[0]
    assert (nobody.ours, nobody.gain) == (None, None)


def test_a_page_that_needs_nothing_beside_it(tmp_path):
    result = invoke("report", written(tmp_path / "a.json", TIMINGS), "--out", tmp_path / "page")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"report.html", "gains.png", "limits.png"}
    assert (tmp_path / "page" / "gains.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "page" / "report.html").read_text()
    order = [
        ">all right.<",
        "fastest other way",
        "lrua_step",
        "data:image/png;base64",
        ">Verification<",
        ">right<",
        "The machine",
        ">A Chip (TM) 9<",
    ]
    places = [page.index(word) for word in order]
    assert places == sorted(places)
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert "<script" not in page
    assert '<td class="n good">2.50</td>' in page
    assert '<td class="n bad">0.50</td>' in page  # a loss is shown as one
    assert "RuntimeError: &lt;no&gt; compiler" in page
    assert "Against " + "a.json" not in page


def test_how_far_to_trust_a_ratio_is_beside_it(tmp_path):
    invoke("report", written(tmp_path / "a.json", SHAKEN), "--out", tmp_path)
    assert '<td class="n good">3.00</td>\n<td class="n">2.75 – 3.50</td>' in (tmp_path / "report.html").read_text()


def test_a_long_note_leaves_the_table_readable():
    console = Console(width=front.WIDE, file=io.StringIO())
    long = {"op": "generate_fast_weights", "shape": "omniglot 5-way 1-shot", "saved_mb": 398.4, "peak_mb": 689.2}
    failed = row("eager", None, note="AcceleratorError: " + "failed, " * 30)
    named = [one | long for one in (row("mann_kernels triton graph", 4.0), failed)]
    console.print(tables.timings_table([*TIMINGS, *named]))
    page = console.file.getvalue()
    assert "…" not in page
    assert re.search(r"omniglot 5-way 1-shot │ fwd\+bwd │ mann_kernels triton graph +│ +4\.00 │ 3\.90 - 4\.10 │", page)


def test_what_got_slower_beyond_the_spread_is_marked(tmp_path):
    old = written(tmp_path / "old.json", TIMINGS)
    now = [row("mann_kernels", 2.5), row("eager", 4.0), row("mann_kernels", 4.15, "wide"), row("new", 1.0)]
    found = groups.changes(now, TIMINGS)
    assert [(one.row["contestant"], one.verdict) for one in found] == [
        ("mann_kernels", "slower"),
        ("eager", "faster"),
        ("mann_kernels", "within the spread"),
    ]
    assert found[0].ratio == 1.25
    new = written(tmp_path / "new.json", now)
    assert invoke("report", new, "--compare", old, "--out", tmp_path).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "Against old.json" in page
    assert "1 slower" in page
    assert '<td class="bad">slower</td>' in page


def test_results_that_are_none(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match=r"cannot read .*a.json: No such file"):
        store.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a.json is not JSON"):
        store.read(path)
    for text in ("[]", '{"machine": {}, "timings": []}'):
        path.write_text(text)
        with pytest.raises(
            ValueError, match=r"a.json has no .*verification.*want a file that `python -m bench --json` wrote"
        ):
            store.read(path)
    path.write_text(json.dumps({"machine": {}, "verification": [], "sweep": [], "timings": [{"op": "x"}]}))
    with pytest.raises(ValueError, match=r"row 0 of timings has no bytes, compile_s"):
        store.read(path)
    result = invoke("report", path, "--out", tmp_path)
    assert result.exit_code == 2
    assert "row0oftimings" in "".join(result.output.replace("│", "").split())
    assert not (tmp_path / "report.html").exists()


def test_files_of_earlier_versions_are_read(tmp_path):
    """They call an operator "stem"; and the ones that are kept here are such."""
    path = written(tmp_path / "a.json", TIMINGS)
    found = json.loads(path.read_text())
    for row in (*found["timings"], *found["verification"]):
        row["stem"] = row.pop("op")
    path.write_text(json.dumps(found))
    assert store.read(path)["timings"] == TIMINGS
    for kept in store.HISTORY.glob("*.json"):
        assert store.read(kept)["machine"]["torch"]


def test_a_run_that_was_cut_short_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(MACHINE, "stopped", "interrupted")
    invoke("report", written(tmp_path / "a.json", TIMINGS), "--out", tmp_path)
    assert "The run did not reach its end: interrupted." in (tmp_path / "report.html").read_text()


def test_several_files_of_one_machine(tmp_path, monkeypatch):
    a, b = written(tmp_path / "a.json", TIMINGS[:4]), written(tmp_path / "b.json", TIMINGS[4:])
    assert store.read_together([a, b])["timings"] == TIMINGS
    monkeypatch.setitem(MACHINE, "cpu", "Another")
    written(b, TIMINGS[4:])
    with pytest.raises(
        ValueError, match=r"b.json is of another machine than .*a.json: cpu 'Another', want 'A Chip \(TM\) 9'"
    ):
        store.read_together([a, b])


def test_verification_is_summed_up():
    rows = [
        VERIFIED,
        VERIFIED | {"error": 3.0, "ok": False},
        VERIFIED | {"dtype": "float64", "error": 0.0, "budget": 0.0},
    ]
    assert [(one["quantities"], one["worst"], one["ok"]) for one in store.summary(rows)] == [
        (2, 1.5, False),
        (1, 0.0, True),
    ]


def test_the_history_is_kept_by_machine_and_day():
    assert store.history_file(MACHINE, "mann", Path("x")) == Path("x/a-chip-tm-9_mann_2026-01-02.json")
    gpu = MACHINE | {"devices": {"cpu": {}, "cuda": {"name": "Big GPU"}}}
    assert store.history_file(gpu, "mann").name == "big-gpu_mann_2026-01-02.json"


def test_pytest_benchmark_compares_two_files(tmp_path):
    """The real command, on the files as they are stored."""
    a = written(tmp_path / "first.json", TIMINGS)
    b = written(tmp_path / "second.json", [row("mann_kernels", 3.0)])
    command = [Path(sys.executable).with_name("pytest-benchmark"), "compare", a, b, "--columns=median,iqr"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("lrua_step paper")]
    assert len(lines) == 4  # what has no time is left out
    ours = [float(line.split()[7].replace(",", "")) for line in lines if "mann_kernels" in line]
    assert ours[1] == 1.5 * ours[0]


@pytest.fixture
def uncompiled(monkeypatch):
    """The suite without the seconds that compiling takes."""
    monkeypatch.setattr(limits, "SIDE", {"cpu": 64})
    monkeypatch.setattr(limits, "COPIED", {"cpu": 2**12})
    bench = operators()["content_address"]
    quick = replace(bench, compiled=lambda loop: bench.eager)
    monkeypatch.setattr(front, "operators", lambda: {bench.op: quick})


def test_a_wrong_kernel_is_not_timed(monkeypatch, uncompiled, tmp_path):
    right = mann_kernels.content_address

    monkeypatch.setattr(mann_kernels, "content_address", lambda memory, key: right(OnePercentOff.apply(memory), key))
    monkeypatch.setattr(harness, "Comparison", lambda *args: pytest.fail("timed"))
    path = tmp_path / "a.json"
    result = invoke("--quick", "--device", "cpu", "--op", "content_address", "--shape", "paper", "--json", path)
    assert result.exit_code == 1
    assert "Verification failed: nothing is timed" in result.output
    assert "dmemory" in result.output
    assert not path.exists()


def test_a_slow_kernel_is_a_loss(monkeypatch, uncompiled, tmp_path):
    right = mann_kernels.content_address

    def slow(memory, key):
        time.sleep(0.02)
        return right(memory, key)

    monkeypatch.setattr(mann_kernels, "content_address", slow)
    path = tmp_path / "a.json"
    result = invoke("--quick", "--device", "cpu", "--op", "content_address", "--shape", "paper", "--json", path)
    assert result.exit_code == 0, result.output  # a time never fails a run
    stored = store.read(path)
    for group in groups.grouped(stored["timings"]):
        assert group.gain < 1
        assert group.of_fastest(group.ours) > 1
    table = tables.timings_table(stored["timings"])
    ratios = dict(zip(table.columns[5]._cells, table.columns[9]._cells, strict=True))
    assert float(ratios["mann_kernels"]) > 1
    assert invoke("report", path, "--out", tmp_path).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count('<td class="n bad">') == 1
    assert '<td class="n good">' not in page


def test_a_report_of_a_sweep(tmp_path):
    rows = []
    for value in (20, 80, 320):
        for contestant in ("mann_kernels", "eager"):
            stopped = contestant == "eager" and value > 80
            numbers = dict.fromkeys(
                ("median_ms", "q1_ms", "q3_ms", "min_ms", "saved_mb"), None if stopped else value * 0.5
            )
            head = {"variable": "T", "value": value, "contestant": contestant, "threads": 1, "device": "cpu"}
            note = sweep.OUT_OF_TIME if stopped else None
            rows.append(head | {"dtype": "float32", "note": note, "dominates": value >= 80} | numbers)
    path = written(tmp_path / "a.json", [], rows)
    assert invoke("report", path, "--out", tmp_path).exit_code == 0
    assert (tmp_path / "sweep_cpu.png").exists()
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 1
    figure = report.figures(store.read(path))["sweep_cpu"]
    above, below = figure.axes
    assert above.get_title(loc="left") == "ours ~ T^1.00 from 80"
    assert [text.get_text() for text in above.texts] == [sweep.OUT_OF_TIME]
    assert len(below.lines) == 4  # two curves, the dotted way to the mark, the mark
