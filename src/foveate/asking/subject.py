"""What `foveate check` and `foveate show` look at: a loaded model, a question about pictures, and methods."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.asking.clips import frames_of
from foveate.asking.loading import BUILT_IN

if TYPE_CHECKING:
    from PIL.Image import Image

    from foveate.asking.asker import Asker
    from foveate.asking.clips import Clip
    from foveate.asking.variant import Variant


_LOADED = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_attn_implementation",
    "attn_implementation",
}


@dataclass(frozen=True)
class Subject:
    """A model and what it is asked. shown: the pictures and clips. settings: the same in words, JSON-safe."""

    model: Any
    processor: Any
    asker: Asker
    shown: Sequence[Image | Clip]
    variants: Sequence[Variant]
    settings: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """The settings, and what is behind the names in them, which may change: rows of a folder must share it."""
        frames = [frame for one in self.shown for frame in frames_of(one)]
        pictures = [hashlib.sha256(f"{p.size}".encode() + p.tobytes()).hexdigest()[:16] for p in frames]
        return {
            **self.settings,
            "pictures": pictures,
            **fingerprints(self.settings["model"], self.settings.get("guide")),
            **option_files(own for variant in self.variants for own in variant.options),
        }


def fingerprints(model: str, guide: str | None = None) -> dict[str, str]:
    """Settings that change with the files of a model and of a guide, where these are folders.

    From names, sizes and times: weights are too large to be read once more. Hub ids and glimpse have none.
    """
    found = {}
    for name, folder in (("model_files", model), ("guide_files", guide)):
        if folder is not None and folder not in BUILT_IN and Path(folder).is_dir():
            files = sorted(path for path in Path(folder).iterdir() if path.is_file() and path.name[0] != ".")
            facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
            found[name] = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return found


def option_files(options: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """A setting that changes with the files that options of methods name, such as a schedule's; none without any."""
    files = {str(value) for own in options for value in own.values() if isinstance(value, (str, Path))}
    found = {name: hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16] for name in files if Path(name).is_file()}
    return {"option_files": dict(sorted(found.items()))} if found else {}


def config_digest(config: Any) -> str:
    """Of a model's configuration, as it lies in its folder; what loading it adds says nothing of the model."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items() if name not in _LOADED}
        return value

    text = json.dumps(plain(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
