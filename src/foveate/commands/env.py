"""`foveate env`."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata

import typer
from rich.console import Console
from rich.text import Text

from foveate.commands.display import listing
from foveate.commands.parameters import Json

# What foveate can do something with, in the order in which it is shown.
PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "typer", "rich", "matplotlib"),
    *("accelerate", "peft", "av", "scipy", "gradio", "vllm", "lmms-eval", "flash-attn", "torchvision"),
)


def env(as_json: Json = False) -> None:
    """Print versions, devices and plug-ins: what belongs into a report of a fault."""
    import torch

    import foveate
    from foveate.engine.upstream import release_note

    methods, families = foveate.methods(), foveate.families()
    plugins = [
        f"{entry.name} of {getattr(entry.dist, 'name', '?')} {getattr(entry.dist, 'version', '')}".strip()
        for group in ("foveate.methods", "foveate.families")
        for entry in metadata.entry_points(group=group)
    ]
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    found: dict[str, str] = {"foveate": foveate.__version__}
    found |= {name: version for name in PACKAGES if (version := _version(name))}
    found |= {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{os.cpu_count()} cores; torch runs on {torch.get_num_threads()}",
        "cuda": "; ".join(f"{torch.cuda.get_device_name(i)} (CUDA {torch.version.cuda})" for i in cuda) or "none",
        "mps": "there" if torch.backends.mps.is_available() else "none",
        "known": f"{len(methods)} methods, {len(families)} families",
        "plug-ins": "; ".join(plugins) or "none",
        "tested with": release_note() or "this release of transformers",
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = listing()
    table.padding = (0, 2, 0, 0)
    for name, what in found.items():
        table.add_row(name, Text(what))
    Console().print(table)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
