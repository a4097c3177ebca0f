"""How commands end: a mistake of the user in one line without a traceback, and what all of them understand."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from foveate.asking.mistake import Mistake
from foveate.errors import KeepsOneToken
from foveate.registry import PluginError


class OneLineErrors(TyperGroup):
    """Ends every mistake of the user with exit status 2 and one line on stderr; gives every command `--quiet`."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, which understands `--quiet` as `foveate` itself does."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            command.params += [p for p in self.params if p.name == "quiet" and p not in command.params]
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; what is not the user's fault still shows its traceback."""
        alone = kwargs.get("standalone_mode", True)
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            status = self._run(args, kwargs)
        if alone:
            sys.exit(status)
        return status

    def _run(self, args: Any, kwargs: dict[str, Any]) -> int:
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.stdout.flush()
        except (Mistake, PluginError) as error:
            return _complain(str(error))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # What is still to be written would fail once more when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _complain("no space is left where the output goes: free some, or write it elsewhere")
        except Exception as error:
            # typer's own errors, whichever click it stands on
            if type(error).__name__ == "Abort":  # Ctrl-C
                return 130
            if not hasattr(error, "format_message"):
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
                return 2
            command = getattr(getattr(error, "ctx", None), "command_path", "").split()[1:]
            return _complain(
                f"{error.format_message().rstrip('.')}{_dashed()} (see: {' '.join(['foveate', *command])} --help)"
            )
        return status if isinstance(status, int) else 0


def _dashed() -> str:
    """What to do about a file whose name is taken for an option."""
    name = next((word for word in sys.argv[1:] if word.startswith("-") and Path(word).is_file()), None)
    return "" if name is None else f"; for the file of that name write ./{name}"


def _complain(message: str) -> int:
    typer.echo(f"foveate: {' '.join(message.split())}", err=True)
    return 2


def _warn(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    """A warning that is meant for users, as one line; others as Python shows them."""
    if issubclass(category, KeepsOneToken):
        typer.echo(f"foveate: {message}", err=True)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr, end="")
