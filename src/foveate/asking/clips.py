"""Opens clips: films of any kind that FFmpeg reads, and folders of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from foveate.asking.mistake import Mistake, one_line
from foveate.asking.pictures import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

FILMS = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv", ".wmv", ".flv", ".3gp"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"}
FPS = 2.0  # frames looked at for each second of a film
MAX_FRAMES = 32
LONGEST = 200_000  # frames that are decoded at most: two hours of a film
T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """Frames in their order. times: when each is shown, in seconds; None where nobody knows."""

    frames: tuple[Image, ...]
    times: tuple[float, ...] | None = None

    @staticmethod
    def of(pictures: Sequence[Image | Clip], most: int) -> Clip:
        """A clip of these frames, of more than `most` so many at an even stride."""
        return Clip(tuple(_evenly([frame for one in pictures for frame in frames_of(one)], most)))

    @property
    def fps(self) -> float:
        """Frames a second, of those that are here."""
        if self.times is None or len(self.times) < 2 or self.times[-1] <= self.times[0]:
            return FPS
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def frames_of(shown: Image | Clip) -> tuple[Image, ...]:
    """The frames of a clip; a picture is one."""
    return shown.frames if isinstance(shown, Clip) else (shown,)


def in_turn(shown: Sequence[Image | Clip], processor: Any) -> list[dict[str, Any]]:
    """Pictures and clips as parts of a turn of the chat template.

    A clip is a video where the processor knows videos, else its frames are pictures.
    """
    parts: list[dict[str, Any]] = []
    for one in shown:
        if isinstance(one, Clip) and takes_videos(processor):
            parts.append({"type": "video", "video": list(one.frames)})
        else:
            parts += [{"type": "image", "image": frame.convert("RGB")} for frame in frames_of(one)]
    return parts


def told(shown: Sequence[Image | Clip], processor: Any) -> dict[str, Any]:
    """What a processor must be told of the clips of a batch: options of its call."""
    clips = [one for one in shown if isinstance(one, Clip)]
    if not clips or not takes_videos(processor):
        return {}
    known = [
        {"total_num_frames": n, "frames_indices": list(range(n)), "fps": clip.fps, "duration": n / clip.fps}
        for clip, n in ((clip, len(clip.frames)) for clip in clips)
    ]
    # The frames were chosen here: the processor takes them all.
    return {"videos_kwargs": {"do_sample_frames": False, "video_metadata": known}}


def takes_videos(processor: Any) -> bool:
    """Whether a processor has a way of its own for videos."""
    return getattr(processor, "video_processor", None) is not None


def pictures_each(shown: Sequence[Image | Clip], inputs: Mapping[str, Any]) -> list[int] | None:
    """For `Pruned.clips`, of how many pictures each clip and picture is; None where a video comes as one, or no clip.

    inputs: of the model, as its processor made them.
    """
    if not any(isinstance(one, Clip) for one in shown) or "pixel_values_videos" in inputs:
        return None
    return [len(frames_of(one)) for one in shown]


def is_clip(path: str | Path) -> bool:
    """Whether a name stands for a clip: a folder, or a film by its ending."""
    return Path(path).suffix.lower() in FILMS or (len(str(path)) < 300 and Path(path).is_dir())


def open_clip(path: str | Path, fps: float = FPS, max_frames: int = MAX_FRAMES) -> Clip:
    """Read a film, or the pictures of a folder in the order of their names.

    fps: how many frames of each second of a film are looked at. max_frames: of more, so many at an even stride.

    Raises:
        Mistake: for a missing, broken or endless film, one without pictures, or a folder without any.
    """
    path = Path(path)
    if str(path).startswith(("http:", "https:")):
        raise Mistake(f"{path} is a web address: download the clip and give the file")
    if path.is_dir():
        names = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        if not names:
            raise Mistake(f"{path} is a folder without pictures: give one with the frames of a clip, as 1.png, 2.png")
        return Clip(tuple(open_picture(name) for name in _evenly(names, max_frames)))
    if not path.exists():
        raise Mistake(f"no such clip: {path} (check the name and the folder)")
    if not path.is_file():
        raise Mistake(f"{path} is no file, and may never end: save the part you ask about to a file")
    frames = _read(path, fps, max_frames)
    if not frames:
        raise Mistake(f"{path} holds no frame that can be decoded: save it anew")
    chosen = _evenly(frames, max_frames)
    return Clip(tuple(image for _, image in chosen), tuple(time for time, _ in chosen))


def _read(path: Path, fps: float, max_frames: int) -> list[tuple[float, Image]]:
    """Frames at least 1 / fps apart, with their times; fewer where they would be too many to hold."""
    try:
        import av
    except ImportError:
        raise Mistake('films need the package av: pip install "foveate[video]", or give a folder of frames') from None

    step, frames = 1 / fps, list[tuple[float, "Image"]]()
    number, due, first = 0, 0.0, None
    try:
        with av.open(str(path)) as film:
            if not film.streams.video:
                raise Mistake(f"{path} has no pictures in it, only sound: give a film")
            stream = film.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or 25)
            for number, frame in enumerate(film.decode(stream)):
                if number >= LONGEST:
                    raise Mistake(f"{path} goes on after {LONGEST} frames: cut out the part that you ask about")
                time = number / rate if frame.time is None else float(frame.time)
                first = time if first is None else first
                if time - first >= due - 1e-3:
                    frames.append((time - first, _upright(frame)))
                    due += step
                if len(frames) > 2 * max_frames:
                    frames, step = frames[::2], 2 * step
                    due = frames[-1][0] + step
    except Mistake:
        raise
    except PermissionError:
        raise Mistake(f"no permission to read {path}") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        where = f" behind frame {number}" if frames else ""
        cause = getattr(error, "strerror", None) or one_line(error)
        raise Mistake(f"{path} is no film, or broken{where} ({cause}): save it anew") from None
    return frames


def _upright(frame: object) -> Image:
    """A decoded frame as 8-bit RGB, turned as its film says."""
    image: Image = frame.to_image()  # type: ignore[attr-defined]
    turn = getattr(frame, "rotation", 0)
    return (image.rotate(turn, expand=True) if turn else image).convert("RGB")


def _evenly(items: list[T], most: int) -> list[T]:
    return items if len(items) <= most else [items[(2 * i + 1) * len(items) // (2 * most)] for i in range(most)]
