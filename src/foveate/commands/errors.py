"""How a mistake of the user ends: one line, no traceback."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from foveate.asking.mistake import Mistake
from foveate.registry import PluginError


class OneLineErrors(TyperGroup):
    """Ends every mistake of the user with exit status 2 and one line on stderr."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; what is not the user's fault still shows its traceback."""
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except (Mistake, PluginError) as error:
            status = _complain(str(error))
        except Exception as error:
            # typer's own errors, whichever click it stands on
            if type(error).__name__ == "Abort":  # Ctrl-C
                return sys.exit(130) if kwargs.get("standalone_mode", True) else 130
            if not hasattr(error, "format_message"):
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
                status = 2
            else:
                status = _complain(f"{error.format_message().rstrip('.')} (see: foveate --help)")
        if kwargs.get("standalone_mode", True):
            sys.exit(status if isinstance(status, int) else 0)
        return status


def _complain(message: str) -> int:
    typer.echo(f"foveate: {' '.join(message.split())}", err=True)
    return 2
