"""The command line: answers, pictures of any kind, and one clear line for every mistake."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import foveate
import foveate.glimpse
from foveate.asking.mistake import Mistake
from foveate.asking.pictures import DIM, HEIGHT, MARGIN, crop_as_seen, draw_kept, open_picture
from foveate.commands.app import app

QUESTION = "What is in the picture?"
SHORT = ("--max-new-tokens", 8)  # of a long answer to it, which takes long to time


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def ask_json(*args):
    result = run("ask", *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder of pictures and model folders, good and bad."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (112, 112, 3), dtype=np.uint8))
    picture.save(folder / "good.png")
    picture.save(folder / "good.jpg", quality=90)
    Image.new("RGB", (168, 168), "white").save(folder / "white.png")
    for name in ("good.png", "good.jpg"):
        data = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("I am no picture\n")
    (folder / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + rng.bytes(500))
    Image.new("1", (10_000, 10_000)).save(folder / "bomb.png")
    Image.new("1", (20_000, 10_000)).save(folder / "big-bomb.png")
    (folder / "folder").mkdir()

    for name, config in (
        ("bert", {"model_type": "bert"}),
        ("alien", {"model_type": "alien"}),
        ("typeless", {}),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "garbled").mkdir()
    (folder / "garbled/config.json").write_text("{")
    for name in ("weightless", "corrupt", "mute"):
        (folder / name).mkdir()
        for part in foveate.glimpse.PATH.iterdir():
            if part.is_file() and (name, part.suffix) != ("mute", ".jinja") and part.suffix != ".safetensors":
                (folder / name / part.name).symlink_to(part)
    (folder / "corrupt/model.safetensors").write_bytes(b"0" * 64)
    weights = next(foveate.glimpse.PATH.glob("*.safetensors"))
    (folder / "mute" / weights.name).symlink_to(weights)
    # Guides: glimpse's small model with a tokenizer, without one, and with one of other words.
    words = (foveate.glimpse.PATH / "tokenizer.json").read_text()
    for name, tokenizer in (
        ("guide", words),
        ("deaf", None),
        ("stranger", words.replace('"owl"', '"eagle"')),
    ):
        (folder / name).mkdir()
        for part in foveate.glimpse.SMALL_PATH.iterdir():
            (folder / name / part.name).symlink_to(part)
        if tokenizer is not None:
            (folder / name / "tokenizer.json").write_text(tokenizer)
            (folder / name / "tokenizer_config.json").symlink_to(foveate.glimpse.PATH / "tokenizer_config.json")
    return folder


MISTAKES = {
    "no arguments": (["ask"], "Missing argument"),
    "only a question": (["ask", "What is this?"], "no image"),
    "only an image": (["ask", "good.png"], "no question"),
    "only images": (["ask", "good.png", "white.png"], "no question"),
    "question is a missing file": (["ask", "good.png", "other.jpg"], "no question"),
    "empty question": (["ask", "good.png", " "], "question is empty"),
    "no such picture": (["ask", "nowhere.png", QUESTION], "no such picture: nowhere.png"),
    "second picture missing": (["ask", "good.png", "nowhere.png", QUESTION], "no such picture: nowhere.png"),
    "picture is a folder": (["ask", "folder", QUESTION], "is a folder"),
    "picture has an endless name": (["ask", "A" * 400, QUESTION], "A... is too long for the name of a file"),
    "picture has an endless path": (["ask", "A/" * 400, QUESTION], "no such picture: A/A/"),
    "picture is a web address": (["ask", "https://example.org/a.png", QUESTION], "download"),
    "picture is empty": (["ask", "empty.png", QUESTION], "empty.png is empty"),
    "picture is text": (["ask", "text.png", QUESTION], "no picture that Pillow can read"),
    "picture is noise": (["ask", "noise.png", QUESTION], "noise.png"),
    "truncated PNG": (["ask", "cut-good.png", QUESTION], "broken or truncated"),
    "truncated JPEG": (["ask", "cut-good.jpg", QUESTION], "broken or truncated"),
    "decompression bomb": (["ask", "bomb.png", QUESTION], "million pixels"),
    "large decompression bomb": (["ask", "big-bomb.png", QUESTION], "million pixels"),
    "unknown method": (
        ["ask", "good.png", QUESTION, "--method", "magic"],
        "unknown method 'magic'; known: ",
    ),
    "keep is zero": (["ask", "good.png", QUESTION, "--keep", "0"], "keep"),
    "keep is 0.0": (["ask", "good.png", QUESTION, "--keep", "0.0"], "(0, 1]"),
    "keep above one": (["ask", "good.png", QUESTION, "--keep", "1.5"], "(0, 1]"),
    "keep negative": (["ask", "good.png", QUESTION, "--keep", "-0.5"], "(0, 1]"),
    "keep is a word": (["ask", "good.png", QUESTION, "--keep", "half"], "--keep half is no number"),
    "keep is a bool": (["ask", "good.png", QUESTION, "--keep", "true"], "--keep true is no number"),
    "keep is nan": (["ask", "good.png", QUESTION, "--keep", "nan"], "not a finite number"),
    "option without =": (["ask", "good.png", QUESTION, "-o", "strategy"], "write name=value"),
    "option without name": (["ask", "good.png", QUESTION, "-o", "=row"], "write name=value"),
    "unknown option": (["ask", "good.png", QUESTION, "-m", "fopru", "-o", "colour=red"], "fopru has keep, strategy"),
    "bad option value": (
        ["ask", "good.png", QUESTION, "-m", "fopru", "-o", "strategy=spiral"],
        'must be "rank" or "row"',
    ),
    "option of a wrong type": (
        ["ask", "good.png", QUESTION, "-m", "plphp", "-o", "delta=big"],
        "delta must be",
    ),
    "option given twice": (["ask", "good.png", QUESTION, "--keep", "0.5", "-o", "keep=0.5"], "given twice"),
    "method does not fit": (
        ["ask", "good.png", QUESTION, "-m", "trimmed_llama"],
        "which llava models lack: use",
    ),
    "unknown family": (["ask", "good.png", QUESTION, "--model", "bert"], "bert"),
    "unknown architecture": (["ask", "good.png", QUESTION, "--model", "alien"], "alien"),
    "model without type": (["ask", "good.png", QUESTION, "--model", "typeless"], "model_type"),
    "model config is garbled": (
        ["ask", "good.png", QUESTION, "--model", "garbled"],
        "cannot read the model garbled",
    ),
    "model folder is empty": (["ask", "good.png", QUESTION, "--model", "folder"], "no config.json"),
    "model folder is missing": (
        ["ask", "good.png", QUESTION, "--model", "./nowhere"],
        "no such model folder",
    ),
    "model is a file": (["ask", "good.png", QUESTION, "--model", "good.png"], "is a file"),
    "model without weights": (
        ["ask", "good.png", QUESTION, "--model", "weightless"],
        "cannot load the model",
    ),
    "model with corrupt weights": (
        ["ask", "good.png", QUESTION, "--model", "corrupt"],
        "cannot load the model",
    ),
    "model without chat template": (["ask", "good.png", QUESTION, "--model", "mute"], "no chat template"),
    "unknown device": (["ask", "good.png", QUESTION, "--device", "banana"], "no device 'banana'"),
    "unknown dtype": (["ask", "good.png", QUESTION, "--dtype", "int3"], "--dtype int3 is unknown"),
    "unknown attention": (["ask", "good.png", QUESTION, "--attn", "magic"], "magic"),
    "too few new tokens": (["ask", "good.png", QUESTION, "--max-new-tokens", "0"], "max-new-tokens"),
    "drawing is no PNG": (["ask", "good.png", QUESTION, "--show", "out.jpg"], "must end in .png"),
    "drawing into no folder": (
        ["ask", "good.png", QUESTION, "--show", "nowhere/out.png"],
        "no folder nowhere",
    ),
    "drawing onto a folder": (["ask", "good.png", QUESTION, "--show", "folder.png"], "is a folder"),
    "placeholder in the question": (["ask", "good.png", "Is <image> red?"], "<image>"),
    "no guide": (["ask", "good.png", QUESTION, "-m", "sgl", "--model", "weightless"], "by --guide"),
    "guide for nobody": (["ask", "good.png", QUESTION, "--guide", "guide"], "none of the methods takes a guide"),
    "the built-in guide": (
        ["ask", "good.png", QUESTION, "-m", "sgl", "--model", "weightless", "--guide", "glimpse"],
        "glimpse only",
    ),
    "guide as an option": (["ask", "good.png", QUESTION, "-m", "sgl", "-o", "guide=guide"], "is given by --guide"),
    "guide folder is missing": (["ask", "good.png", QUESTION, "-m", "sgl", "--guide", "./nowhere"], "(--guide takes"),
    "guide folder is empty": (["ask", "good.png", QUESTION, "-m", "sgl", "--guide", "folder"], "no config.json"),
    "guide of another family": (["ask", "good.png", QUESTION, "-m", "sgl", "--guide", "bert"], "give one of llava"),
    "guide without tokenizer": (["ask", "good.png", QUESTION, "-m", "sgl", "--guide", "deaf"], "the tokenizers of"),
    "guide that reads otherwise": (["ask", "good.png", QUESTION, "-m", "sgl", "--guide", "stranger"], "tokenizer than"),
    "guide without weights": (["ask", "good.png", QUESTION, "-m", "sgl", "--guide", "weightless"], "cannot load"),
    "guide of bench": (["bench", "--model", "glimpse", "--methods", "sgl"], "guide of sgl is missing"),
    "unknown flag": (["ask", "good.png", QUESTION, "--kep", "0.5"], "--kep"),
    "unknown command": (["answer"], "answer"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_line_that_names_it(mistake, files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "folder.png").mkdir(exist_ok=True)
    args, expected = MISTAKES[mistake]
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("foveate: ")
    assert expected in line
    assert "Traceback" not in line and len(line) < 500


def test_a_model_that_is_nowhere_ends_with_one_line_in_a_real_process(files):
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "foveate", "ask", "good.png", QUESTION, "--model", "nobody/nothing"]
    result = subprocess.run(command, cwd=files, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("foveate: cannot find, here or on the hub, the model nobody/nothing")


def test_cuda_is_refused_where_there_is_none(files, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")  # and then nothing to refuse
    result = run("ask", files / "good.png", QUESTION, "--device", "cuda")
    assert result.exit_code == 2
    assert "try --device cpu" in result.stderr


def test_other_errors_keep_their_traceback(files, monkeypatch):
    def fail(path):
        raise KeyError("a bug of ours")

    monkeypatch.setattr("foveate.asking.pictures.open_picture", fail)
    assert isinstance(run("ask", files / "good.png", QUESTION).exception, KeyError)


def test_the_answer_is_printed_with_what_was_kept(files):
    result = run("ask", files / "good.png", QUESTION, "--method", "fopru", "--keep", "0.25")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "36" in result.stdout
    assert "144" in result.stdout


def test_json_has_its_schema(files):
    out = ask_json(files / "good.png", QUESTION, "-m", "plphp", "--keep", "0.5", "-o", "delta=0.1", "-o", "alpha=none")
    assert set(out) == {"model", "guide", "device", "dtype", "images", "question", "timing", "answers"}
    assert (out["model"], out["timing"]) == ("glimpse", None)
    assert out["images"] == [str(files / "good.png")]
    assert out["question"] == QUESTION
    (answer,) = out["answers"]
    assert answer["method"] == "plphp"
    assert answer["options"] == {"keep": 0.5, "delta": 0.1, "alpha": None}
    assert isinstance(answer["answer"], str)
    ((image),) = answer["images"]
    assert image["tokens"] == 144
    assert 0 < image["kept"] < 144
    assert 0 < answer["kv_bytes"] < answer["kv_bytes_unpruned"]
    assert answer["first_token_s"] is None is answer["ms_per_token"]


def test_compare_sets_every_method_beside_the_untouched_model(files):
    out = ask_json(files / "good.png", QUESTION, "-m", "fopru", "-m", "plphp", "--keep", "0.25", "--compare", *SHORT)
    untouched, fopru, plphp = out["answers"]
    assert [a["method"] for a in out["answers"]] == [None, "fopru", "plphp"]
    assert out["timing"]["runs"] > 1
    assert untouched["images"] == [{"tokens": 144, "kept": 144}]
    assert fopru["images"] == [{"tokens": 144, "kept": 36}]
    assert untouched["kv_bytes"] == untouched["kv_bytes_unpruned"] == fopru["kv_bytes_unpruned"]
    assert fopru["kv_bytes"] < untouched["kv_bytes"] > plphp["kv_bytes"]
    for answer in out["answers"]:
        assert 0 < answer["first_token_s"] < 60
        assert 0 < answer["ms_per_token"] < 60_000


def test_compare_prints_a_table_that_says_how_it_measured(files):
    result = run("ask", files / "good.png", QUESTION, "--compare", *SHORT)
    assert result.exit_code == 0, result.output
    for part in ("untouched", "divprune keep 0.25", "144 of 144", "36 of 144", "kB", "medians"):
        assert part in result.stdout


def test_keep_all_answers_like_the_untouched_model(files):
    untouched, pruned = ask_json(files / "good.png", QUESTION, "--keep", "1.0", "--compare")["answers"]
    assert pruned["answer"] == untouched["answer"]
    assert pruned["kv_bytes"] == untouched["kv_bytes"]


def test_glimpse_brings_a_guide_and_another_may_be_given(files, tmp_path):
    own, given = (
        ask_json(files / "good.png", QUESTION, "-m", "sgl", "--compare", *SHORT, *guide)
        for guide in ([], ["--guide", files / "guide"])
    )
    assert (own["guide"], given["guide"]) == (None, str(files / "guide"))
    for untouched, sgl in (own["answers"], given["answers"]):
        assert untouched["guide"] is None
        assert sgl["images"] == [{"tokens": 144, "kept": 43}] and sgl["options"] == {"keep": 0.3}
        assert sgl["kv_bytes"] < sgl["kv_bytes_unpruned"] == untouched["kv_bytes"]
        assert not sgl["guide"]["alone"] and sgl["guide"]["score"] is None
        assert sgl["first_token_s"] > 0 and sgl["ms_per_token"] > 0
    assert own["answers"][1]["answer"] == given["answers"][1]["answer"]
    assert own["answers"][1]["guide"] == given["answers"][1]["guide"]


def test_a_guide_that_answers_alone_is_said_to(files, tmp_path):
    words = (files / "white.png", QUESTION, "-m", "sgl", "-o", "exit_threshold=0.0")
    out = tmp_path / "kept.png"
    (answer,) = ask_json(*words)["answers"]
    assert answer["guide"]["alone"] and answer["answer"] == answer["guide"]["answer"]
    assert 0 < answer["guide"]["score"] <= 1
    assert (answer["images"], answer["kv_bytes"]) == ([{"tokens": 144, "kept": 0}], 0)
    assert "the guide answered alone (score" in run("ask", *words).stdout
    compared = run("ask", *words, "--compare", "--show", out, *SHORT)
    assert compared.exit_code == 0, compared.output
    assert "answered alone" in compared.stdout and "not timed" in compared.stdout
    assert "144 of 144" in compared.stdout and "0 of 144" in compared.stdout
    assert np.asarray(Image.open(out))[:HEIGHT].min() == 255, "nothing is darkened"


def test_an_integer_keep_is_a_number_of_tokens(files):
    assert ask_json(files / "good.png", QUESTION, "--keep", "9")["answers"][0]["images"][0]["kept"] == 9


def test_several_images_go_in_order(files):
    out = ask_json(files / "good.png", files / "white.png", files / "good.jpg", QUESTION, "--keep", "0.25")
    assert out["answers"][0]["images"] == [{"tokens": 144, "kept": 36}] * 3


def test_one_option_reaches_the_methods_that_have_it(files):
    out = ask_json(files / "good.png", QUESTION, "-m", "fopru", "-m", "plphp", "-o", "strategy=row", *SHORT)
    assert [a["options"] for a in out["answers"]] == [{"keep": 0.25, "strategy": "row"}, {"keep": 0.4}]


def test_show_darkens_exactly_the_dropped_cells(files, tmp_path):
    out = tmp_path / "kept.png"
    result = run("ask", files / "white.png", QUESTION, "--keep", "0.25", "--show", out)
    assert result.exit_code == 0, result.output
    assert str(out) in result.stderr.replace("\n", "")
    picture = Image.open(out).convert("L")
    assert picture.width == HEIGHT + 2 * MARGIN
    assert HEIGHT < picture.height < HEIGHT + 150
    centres = MARGIN + (np.arange(12) + 0.5) * HEIGHT / 12
    cells = np.asarray(picture)[np.ix_(centres.astype(int), centres.astype(int))]
    assert (cells == 255).sum() == 36
    assert (abs(cells - 255 * DIM) < 2).sum() == 108


def test_show_draws_every_image_and_every_variant(files, tmp_path):
    out = tmp_path / "kept.png"
    args = ["-m", "fopru", "-m", "plphp", "--compare", "--show", out, "--json", *SHORT]
    result = run("ask", files / "white.png", files / "white.png", QUESTION, *args)
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)
    assert result.stderr == ""
    picture = Image.open(out)
    assert picture.width == 2 * HEIGHT + 3 * MARGIN
    assert picture.height > 3 * HEIGHT


def test_show_of_a_per_head_method_has_shades(files, tmp_path):
    out = tmp_path / "kept.png"
    assert run("ask", files / "white.png", QUESTION, "-m", "plphp", "--show", out).exit_code == 0
    shades = np.unique(np.asarray(Image.open(out).convert("L"))[MARGIN : HEIGHT + MARGIN, MARGIN : HEIGHT + MARGIN])
    assert len(shades) > 2


def test_nothing_but_json_reaches_a_real_stdout(files):
    command = [sys.executable, "-m", "foveate", "ask", "good.png", QUESTION, "--json"]
    result = subprocess.run(command, cwd=files, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["answers"][0]["method"] == "divprune"
    assert result.stderr == ""


def test_methods_and_families_are_listed():
    methods = json.loads(run("methods", "--json").stdout)
    assert [m["name"] for m in methods] == foveate.methods()
    assert {"name", "place", "summary", "source", "options", "types", "choices", "families"} == set(methods[0])
    families = json.loads(run("families", "--json").stdout)
    assert [f["model_type"] for f in families] == foveate.families()
    fitting = {f["model_type"]: f["methods"] for f in families}
    assert "trimmed_llama" in fitting["mllama"]
    assert "trimmed_llama" not in fitting["llava"]
    assert "fopru" in run("methods").stdout
    assert "qwen2_5_vl" in run("families").stdout


def test_version_and_help():
    assert run("--version").stdout == f"foveate {foveate.__version__}\n"
    assert run("ask", "--help").exit_code == 0


# --- pictures ---


def half(mode, left, right, **info):
    """A picture of 40 x 20 whose halves differ."""
    image = Image.new(mode, (40, 20), left)
    image.paste(right, (20, 0, 40, 20))
    image.info.update(info)
    return image


def colours(path):
    image = open_picture(path)
    assert image.mode == "RGB"
    return [image.getpixel((x, image.height // 2)) for x in (5, image.width - 5)]


def test_transparency_shows_white(tmp_path):
    half("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert colours(tmp_path / "a.png") == [(255, 0, 0), (255, 255, 255)]
    half("LA", (90, 255), (0, 0)).save(tmp_path / "la.png")
    assert colours(tmp_path / "la.png") == [(90, 90, 90), (255, 255, 255)]


def test_palette_with_transparency_shows_white(tmp_path):
    image = half("P", 0, 1)
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.save(tmp_path / "a.png", transparency=1)
    image.save(tmp_path / "a.gif", transparency=1)
    assert colours(tmp_path / "a.png") == colours(tmp_path / "a.gif") == [(255, 0, 0), (255, 255, 255)]


def test_orientation_tag_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees
    half("RGB", "red", "blue").save(tmp_path / "a.png", exif=exif)
    image = open_picture(tmp_path / "a.png")
    assert image.size == (20, 40)
    assert image.getpixel((10, 2)) == (255, 0, 0)
    assert image.getpixel((10, 37)) == (0, 0, 255)


def test_cmyk_becomes_rgb(tmp_path):
    half("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)).save(tmp_path / "a.jpg", quality=100)
    left, right = colours(tmp_path / "a.jpg")
    assert left[0] > 200 > 60 > left[1]
    assert max(right) < 60


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_greys_keep_their_range(tmp_path, name):
    pixels = np.full((20, 40), 65535, np.uint16)
    pixels[:, :20] = 32768
    Image.fromarray(pixels).save(tmp_path / name)
    assert colours(tmp_path / name) == [(128, 128, 128), (255, 255, 255)]


def test_float_and_32_bit_greys_keep_their_range(tmp_path):
    half("F", 0.5, 1.0).save(tmp_path / "f.tif")
    assert colours(tmp_path / "f.tif") == [(128, 128, 128), (255, 255, 255)]
    half("I", 0, 65535).save(tmp_path / "i.tif")
    assert colours(tmp_path / "i.tif") == [(0, 0, 0), (255, 255, 255)]


def test_bilevel_and_lab_pictures_open(tmp_path):
    half("1", 0, 1).save(tmp_path / "a.png")
    assert colours(tmp_path / "a.png") == [(0, 0, 0), (255, 255, 255)]
    Image.new("LAB", (40, 20), (255, 128, 128)).save(tmp_path / "a.tif")
    assert min(colours(tmp_path / "a.tif")[0]) > 240


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations_show_their_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (40, 20), colour) for colour in ("white", "black", "black")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
    assert min(colours(tmp_path / name)[0]) > 240


def test_a_bomb_is_refused_before_it_is_unpacked(files):
    start = time.perf_counter()
    with pytest.raises(Mistake, match="million pixels"):
        open_picture(files / "big-bomb.png")
    assert time.perf_counter() - start < 0.5


def test_centre_crop_is_followed():
    processor = SimpleNamespace(do_center_crop=True, size={"shortest_edge": 10}, crop_size={"height": 10, "width": 10})
    picture = half("RGB", "red", "blue")
    assert crop_as_seen(picture, processor).size == (20, 20)
    assert crop_as_seen(picture, processor).getpixel((0, 0)) == (255, 0, 0)
    assert crop_as_seen(picture, SimpleNamespace(do_center_crop=False)) is picture
    processor.image_grid_pinpoints = [[20, 20]]
    assert crop_as_seen(picture, processor) is picture


def test_the_finer_tile_is_drawn_over_the_overview():
    overview = SimpleNamespace(index=torch.arange(4), grid=(2, 2), box=(0, 0, 1, 1))
    crop = SimpleNamespace(index=torch.arange(4, 8), grid=(2, 2), box=(0, 0, 0.5, 1))
    share = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1.0])  # the overview drops below left, the crop above left
    drawn = np.asarray(draw_kept(Image.new("RGB", (100, 100), "white"), [crop, overview], share).convert("L"))
    quarter = HEIGHT // 8
    assert drawn[quarter, quarter] < 80
    assert drawn[quarter, 3 * quarter] == 255
    assert drawn[5 * quarter, quarter] == 255
    assert drawn[5 * quarter, 5 * quarter] == 255
