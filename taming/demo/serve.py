"""Serve the demo's page: to whom, and how much of it.

The page of Gradio is wrapped so that it answers to this machine's names alone, takes no large
requests, and loads nothing from elsewhere.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI
from PIL import Image

from taming.demo.exhibit import MAX_PIXELS, Exhibit
from taming.demo.page import CSS, build

logger = logging.getLogger("taming.demo")

MAX_BYTES = 32 * 2**20  # of a request, and so of a picture's file
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'"
)
STRICT = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class TooLarge(Exception):  # noqa: N818
    """Ends a request of more bytes than are taken."""


class Guard:
    """An ASGI application that stands before another one.

    It answers to a Host header with an address, or a name of this machine: a foreign page could
    lead its own name here, and then read the answers. It ends requests of more than `MAX_BYTES`,
    and forbids the browser to load anything from elsewhere.

    Args:
        app: The application.
        host: Name or address that it listens at.
    """

    def __init__(self, app: Any, host: str) -> None:
        self.app = app
        self.names = {name.lower() for name in (host, "localhost", socket.gethostname())}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
        if not self.answers_to(headers.get(b"host", "")):
            await _refuse(send, 403, "this page answers to its address, or a name of its machine")
            return
        length, taken, begun = headers.get(b"content-length", "0"), 0, False
        if not length.isdecimal() or int(length) > MAX_BYTES:
            await _refuse(send, 413, f"a request may have {MAX_BYTES} bytes")
            return

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BYTES:  # sent in pieces, without a length
                raise TooLarge
            return message

        async def strict(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message.get("headers", []), *STRICT]}
            await send(message)

        try:
            await self.app(scope, limited, strict)
        except TooLarge:
            if not begun:
                await _refuse(send, 413, f"a request may have {MAX_BYTES} bytes")

    def answers_to(self, host: str) -> bool:
        """Return True for a Host header with an address, or a name of this machine."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return (name != "" and name in self.names) or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


async def _refuse(send: Send, status: int, message: str) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": message}).encode()})


def application(exhibits: Sequence[Exhibit], host: str) -> Guard:
    """Return the page as an application.

    Args:
        exhibits: Runs to show.
        host: Name or address that it listens at.
    """
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Gradio decodes by Pillow, which refuses twice as many
    blocks = build(exhibits)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    fonts = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # none from elsewhere
    mounted = gr.mount_gradio_app(
        app,
        blocks,
        path="",
        allowed_paths=[],
        max_file_size=MAX_BYTES,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        theme=gr.themes.Soft(font=fonts[0], font_mono=fonts[1]),
        css=CSS,
    )
    # As by Blocks.launch: until then, Gradio reads files wherever they lie.
    blocks.has_launched = blocks.is_running = True
    return Guard(mounted, host)


@contextmanager
def own_folder() -> Iterator[None]:
    """Keep what is uploaded in a folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="taming-demo-") as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ValueError: Something else listens there, or there is no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # which goes on with the address
        place = f"cannot listen at --host {host}, --port {port}"
        raise ValueError(f"{place}: {reason}; --port 0 takes a free port") from error


def server_of(app: Guard) -> uvicorn.Server:
    """Return a server of an application."""
    config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=1)
    return uvicorn.Server(config)


def serve(exhibits: Sequence[Exhibit], host: str, port: int, open_browser: bool) -> None:
    """Serve the page until Ctrl-C or SIGTERM, both of which leave no file behind.

    Args:
        exhibits: Runs to show.
        host: Address to listen at.
        port: Port; 0 takes a free one.
        open_browser: Open the page.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which uvicorn calls at its end
    with suppress(KeyboardInterrupt), own_folder(), listen(host, port) as sock:
        server = server_of(application(exhibits, host))
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{sock.getsockname()[1]}"
        logger.info("open %s in a browser; Ctrl-C ends it", address)
        if open_browser:  # it may wait for the first answer
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server.run(sockets=[sock])
