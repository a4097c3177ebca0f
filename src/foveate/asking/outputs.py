"""Whether what a command is to write can be written: asked before it begins to work, and nothing is left behind."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from foveate.asking.mistake import Mistake


def check_folder(folder: Path) -> None:
    """Refuse a folder of results that cannot be made, or written to.

    Raises:
        Mistake: with the reason.
    """
    made = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Mistake(
            f"cannot write into the folder {folder}: {error.strerror or error}; give another --out"
        ) from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def check_file(option: str, path: Path) -> None:
    """Refuse a file that cannot be written. option: which names it.

    Raises:
        Mistake: with the reason.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise Mistake(f"{option} {path}: no folder {path.parent}; make it first")
    if path.is_dir():
        raise Mistake(f"{option} {path} is a folder: name a file in it")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise Mistake(
            f"{option} {path}: the folder {parent} cannot be written to ({error.strerror or error}); name another"
        ) from error
