"""Weights of a method's own, trained for one model: where they are, what they belong to, how they get into a method.

They are one safetensors file. Its header says which method they are of, which model they were trained on (by a
fingerprint of that model's weights), and the options that cannot be others than in training.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UnsupportedError
from .base import Method
from .host import Host

if TYPE_CHECKING:
    from typing import Self

WEIGHTS_NAME = "foveate_method.safetensors"


@dataclass(frozen=True)
class Plugin:
    """The header of a file of weights.

    path: of the file. method: whose they are. model_type, fingerprint: of the model they were trained on. options: of
    the method that they were trained with and that cannot be others.
    """

    path: Path
    method: str
    model_type: str
    fingerprint: str
    options: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Plugin:
        """Read a header; the weights stay where they are.

        Raises:
            ValueError: where the file is missing, or none of this library's.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
            # JSON knows no tuples.
            written = json.loads(header["options"]).items()
            options = {name: tuple(value) if isinstance(value, list) else value for name, value in written}
            return cls(path, header["method"], header["model_type"], header["fingerprint"], options)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read the weights {path}: {' '.join(str(error).split())}") from error
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} does not say which method and model its weights are of: give a file that one of the commands "
                "in training/ wrote"
            ) from error

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The weights by name, float32."""
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name).to(device, torch.float32) for name in file.keys()}  # noqa: SIM118


def write_plugin(
    path: Path, method: TrainedMethod, model_type: str, fingerprint: str, tensors: dict[str, Tensor]
) -> None:
    """Write weights as `Plugin.read` reads them, bfloat16 where they are matrices; the file is there whole or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fixed = {name: getattr(method, name) for name in method.fixed}
    header = {"method": method.name, "model_type": model_type, "fingerprint": fingerprint, "options": json.dumps(fixed)}
    held = {
        name: tensor.detach().to("cpu", torch.bfloat16 if tensor.ndim > 1 else torch.float32).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(held, path.with_suffix(".tmp"), metadata=header)
    path.with_suffix(".tmp").replace(path)


def shipped(method: str) -> list[Plugin]:
    """The weights that come with the library for one method."""
    folder = resources.files("foveate") / "trained" / method
    paths = sorted(Path(str(file)) for file in folder.iterdir()) if folder.is_dir() else []
    return [Plugin.read(path) for path in paths if path.suffix == ".safetensors"]


@dataclass
class TrainedMethod(Method):
    """A method with weights of its own, which fit the one model they were trained on.

    weights: a file of weights, or a folder with one; None for those that come with the library, where there are any for
        the model at hand.
    """

    fixed: ClassVar[tuple[str, ...]] = ()
    """Options that cannot be others than in training."""

    weights: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            if not isinstance(self.weights, (str, Path)) or not str(self.weights):
                raise ValueError(f"weights must be a path or None, got {self.weights!r}")
            self.weights = str(self.weights)  # as configurations hold it

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights by name, float32; there once the method is a model's (`for_host`)."""
        held: dict[str, Tensor] = self.__dict__["_tensors"]
        return held

    def initial(self, host: Host) -> dict[str, Tensor]:
        """The weights that training begins with, by name, float32, on the host's device.

        Raises:
            UnsupportedError, ValueError: where the method cannot have any for this model.
        """
        raise UnsupportedError(f"{self.name} does not say what its weights look like before they are trained")

    def holding(self, tensors: dict[str, Tensor]) -> Self:
        """The method with these very tensors, on whichever model it is used: as training needs it."""
        bound = copy.copy(self)
        bound.__dict__["_tensors"] = tensors
        return bound

    def untrained(self) -> Self:
        """The method with weights as before training, on whichever model: for measuring what it costs."""
        bound = copy.copy(self)
        bound.__dict__["_untrained"] = True
        return bound

    def for_host(self, host: Host) -> TrainedMethod:
        """The method with its weights.

        Raises:
            UnsupportedError: where the weights are another model's, or there are none for this one.
            ValueError: where they cannot be read, or were trained with other options.
        """
        if "_tensors" in self.__dict__ or self.keeps_all:
            return self
        if "_untrained" in self.__dict__:
            return self.holding(self.initial(host))
        plugin = self._given(host) if self.weights is not None else self._shipped(host)
        return self.holding(plugin.tensors(host.device))

    def _given(self, host: Host) -> Plugin:
        path = Path(str(self.weights))
        plugin = Plugin.read(path / WEIGHTS_NAME if path.is_dir() else path)
        if plugin.method != self.name:
            raise ValueError(f"the weights {path} are of {plugin.method}, not of {self.name}")
        if plugin.fingerprint != host.fingerprint():
            raise UnsupportedError(
                f"the weights {path} were trained on another model (a {plugin.model_type}) than this "
                f"{host.model_type}: load that model, or train {self.name} on this one ({self._training})"
            )
        if others := [name for name, value in plugin.options.items() if getattr(self, name) != value]:
            was = ", ".join(f"{name}={plugin.options[name]}" for name in others)
            now = ", ".join(f"{name}={getattr(self, name)}" for name in others)
            raise ValueError(f"the weights {path} were trained with {was}, not {now}: say {was}, or train anew")
        return plugin

    def _shipped(self, host: Host) -> Plugin:
        plugins = shipped(self.name)
        mark = host.fingerprint() if plugins else ""
        own = [plugin for plugin in plugins if plugin.fingerprint == mark]
        if not own:
            raise UnsupportedError(
                f"{self.name} needs weights that were trained on this very model, and none for it come with the "
                f"library: train them ({self._training}) and give them as weights=FOLDER"
            )
        for plugin in own:
            if all(getattr(self, name) == value for name, value in plugin.options.items()):
                return plugin
        there = " or ".join(", ".join(f"{k}={v}" for k, v in plugin.options.items()) for plugin in own)
        now = ", ".join(f"{name}={getattr(self, name)}" for name in self.fixed)
        raise ValueError(f"{self.name} has weights for {there} here, not for {now}: say one of these, or train anew")

    @property
    def _training(self) -> str:
        return f"python training/{self.name}.py"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the options, and the weights where a path to them was given, to `folder`."""
        if self.weights is None:
            super().save_pretrained(folder)
            return
        given, held = Path(str(self.weights)), Path(folder) / WEIGHTS_NAME
        source = given / WEIGHTS_NAME if given.is_dir() else given
        Plugin.read(source)  # or the reason why not, before anything is written
        held.parent.mkdir(parents=True, exist_ok=True)
        if not held.exists() or not source.samefile(held):
            shutil.copyfile(source, held)
        Method.save_pretrained(dataclasses.replace(self, weights=WEIGHTS_NAME), folder)

    def found_in(self, folder: Path) -> TrainedMethod:
        """The same method where its path of weights is that beside the configuration."""
        beside = None if self.weights is None else folder / self.weights
        return dataclasses.replace(self, weights=beside) if beside is not None and beside.exists() else self
