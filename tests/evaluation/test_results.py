"""Result folders: written row by row, resumed, and never mixed."""

import csv
import json

import pytest
from typer.testing import CliRunner

from foveate.asking.mistake import Mistake
from foveate.commands.app import app
from foveate.evaluation.results import Results, read, run_script, write, write_csv

KEYS = ("method", "keep")


def results(folder, settings=None, command="eval"):
    return Results(folder, command, settings or {"model": "m", "seed": 0}, keys=KEYS)


def test_rows_are_on_disk_once_added_and_an_interrupt_keeps_them(tmp_path):
    with pytest.raises(KeyboardInterrupt), results(tmp_path / "out") as out:
        out.add({"method": "a", "keep": 0.5, "accuracy": 0.1})
        assert json.loads((tmp_path / "out/rows.json").read_text()) == out.rows
        raise KeyboardInterrupt
    rows, about = read(tmp_path / "out")
    assert rows == [{"method": "a", "keep": 0.5, "accuracy": 0.1}]
    assert about["finished"] is False and about["runs"][0]["rows"] == 1
    assert {"foveate", "torch", "transformers", "python"} == about["versions"].keys()


def test_the_same_settings_go_on(tmp_path):
    with results(tmp_path) as out:
        out.add({"method": "a", "keep": 0.5, "accuracy": 0.1})
    again = results(tmp_path)
    assert again.find(method="a", keep=0.5)["accuracy"] == 0.1 and not again.find(method="a", keep=1)
    with again:
        again.add({"method": "b", "keep": 16, "accuracy": None, "note": "new, with a comma"})
        with pytest.raises(ValueError, match="already"):
            again.add({"method": "b", "keep": 16})
    rows, about = read(tmp_path)
    assert [row["method"] for row in rows] == ["a", "b"] and about["finished"] is True
    assert [run["rows"] for run in about["runs"]] == [1, 1]
    with (tmp_path / "rows.csv").open() as file:
        assert list(csv.DictReader(file))[1] == {
            "method": "b",
            "keep": "16",
            "accuracy": "",
            "note": "new, with a comma",
        }


def state(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_rows_of_earlier_runs_are_said_and_a_run_without_new_ones_touches_nothing(tmp_path, capsys):
    with results(tmp_path) as out:
        out.add({"method": "a", "keep": 0.5, "accuracy": 0.1})
    assert capsys.readouterr() == ("", "") and out.outcome == f"wrote {tmp_path}"
    (run,) = read(tmp_path)[1]["runs"]
    when = f"{run['started'][:10]} (commit {run['commit']})" if run["commit"] else run["started"][:10]
    before = state(tmp_path)
    with results(tmp_path) as out:
        assert out.find(method="a", keep=0.5) and not out.due("rows.csv") and out.due("plot.png")
    assert state(tmp_path) == before and out.outcome == f"nothing new in {tmp_path}"
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"1 row kept, measured on {when}; 0 measured now (another --out measures anew)\n"
    with results(tmp_path) as out:
        out.add({"method": "b", "keep": 0.5, "accuracy": 0.1})
        assert out.due("rows.csv")
    assert capsys.readouterr().err == f"1 row kept, measured on {when}; 1 measured now\n"
    assert [run["rows"] for run in read(tmp_path)[1]["runs"]] == [1, 1]


def test_the_dates_of_all_runs_that_measured_are_said(tmp_path, capsys):
    runs = [
        {"command": "x", "commit": "abc1234", "started": "2026-11-21T18:14:11+00:00", "rows": 2},
        {"command": "x", "commit": None, "started": "2026-11-22T18:14:11+00:00", "rows": 1},
        {"command": "x", "commit": "def5678", "started": "2026-11-23T18:14:11+00:00", "rows": 0},
    ]

    def said(runs):
        with results(tmp_path) as out:
            pass
        about = json.loads((tmp_path / "run.json").read_text())
        (tmp_path / "run.json").write_text(json.dumps({**about, "runs": runs}))
        (tmp_path / "rows.json").write_text(json.dumps([{"method": "a", "keep": keep} for keep in (1, 2, 3)]))
        capsys.readouterr()
        with results(tmp_path) as out:
            out.add({"method": "b", "keep": 1})
        return capsys.readouterr().err

    assert said(runs) == "3 rows kept, measured on 2026-11-21 (commit abc1234), 2026-11-22; 1 measured now\n"
    many = [{**runs[0], "started": f"2026-11-2{day}T18:14:11+00:00"} for day in range(5)]
    assert said(many) == "3 rows kept, measured on 2026-11-20 to 2026-11-24 (5 runs); 1 measured now\n"
    assert said([{"command": "x"}]) == "3 rows kept; 1 measured now\n"


def test_a_stopped_run_is_finished_by_one_without_new_rows_and_gets_no_entry(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), results(tmp_path) as out:
        out.add({"method": "a", "keep": 0.5, "accuracy": 0.1})
        raise KeyboardInterrupt  # while plots are drawn
    with pytest.raises(KeyboardInterrupt), results(tmp_path) as out:
        assert out.due("rows.csv")
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "" and not read(tmp_path)[1]["finished"]
    with results(tmp_path) as out:
        assert out.due("rows.csv")
    assert "1 row kept" in capsys.readouterr().err and out.outcome == f"wrote {tmp_path}"
    _, about = read(tmp_path)
    assert about["finished"] and [run["rows"] for run in about["runs"]] == [1]


def test_csv_holds_any_text_and_quotes_only_what_needs_it(tmp_path):
    rows = [{"a": "plain", "b": 0.5}, {"a": "one\rtwo", "b": None}, {"a": "\r\n", "c": '"\n,'}, {"a": "three\r"}]
    write_csv(tmp_path / "a.csv", rows)
    assert (tmp_path / "a.csv").read_bytes() == (b'a,b,c\nplain,0.5,\n"one\rtwo",,\n"\r\n",,"""\n,"\n"three\r",,\n')
    with (tmp_path / "a.csv").open(newline="") as file:
        assert [line["a"] for line in csv.DictReader(file)] == [row["a"] for row in rows]


def test_other_settings_commands_and_folders_are_refused_and_left_alone(tmp_path):
    with results(tmp_path / "out") as out:
        out.add({"method": "a", "keep": 0.5})
    before = (tmp_path / "out/run.json").read_text()
    with pytest.raises(Mistake, match="with seed 0, not 1: give another --out"):
        results(tmp_path / "out", {"model": "m", "seed": 1})
    with pytest.raises(Mistake, match="holds results of eval"):
        results(tmp_path / "out", command="bench")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").touch()
    with pytest.raises(Mistake, match="no folder of results"):
        results(tmp_path / "mine")
    with pytest.raises(Mistake, match="is a file"):
        results(tmp_path / "mine/letter.txt")
    assert (tmp_path / "out/run.json").read_text() == before


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("/somewhere/bin/foveate", "foveate --out 'a b'"),
        ("/somewhere/foveate/__main__.py", "foveate --out 'a b'"),
        ("benchmarks/proof.py", "python benchmarks/proof.py --out 'a b'"),
    ],
)
def test_the_command_can_be_typed_again(tmp_path, monkeypatch, program, says):
    monkeypatch.setattr("sys.argv", [program, "--out", "a b"])
    with results(tmp_path / "out"):
        pass
    assert read(tmp_path / "out")[1]["runs"][0]["command"] == says


def test_nothing_is_written_before_the_work_begins(tmp_path):
    results(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_out_an_unfinished_folder_goes_on_and_a_finished_one_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt), results(None) as first:
        raise KeyboardInterrupt
    with results(None) as again:
        again.add({"method": "a", "keep": 1})
    third = results(None)
    assert first.folder == again.folder and third.folder.name == f"{first.folder.name}-2" and not third.rows


OURS = {"command": "eval", "settings": {}, "keys": [], "versions": {}, "finished": False, "runs": [{"command": "x"}]}
FOREIGN = {
    "nothing": ({}, []),
    "a list": ([], []),
    "a number": (3, []),
    "other settings": ({**OURS, "settings": None}, []),
    "no runs": ({**OURS, "runs": []}, []),
    "other runs": ({**OURS, "runs": ["x"]}, []),
    "a run without its command": ({**OURS, "runs": [{}]}, []),
    "rows that are none": (OURS, {}),
    "rows of numbers": (OURS, [1, 2]),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_json_of_other_programs_is_no_result(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results/eval-old"
    folder.mkdir(parents=True)
    for file, content in zip(("run.json", "rows.json"), FOREIGN[name], strict=True):
        (folder / file).write_text(json.dumps(content))
    with pytest.raises(Mistake, match="written by something else"):
        read(folder)
    with pytest.raises(Mistake, match="written by something else"):
        results(folder)
    assert results(None).folder.name != "eval-old"  # passed over
    table = CliRunner().invoke(app, ["table", str(folder)])
    assert table.exit_code == 2 and len(table.stderr.splitlines()) == 1


def test_the_shape_that_is_checked_is_ours(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(OURS))
    assert read(tmp_path) == ([], OURS)


def test_deep_json_is_no_result(tmp_path):
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(Mistake, match="cannot read"):
        read(tmp_path)


def test_without_out_a_folder_goes_on_where_rows_failed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with results(None) as first:
        first.complete = False
    with results(None) as again:
        pass
    assert first.folder == again.folder != results(None).folder


def test_what_cannot_be_written_leaves_no_part(tmp_path):
    assert write(tmp_path / "a.txt", "old") and not write(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write(tmp_path / "a.txt", "new \ud800")
    (tmp_path / "folder").mkdir()
    with pytest.raises(Mistake, match="cannot write"):
        write(tmp_path / "folder", "text")
    with pytest.raises(Mistake, match="cannot write"):
        write(tmp_path / "a.txt/b.txt", "text")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "folder"}
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_script_ends_with_one_line_in_a_folder_of_other_settings(tmp_path, capsys):
    with results(tmp_path / "out") as out:
        out.add({"method": "a", "keep": 0.5, "accuracy": 0.1})
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: results(tmp_path / "out", {"model": "m", "seed": 1}).add({}))
    assert ended.value.code == 2
    assert "seed" in (said := capsys.readouterr().err) and said.count("\n") == 1
