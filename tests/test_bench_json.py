"""Where the bench is to write is asked before anything is timed."""

import pytest
from typer.testing import CliRunner

from bench import store
from bench.__main__ import app


@pytest.mark.parametrize("command", [[], ["sweep"]])
def test_json_that_cannot_be_written_is_told_first(command, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "r.json", tmp_path):
        result = CliRunner().invoke(app, [*command, "--json", str(path)], env={"COLUMNS": "200"})
        assert result.exit_code == 2
        assert "--json" in result.output
        assert "Verif" not in result.output


def test_asking_changes_nothing(tmp_path):
    kept = tmp_path / "file"
    kept.write_text("kept")
    assert store.writable(kept) == kept
    assert store.writable(tmp_path / "new") == tmp_path / "new"
    assert kept.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert store.writable(tmp_path / "made" / "new").parent.is_dir()
