"""`foveate playground`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from foveate.asking.loading import check_dtype
from foveate.commands.display import status
from foveate.commands.parameters import Device, Dtype


def playground(
    model: Annotated[
        str | None,
        typer.Option(help="A hub id or a model folder, beside the built-in models.", show_default="glimpse"),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Who may come: 127.0.0.1 is this machine alone, 0.0.0.0 all.")
    ] = "127.0.0.1",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Try methods on pictures and clips of your own, on a page in the browser.

    foveate playground --model llava-hf/llava-1.5-7b-hf
    """
    check_dtype(dtype)

    from foveate.playground.serving import check_installed, is_loopback, listen, serve
    from foveate.playground.table import Table

    check_installed()
    with listen(host, port) as listener:
        with status("loading"):
            table = Table(model, device, dtype)
        address, own_port = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address

        def ready() -> None:
            typer.echo(f"the playground is at http://{shown}:{own_port} (Ctrl-C ends it)")
            if not is_loopback(listener):
                typer.echo("everyone who reaches this machine can use it", err=True)

        try:
            serve(table, listener, ready)
        except KeyboardInterrupt:
            # A thread may still be answering, and Python would wait for it to end.
            sys.stdout.flush()
            os._exit(130)
