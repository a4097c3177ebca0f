"""foveate table: rows of result folders as Markdown; and the labels of the plots."""

import json
from itertools import pairwise

import pytest
from PIL import Image
from typer.testing import CliRunner

from foveate.asking.mistake import Mistake
from foveate.commands.app import app
from foveate.evaluation.evaluate import overview
from foveate.evaluation.plots import apart, curves, pareto
from foveate.evaluation.results import Results
from foveate.evaluation.tables import markdown, table


def row(method, keep, accuracy, **more):
    place = None if method == "untouched" else "encoder"
    ends = {"accuracy_low": accuracy - 0.02, "accuracy_high": accuracy + 0.02}
    share = keep or 1.0
    return {"method": method, "keep": keep, "place": place, "accuracy": accuracy, **ends, "kept_share": share, **more}


ROWS = [
    row("untouched", None, 0.98, kv_bytes=464_000),
    row("a", 0.25, 0.5, kv_bytes=116_000),
    row("a", 0.5, 0.75, kv_bytes=232_000),
    row("b", 0.5, 0.8),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["foveate", "eval", "--model", "m"])
    with Results(tmp_path / "first", "eval", {"model": "m", "seed": 0}, keys=("method", "keep")) as results:
        for each in ROWS:
            results.add(each)
    return tmp_path / "first"


def test_all_that_was_measured(folder):
    assert markdown([folder]) == (
        "| method | keep | accuracy % | kept % | kv |\n"
        "| --- | --: | --: | --: | --: |\n"
        "| untouched | – | 98.0 | 100.0 | 464 kB |\n"  # noqa: RUF001
        "| a | 0.25 | 50.0 | 25.0 | 116 kB |\n"
        "| a | 0.5 | 75.0 | 50.0 | 232 kB |\n"
        "| b | 0.5 | 80.0 | 50.0 | – |"  # noqa: RUF001
    )


def test_a_column_spread_across(folder):
    assert markdown([folder], "method,accuracy", across="keep") == (
        "| method | keep 0.5 | keep 0.25 |\n"
        "| --- | --: | --: |\n"
        "| untouched | 98.0 | 98.0 |\n"
        "| a | 75.0 | 50.0 |\n"
        "| b | 80.0 | – |"  # noqa: RUF001
    )
    wide = table(ROWS, ["method", "accuracy", "kept_share"], across="keep")
    assert wide.head[1:] == ["accuracy %, keep 0.5", "accuracy %, keep 0.25", "kept %, keep 0.5", "kept %, keep 0.25"]


def test_some_rows_sorted_with_intervals_and_the_command(folder):
    text = markdown(
        [folder], "method,accuracy", where=["keep=0.5", "keep=0.25"], sort="-accuracy", intervals=True, command=True
    )
    assert text.splitlines()[2:5] == [
        "| b | 80.0 (78.0 to 82.0) |",
        "| a | 75.0 (73.0 to 77.0) |",
        "| a | 50.0 (48.0 to 52.0) |",
    ]
    assert text.splitlines()[-1].startswith("Measured by `foveate eval --model m`")
    rest = table(ROWS, ["method", "accuracy"], across="keep", where=[("keep", 0.25)])
    assert rest.body == [["untouched", "98.0"], ["a", "50.0"]]


def test_a_key_that_is_a_number_names_rows(folder, tmp_path):
    with Results(tmp_path / "deep", "proof", {}, keys=("layers", "dtype")) as results:
        for layers in (4, 16):
            for dtype in ("float32", "bfloat16"):
                results.add({"layers": layers, "dtype": dtype, "rounding": layers + len(dtype)})
    assert markdown([tmp_path / "deep"], "layers,rounding", across="dtype") == (
        "| layers | dtype float32 | dtype bfloat16 |\n| --: | --: | --: |\n| 4 | 11 | 12 |\n| 16 | 23 | 24 |"
    )
    with pytest.raises(Mistake, match=r"one under dtype float32: add layers to --columns, or .* --where"):
        markdown([tmp_path / "deep"], "rounding", across="dtype")
    chosen = markdown([tmp_path / "deep"], "rounding", across="dtype", where=["layers=16"])
    assert chosen.splitlines()[2:] == ["| 23 | 24 |"]
    assert len(markdown([tmp_path / "deep"] * 2, "layers,rounding", across="dtype").splitlines()) == 4


def test_rows_of_several_folders_stay_apart_when_a_column_is_spread(folder, tmp_path):
    for name, accuracy in (("second", 0.25), ("more/first", 0.125)):
        with Results(tmp_path / name, "eval", {"model": name}, keys=("method", "keep")) as results:
            results.add(row("a", 0.5, accuracy))
    with pytest.raises(Mistake, match=r"add results to --columns"):
        markdown([folder, tmp_path / "second"], "method,accuracy", across="keep")
    with pytest.raises(Mistake, match=r"add method to --columns"):
        markdown([folder], "accuracy", across="keep")
    both = markdown([folder, tmp_path / "second"], "results,method,accuracy", across="keep").splitlines()
    assert both[3] == "| first | a | 75.0 | 50.0 |" and both[-1] == "| second | a | 25.0 | – |"  # noqa: RUF001
    by_model = markdown([folder, tmp_path / "second"], "method,keep,accuracy", across="model").splitlines()
    assert by_model[0] == "| method | keep | model m | model second |" and "| a | 0.5 | 75.0 | 25.0 |" in by_model
    namesake = tmp_path / "more" / "first"
    assert (
        markdown([folder, namesake], "results,method,accuracy", across="keep")
        .splitlines()[-1]
        .startswith(f"| {namesake} | a | 12.5")
    )


def test_one_token_is_not_all_tokens(tmp_path):
    with Results(tmp_path / "ends", "eval", {}, keys=("method", "keep")) as results:
        for keep, accuracy in ((1, 0.25), (1.0, 0.75), (0.25, 0.5)):
            results.add(row("a", keep, accuracy, batch=8))
    spread = markdown([tmp_path / "ends"], "method,accuracy", across="keep").splitlines()
    assert spread == [
        "| method | keep 1.0 | keep 0.25 | keep 1 |",
        "| --- | --: | --: | --: |",
        "| a | 75.0 | 50.0 | 25.0 |",
    ]
    fixed = markdown([tmp_path / "ends"], "keep,accuracy", across="batch").splitlines()
    assert fixed[2:] == ["| 1 | 25.0 |", "| 1.0 | 75.0 |", "| 0.25 | 50.0 |"]
    whole = overview(results.rows)
    assert [head.split("\n")[1] for head in whole.head] == ["keep", "1.0", "0.25", "1"]
    assert whole.body == [["a", "75.0", "50.0", "25.0"]]
    assert table(results.rows, ["keep"]).body == [["1"], ["1.0"], ["0.25"]]
    for keep, accuracy in (("1", "25.0"), ("1.0", "75.0"), ("0.25", "50.0")):
        text = markdown([tmp_path / "ends"], "keep,accuracy", where=[f"keep={keep}"])
        assert text.splitlines()[2:] == [f"| {keep} | {accuracy} |"]
    assert len(markdown([tmp_path / "ends"], where=["kept_share=1"]).splitlines()) == 4  # only a keep has two ones


def test_every_command_that_measured_is_named(folder):
    file = folder / "run.json"
    about = json.loads(file.read_text())
    (run,) = about["runs"]
    converted = {name: value for name, value in run.items() if name != "rows"} | {"command": "python old.py"}
    idle = {**run, "command": "foveate eval --again", "rows": 0}
    more = {**run, "command": "foveate eval --methods b", "rows": 1}
    file.write_text(json.dumps({**about, "runs": [run, idle, more, converted, more]}))
    assert markdown([folder], command=True).splitlines()[-1] == (
        "Measured by `foveate eval --model m` and `foveate eval --methods b` and `python old.py`."
    )


def test_several_folders_tell_their_rows_apart_by_name_and_settings(folder, tmp_path):
    with Results(tmp_path / "second", "eval", {"model": "n", "seed": 0}, keys=("method", "keep")) as results:
        results.add(row("a|b", 0.5, 0.25))
    text = markdown([folder, tmp_path / "second"], "model,method,accuracy", where=["keep=0.5"])
    assert text.splitlines()[2:] == ["| m | a | 75.0 |", "| m | b | 80.0 |", "| n | a\\|b | 25.0 |"]
    assert markdown([folder, tmp_path / "second"]).splitlines()[-1].startswith("| second | a")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--columns", "method,speed"], "no column 'speed'; there are"),
        (["--across", "speed"], "no column 'speed'"),
        (["--where", "keep"], "write column=value"),
        (["--where", "keep=3"], "no row with keep=3"),
        (["--sort", "-speed"], "no column 'speed'"),
    ],
)
def test_mistakes(folder, options, says):
    result = CliRunner().invoke(app, ["table", str(folder), *options])
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert says in line and "accuracy_low" not in line


def test_an_empty_folder_of_results_is_a_mistake(tmp_path):
    with Results(tmp_path / "none", "eval", {}, keys=("method",)):
        pass
    with pytest.raises(Mistake, match="no finished row"):
        markdown([tmp_path / "none"])


def test_labels_move_apart_and_stay_inside():
    assert apart([0.0, 50.0], 4, 100) == [0.0, 50.0]
    crowded = apart([97.0, 98.0, 98.0, 99.0, 20.0], 4, 100)
    assert min(b - a for a, b in pairwise(sorted(crowded))) >= 4 - 1e-9
    assert max(crowded) <= 100 and crowded[4] == 20.0
    assert sorted(range(5), key=crowded.__getitem__)[0] == 4  # in their order


def test_plots_of_twenty_methods(tmp_path):
    rows = [row("untouched", None, 0.98)]
    for place in ("encoder", "layer", "cache"):
        for index in range(7):
            rows += [row(f"{place} {index}", keep, 0.9 * keep**0.1, place=place) for keep in (0.5, 0.25, 0.1)]
    rows += [row("uniform", keep, 0.6 * keep**0.1) for keep in (0.5, 0.25, 0.1)]
    curves(rows, tmp_path / "curves.png", dashed=("uniform",))
    pareto(rows, tmp_path / "pareto.png", x="kept_share")
    for name in ("curves", "pareto"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").resize((200, 200)).getcolors(40_000)) > 20
