"""The command `foveate`: joins the commands."""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from foveate.asking.notes import be_quiet
from foveate.commands.ask import ask
from foveate.commands.bench import bench
from foveate.commands.calibrate import calibrate
from foveate.commands.check import check
from foveate.commands.env import env
from foveate.commands.errors import OneLineErrors
from foveate.commands.eval import eval_command
from foveate.commands.families import families
from foveate.commands.methods import methods
from foveate.commands.playground import playground
from foveate.commands.reproduce import reproduce
from foveate.commands.search import search
from foveate.commands.serve import serve
from foveate.commands.show import show
from foveate.commands.table import table

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Keep only the image tokens a vision-language model needs.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"foveate {installed_version('foveate')}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", callback=be_quiet, expose_value=False, help="Print results and mistakes, nothing else."
        ),
    ] = False,
) -> None: ...


# In the order of `foveate --help`.
app.command()(ask)
app.command("eval")(eval_command)
app.command()(playground)
app.command()(serve)
app.command()(bench)
app.command()(reproduce)
app.command()(search)
app.command()(calibrate)
app.command()(table)
app.command()(check)
app.command()(show)
app.command()(methods)
app.command()(families)
app.command()(env)
