"""What every method is: its options, what it keeps, and how it is written down."""

from __future__ import annotations

import dataclasses
import json
import numbers
from abc import ABC
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .budgets import check_keep
from .host import Host
from .tokens import ImageGroups

Place = Literal["encoder", "layer", "depth", "cache", "decode", "cross", "logits"]
CONFIG_NAME = "foveate_config.json"


@dataclass
class Method(ABC):
    """Base of all methods. The fields of the dataclass are the method's whole configuration.

    keep: float in (0, 1], the fraction of each image's tokens that stay, or int >= 1, tokens per image. Of a clip,
        which is one image to methods, the fraction is of all its frames together, and an int is tokens per frame.

    Raises:
        ValueError: for a value outside the range that the message names.
    """

    name: ClassVar[str]
    place: ClassVar[Place]
    summary: ClassVar[str]
    source: ClassVar[str]
    certificate: ClassVar[dict[str, Any] | None] = None
    """What `foveate calibrate` promises of a method that was read from its file, which `prune` checks; else None."""

    keep: float | int

    def __post_init__(self) -> None:
        # numpy's numbers, too.
        if isinstance(self.keep, numbers.Real) and not isinstance(self.keep, (bool, int, float)):
            self.keep = int(self.keep) if isinstance(self.keep, numbers.Integral) else float(self.keep)
        check_keep(self.keep)

    @property
    def keeps_all(self) -> bool:
        """Whether the options say, without looking at an image, that nothing is dropped."""
        return isinstance(self.keep, float) and self.keep == 1.0

    @property
    def only_drops(self) -> bool:
        """Whether what stays keeps its values, and what went is gone for good or, where every step reads another part,
        is recorded step by step: then the untouched model gives the same logits with the same tokens masked."""
        return True

    def share(self, groups: ImageGroups) -> Tensor:
        """(groups,) fraction of each image's tokens that `keep` asks for."""
        if isinstance(self.keep, int):
            each = float(self.keep) / groups.total.double()
            return (each if groups.frames is None else each * groups.frames).clamp(max=1.0)
        return torch.full_like(groups.total, self.keep, dtype=torch.float64)

    def for_host(self, host: Host) -> Method:
        """The method as it acts on one model; itself where it is the same on all.

        Raises:
            UnsupportedError, ValueError: where it cannot act on this one, with the way out.
        """
        return self

    def untrained(self) -> Method:
        """The method with weights that nothing has trained, for measuring time; itself where it has none."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The method's name and options, JSON-safe."""
        return {"method": self.name, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(config: dict[str, Any]) -> Method:
        """Build the method that `to_dict` described."""
        from . import get_method

        options = dict(config)
        try:
            name = options.pop("method")
        except KeyError:
            raise ValueError("the configuration names no 'method'") from None
        return get_method(name, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the options to `foveate_config.json` in `folder`, beside the model's own files."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @staticmethod
    def from_pretrained(path: str | Path) -> Method:
        """Read the method that `save_pretrained` wrote to a folder, or `foveate search` or `calibrate` to a file.

        Of the last, `prune` checks that it runs what was calibrated.
        """
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        method = Method.from_dict(read_config(path)).found_in(folder)
        promised = read_certificate(path)
        if promised is not None:
            method.certificate = promised  # type: ignore[misc]
        return method

    def found_in(self, folder: Path) -> Method:
        """The method of a configuration that lies in this folder; itself where it names no files there."""
        return self


def read_certificate(path: str | Path) -> dict[str, Any] | None:
    """What `foveate calibrate` promises of the method in a file, or None where it is no certificate."""
    found = _read(path).get("certificate")
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{path}: its certificate is no JSON object: calibrate again")
    return found


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration of a method in a folder or file, as `to_dict` gave it.

    Raises:
        OSError: where it cannot be read. ValueError: where it holds something else.
    """
    config = _read(path)
    config.pop("search", None)  # how `foveate search` came to the options
    promised = config.pop("certificate", None)
    if isinstance(promised, dict) and promised.get("policy") == "cascade":
        raise ValueError(
            f"{path} certifies a cascade, which asks again where the model is unsure, and no single configuration does "
            "that: use foveate ask --certificate, or calibrate with --policy fixed"
        )
    return config


def _read(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    path = path / CONFIG_NAME if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no configuration of a method: it is no JSON object")
    return config
