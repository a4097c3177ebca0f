"""Films and folders of frames are opened safely; every mistake is one sentence."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from foveate.asking import clips
from foveate.asking.clips import Clip, frames_of, in_turn, is_clip, open_clip, pictures_each, told
from foveate.asking.mistake import Mistake
from foveate.asking.pictures import by_frame
from foveate.glimpse.clips import imagine

av = pytest.importorskip("av")
FILM, FOLDER = "examples/clip.mp4", "examples/clip"


def film(path, frames: int, rate: int = 10, size=(32, 24), container: str | None = None):
    """A film whose n-th frame is a grey that tells its number."""
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream("libx264", rate=rate, options={"crf": "0", "g": "5"})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv444p"
        for number in range(frames):
            picture = Image.new("RGB", size, (number % 25 * 10,) * 3)
            out.mux(stream.encode(av.VideoFrame.from_image(picture)))
        out.mux(stream.encode())
    return path


def numbers(clip: Clip) -> list[int]:
    return [round(frame.getpixel((4, 4))[0] / 10) for frame in clip.frames]


def test_a_film_and_its_folder_show_the_same():
    one, other = open_clip(FILM), open_clip(FOLDER)
    assert one.times == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5) and one.fps == 2.0
    assert other.times is None and len(other.frames) == len(one.frames) == 6
    for a, b in zip(one.frames, other.frames, strict=True):
        assert a.size == b.size and a.mode == "RGB"
        assert max(abs(x - y) for x, y in zip(a.getpixel((40, 180)), b.getpixel((40, 180)), strict=True)) < 30


@pytest.mark.parametrize(
    ("fps", "most", "expected"),
    [
        (10, 99, range(20)),
        (5, 99, range(0, 20, 2)),
        (2, 99, [0, 5, 10, 15]),
        (3, 99, [0, 4, 7, 10, 14, 17]),  # the first frame at or behind each third of a second
        (100, 99, range(20)),
        (0.1, 99, [0]),
        (10, 4, [0, 4, 12, 16]),  # thinned to every fourth while it was read
        (10, 1, [16]),
    ],
)
def test_frames_are_taken_at_the_rate_and_an_even_stride(tmp_path, fps, most, expected):
    assert numbers(open_clip(film(tmp_path / "a.mp4", 20), fps, most)) == list(expected)


def test_a_long_film_is_never_held_whole(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(clips, "_upright", lambda frame: held.append(1) or Image.new("RGB", (2, 2)))
    clip = open_clip(film(tmp_path / "a.mp4", 300, size=(16, 16)), 1000, 4)
    assert len(clip.frames) == 4 and len(held) < 60
    steps = [b - a for a, b in zip(clip.times, clip.times[1:], strict=False)]
    assert clip.times[-1] > 15 and max(steps) < 2 * min(steps)


def mistake(path, **limits) -> str:
    with pytest.raises(Mistake) as error:
        open_clip(path, **limits)
    assert "\n" not in str(error.value) and str(error.value)
    return str(error.value)


def test_what_is_no_clip_is_said_in_one_sentence(tmp_path, monkeypatch):
    whole = film(tmp_path / "a.mp4", 12).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("I am no film\n" * 50)
    (tmp_path / "bare").mkdir()
    assert "broken" in mistake(tmp_path / "cut.mp4") and "broken" in mistake(tmp_path / "empty.mp4")
    assert "no film" in mistake(tmp_path / "text.mp4")
    assert "no such clip" in mistake(tmp_path / "gone.mp4")
    assert "folder without pictures" in mistake(tmp_path / "bare")
    assert "may never end" in mistake("/dev/zero")
    assert "web address" in mistake("https://example.org/a.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        out.mux(stream.encode(sound))
        out.mux(stream.encode())
    assert "only sound" in mistake(tmp_path / "sound.mp4")
    monkeypatch.setattr(clips, "LONGEST", 8)
    assert "goes on after 8 frames" in mistake(tmp_path / "a.mp4")


def test_a_film_that_breaks_off_says_where(tmp_path):
    path = film(tmp_path / "a.mkv", 60, container="matroska")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = b"\xff" * 400
    path.write_bytes(data)
    try:
        assert 0 < len(open_clip(path, 10, 99).frames) <= 60  # decoders hide what they can
    except Mistake as error:
        assert "broken behind frame" in str(error)


def test_without_av_there_are_folders(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert 'pip install "foveate[video]"' in mistake(FILM)
    assert len(open_clip(FOLDER).frames) == 6


def test_what_is_a_clip():
    assert is_clip("film.MP4") and is_clip(FOLDER) and not is_clip("photo.jpg") and not is_clip("x" * 5000)


def test_frames_are_pictures_where_the_processor_knows_no_videos():
    picture, clip = Image.new("L", (4, 4)), Clip(imagine(np.random.default_rng(0)).pictures(8))
    plain, native = SimpleNamespace(), SimpleNamespace(video_processor=object())
    assert [part["type"] for part in in_turn([picture, clip], plain)] == ["image"] * 7
    assert told([picture, clip], plain) == {} and told([picture], native) == {}
    assert [part["type"] for part in in_turn([picture, clip], native)] == ["image", "video"]
    known = told([clip], native)["videos_kwargs"]
    assert known["do_sample_frames"] is False and known["video_metadata"][0]["total_num_frames"] == 6
    assert pictures_each([picture, clip], {}) == [1, 6] and pictures_each([picture], {}) is None
    assert pictures_each([clip], {"pixel_values_videos": 0}) is None
    assert frames_of(picture) == (picture,)


def test_pictures_that_a_model_joins_are_drawn_once():
    frames = [Image.new("RGB", (2, 2)) for _ in range(4)]
    tiles = [SimpleNamespace(frame=number) for number in (0, 1)]
    assert [(frame is frames[2 * n], part) for n, (frame, part) in enumerate(by_frame(frames, tiles))] == [
        (True, [tiles[0]]),
        (True, [tiles[1]]),
    ]
    assert by_frame(frames[:1], []) == [(frames[0], [])]
