"""Clips on the command line: asked, drawn frame by frame, proven, and refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from foveate.asking.pictures import FRAME
from foveate.commands.app import app
from foveate.evaluation.questions import from_folder

pytest.importorskip("av")
FILM, FOLDER = "examples/clip.mp4", "examples/clip"
FRAMES = [f"{FOLDER}/{number}.png" for number in range(1, 7)]
QUESTION = "Which way does the dog move?"


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def answer(*args) -> dict:
    result = run("ask", *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("shown", [[FILM], [FOLDER], [*FRAMES, "--clip", "--model", "glimpse-video"]], ids=str)
def test_a_clip_is_answered_whatever_it_comes_as(shown):
    words = [word for word in shown if not word.startswith("-") and word != "glimpse-video"]
    options = [word for word in shown if word not in words]
    said = answer(*words, QUESTION, "--method", "evs", "--keep", "0.5", *options)
    assert said["model"] == "glimpse-video"
    (only,) = said["answers"]
    assert only["answer"] == "right"
    assert only["images"] == [{"tokens": 384, "kept": 192}]


def test_pictures_without_a_word_stay_pictures():
    said = answer(*FRAMES, QUESTION, "--method", "evs", "--keep", "0.5", "--model", "glimpse-video")
    assert said["answers"][0]["images"] == [{"tokens": 64, "kept": 64}] * 6


def test_fewer_frames_are_looked_at_when_asked():
    assert answer(FILM, QUESTION, "--fps", "1")["answers"][0]["images"][0]["tokens"] == 192
    assert answer(FILM, QUESTION, "--max-frames", "2")["answers"][0]["images"][0]["tokens"] == 128
    assert answer(FOLDER, QUESTION, "--max-frames", "4")["answers"][0]["images"][0]["tokens"] == 256


def test_a_strip_of_frames_is_drawn(tmp_path):
    path = tmp_path / "strip.png"
    result = run("ask", FILM, QUESTION, "--method", "evs", "--keep", "0.34", "--show", path)
    assert result.exit_code == 0 and "in 1 clip" in result.output
    strip = Image.open(path)
    assert strip.width > 6 * FRAME and FRAME < strip.height < 2 * FRAME
    first, last = (strip.getpixel((14 + number * (FRAME + 14) + 5, 19)) for number in (0, 5))
    assert max(first) - min(first) > 30, "the first frame stays and has its colours"
    assert max(last) - min(last) < 12 and max(last) < 80, "of the last nothing stays"


def test_the_page_shows_every_frame(tmp_path):
    result = run("show", FILM, QUESTION, "--method", "vidcom2", "--keep", "0.5", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out/show.html").read_text("utf-8")
    assert all(f'"frame {number}"' in page for number in range(1, 7))
    assert page.count("data:image/png;base64,") == 6


def test_show_and_check_look_at_the_frames_that_were_asked_for(tmp_path):
    shown = run("show", FILM, QUESTION, "--max-frames", "2", "--out", tmp_path / "show")
    assert shown.exit_code == 0 and "of 128 image tokens in 1 clip" in shown.output
    words = [*FRAMES[:2], "--clip", QUESTION, "-m", "evs", "--steps", "1", "--out", tmp_path / "check"]
    assert run("check", *words).exit_code == 0
    assert "glimpse-video" in (tmp_path / "check/run.json").read_text()


def test_a_clip_is_proven(tmp_path):
    result = run(
        "check", FILM, QUESTION, "--method", "dycoke", "--keep", "0.5", "--steps", "4", "--out", tmp_path / "out"
    )
    assert result.exit_code == 0 and "equal" in result.output and "Nothing was dropped" not in result.output


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([FILM], "no question"),
        (["examples/demo.png", QUESTION, "--fps", "2"], "--fps and --max-frames are of clips"),
        ([FILM, QUESTION, "--clip"], "is one itself"),
        (["gone.mp4", QUESTION], "no such clip"),
        (["examples", QUESTION, "--model", "glimpse"], None),
        ([FILM, QUESTION, "--fps", "0"], "--fps"),
        ([FILM, QUESTION, "--max-frames", "0"], "--max-frames"),
    ],
)
def test_mistakes_are_one_line(args, says):
    result = run("ask", *args)
    if says is None:  # a folder of pictures is a clip, here of one frame
        assert result.exit_code == 0
    else:
        assert result.exit_code != 0 and says in result.output


def test_rows_about_clips_are_evaluated(tmp_path, undrawn):
    for name in ("clip.mp4", "clip"):
        (tmp_path / name).symlink_to((Path("examples") / name).absolute())
    rows = [
        {"clip": "clip.mp4", "question": QUESTION, "answers": ["right"]},
        {"clip": [f"clip/{number}.png" for number in range(1, 7)], "question": QUESTION, "answer": "right"},
        {"clip": "clip.mp4", "image": "clip/1.png", "question": QUESTION, "answer": "right"},
        {"clip": "gone.mp4", "question": QUESTION, "answer": "right"},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = ("--model", "glimpse-video", "--methods", "evs", "--keep", "0.5")
    result = run("eval", "--data", tmp_path, *chosen, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "both there" in result.output and "no such clip" in result.output
    found = json.loads((tmp_path / "out/rows.json").read_text())
    evs = next(row for row in found if row["method"] == "evs")
    assert (evs["questions"], evs["accuracy"], evs["kept_share"]) == (2, 1.0, 0.5)


def test_fewer_frames_of_clips_are_evaluated(tmp_path, undrawn):
    (tmp_path / "clip.mp4").symlink_to(Path(FILM).absolute())
    row = {"clip": "clip.mp4", "question": QUESTION, "answers": ["right"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    options = ["eval", "--model", "glimpse-video", "--data", tmp_path, "--methods", "evs", "--keep", "0.5"]
    options += ["--out", tmp_path / "out"]
    result = run(*options, "--max-frames", "3")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out/run.json").read_text())["settings"]["max_frames"] == 3
    other = run(*options)
    assert other.exit_code == 2 and "max_frames" in other.output, "rows of clips of 32 frames are no rows of these"
    for most, frames in ((2, 2), (40, 6)):
        (item,), _, _ = from_folder(tmp_path)
        (clip,) = replace(item, max_frames=most).shown()
        assert len(clip.frames) == frames
    refused = run("eval", "--count", "14", "--max-frames", "3", "--out", tmp_path / "none")
    assert refused.exit_code == 2 and "no question is about one" in refused.output


def test_a_clip_is_benched(tmp_path):
    result = run(
        "bench", "--geometry", "tiny", "--methods", "evs,fopru", "--frames", "8", "--new-tokens", "2", "--repeat", "1",
        "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out/rows.json").read_text())
    assert {row["image_tokens"] for row in rows} == {288} and {row["kept_tokens"] for row in rows} == {72}
    refused = run("bench", "--geometry", "llama-3.2-11b-vision", "--frames", "8", "--out", tmp_path / "no")
    assert refused.exit_code == 2 and "--frames: no synthetic clips" in refused.output
