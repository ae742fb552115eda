"""``lexiseg serve``: the web page and the HTTP service."""

import os
import socket
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from typer import Option

from lexiseg.cli.console import say, say_note, waiting
from lexiseg.cli.options import Device, Dtype
from lexiseg.errors import LexisegError, need
from lexiseg.words import first_line

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TOKEN = "LEXISEG_TOKEN"


def serve(
    model: Annotated[
        list[str] | None, Option("--model", "-m", help="May be repeated; clients get the first. Default: auto.")
    ] = None,
    host: Annotated[str, Option("--host", help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    classes: Annotated[
        str | None, Option("--classes", help="Classes for tools that send none (CVAT).", show_default=False)
    ] = None,
    files: Annotated[
        Path | None,
        Option("--files", help="Folder of Label Studio's local files.", file_okay=False, show_default=False),
    ] = None,
    max_megabytes: Annotated[int, Option("--max-megabytes", min=1, help="Largest request in MiB.")] = 32,
    max_megapixels: Annotated[float, Option("--max-megapixels", min=0.001, help="Largest picture in megapixels.")] = 40,
    max_classes: Annotated[int, Option("--max-classes", min=1, help="Maximum number of classes per request.")] = 1000,
    seconds: Annotated[float, Option("--seconds", min=0.1, help="Time limit of a request in seconds.")] = 120,
    queue: Annotated[int, Option("--queue", min=1, help="Maximum number of waiting pictures; more get 503.")] = 32,
    batch: Annotated[int, Option("--batch", min=1, help="Maximum number of pictures per forward pass.")] = 8,
) -> None:
    """Serve a web page and an HTTP service that segment pictures by words.

    If the environment variable LEXISEG_TOKEN is set, clients must send this token.
    """
    if host not in _LOOPBACK and not os.environ.get(_TOKEN):
        say_note(
            f"Anyone who can reach {host} can use this service; set {_TOKEN} to ask for a token, and put a proxy with "
            "TLS in front of it."
        )
    if files is not None and not files.is_dir():
        raise LexisegError(f"'{files}' is not a folder; name the folder of Label Studio's local files.")
    for module in ("fastapi", "prometheus_client", "uvicorn"):
        need(module, f"Serving needs {module}", "app")
    import lexiseg
    from lexiseg.app.service import ServiceSettings, create_app

    settings = ServiceSettings(
        token=os.environ.get(_TOKEN) or None,
        local=host in _LOOPBACK,
        max_bytes=max_megabytes * 2**20,
        max_pixels=int(max_megapixels * 1e6),
        max_classes=max_classes,
        seconds=seconds,
        queue=queue,
        batch=batch,
        classes=classes,
        files=files,
    )
    segmenters = {}
    for name in model or ["auto"]:
        with waiting(f"loading {name}"):
            segmenters[name] = lexiseg.load(name, device=device, dtype=dtype, max_pixels=settings.max_pixels)
    server = _server(create_app(segmenters, settings), seconds)
    try:  # uvicorn itself would end the process, with an exit code and a log of its own
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        raise LexisegError(
            f"Cannot listen on {host}, port {port} ({first_line(error)}); choose another --host or --port."
        ) from error
    address, bound = listening.getsockname()[:2]
    say(f"serving {', '.join(segmenters)} at http://{'[' + address + ']' if ':' in address else address}:{bound}/")
    server.run(sockets=[listening])


def _server(app: Any, seconds: float) -> Any:
    import uvicorn

    from lexiseg.app.guard import end_silent

    seen: WeakKeyDictionary[Any, tuple[Any, float]] = WeakKeyDictionary()

    async def tick() -> None:
        end_silent(server.server_state.connections, seen, seconds)

    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=int(seconds) + 1,
        limit_concurrency=1000,
        callback_notify=tick,
        timeout_notify=min(30, int(seconds)),
        server_header=False,
    )
    server = uvicorn.Server(config)
    return server
