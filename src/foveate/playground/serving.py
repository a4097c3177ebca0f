"""Serves the page on this machine, until Ctrl-C."""

from __future__ import annotations

import errno
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from foveate.asking.mistake import Mistake, one_line
from foveate.playground.table import Table

LARGEST = "200mb"  # of an uploaded file
# Whatever gradio's pages would like to fetch from elsewhere, the browser must not.
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
FONTS = ["system-ui", "sans-serif"]  # gradio's own come from the net


def check_installed() -> None:
    """Say in one line that gradio is missing."""
    if find_spec("gradio") is None:
        raise Mistake('the playground needs the package gradio: pip install "foveate[playground]"')


def listen(host: str, port: int) -> socket.socket:
    """A socket on this port, taken before a model is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        # A port of a playground that ended just now is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Mistake(f"port {port} is taken: give another by --port") from None
        if error.errno == errno.EACCES:
            raise Mistake(f"port {port} is not for everyone: give one above 1023 by --port") from None
        raise Mistake(f"cannot listen on {host}: {one_line(error)}") from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ip_address(listener.getsockname()[0]).is_loopback


def serve(table: Table, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Show the page until Ctrl-C, which comes out as KeyboardInterrupt. ready: called when it is there."""
    # gradio reads these when it is imported, and when its components are made.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    # However it is ended, uploads are deleted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="foveate-playground-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        import uvicorn

        config = uvicorn.Config(application(table, Path(folder)), log_level="critical", timeout_graceful_shutdown=1)
        ready()
        uvicorn.Server(config).run(sockets=[listener])


def application(table: Table, folder: Path) -> Any:
    """The page as an ASGI application. folder: where uploads lie."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware import Middleware

    from foveate.playground.page import CSS, Page

    page = Page(table, folder)
    stay_here(page.blocks)
    return gr.mount_gradio_app(
        FastAPI(middleware=[Middleware(Policed)], docs_url=None, redoc_url=None, openapi_url=None),
        page.blocks,
        path="/",
        footer_links=[],
        max_file_size=LARGEST,
        show_error=False,
        ssr_mode=False,
        theme=gr.themes.Default(font=FONTS, font_mono=["monospace"]).set(block_info_text_color="*neutral_500"),
        css=CSS,
    )


def stay_here(blocks: Any) -> None:
    """Refuse web addresses in the place of files, which gradio would fetch for a visitor."""
    import gradio as gr

    def only_files(kept: Callable[[str], Any]) -> Callable[[str], Any]:
        async def keep(path: str) -> Any:
            if path.startswith(("http:", "https:")):
                raise gr.Error("this is a web address: download it and give the file", print_exception=False)
            return await kept(path)

        return keep

    for block in blocks.blocks.values():
        if hasattr(block, "async_move_resource_to_block_cache"):
            block.async_move_resource_to_block_cache = only_files(block.async_move_resource_to_block_cache)


class Policed:
    """Adds a content security policy to every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass everything on; streams stay streams."""

        async def policed(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, policed)
