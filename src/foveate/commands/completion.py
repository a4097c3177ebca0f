"""What the shell completes: names that are known without loading anything."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path


def names(kind: str) -> list[str]:
    """The names of the `methods`, read from their files, and of plug-ins, from what is installed."""
    folder = Path(__file__).parents[1] / kind
    found = {
        name
        for file in folder.glob("*.py")
        for name in re.findall(r'^@register\("(\w+)"\)', file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    return sorted(found | {entry.name for entry in metadata.entry_points(group=f"foveate.{kind}")})


def complete_methods(incomplete: str) -> list[str]:
    """The names of methods that go on like this; of several, written `a,b+c`, the last."""
    before, last = re.fullmatch(r"(.*[,+])?([^,+]*)", incomplete, re.DOTALL).groups(default="")  # type: ignore[union-attr]
    return [before + name for name in names("methods") if name.startswith(last.lower())]


def complete_models(incomplete: str) -> list[str]:
    """The built-in models, and folders."""
    from foveate.asking.loading import BUILT_IN

    folders = (f"{path}/" for path in sorted(Path().glob(f"{incomplete}*")) if path.is_dir())
    return [name for name in (*BUILT_IN, *folders) if name.startswith(incomplete)]


def complete_plans(incomplete: str) -> list[str]:
    """The plans that foveate brings."""
    plans = (file.stem for file in (Path(__file__).parents[1] / "plans").glob("*.toml"))
    return sorted(name for name in plans if name.startswith(incomplete))
