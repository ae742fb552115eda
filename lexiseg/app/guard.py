"""Checks in front of every request: its size, its duration, and the token."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from lexiseg.app.service import ServiceSettings

GONE = 499  # nginx's code for a client that left; nobody reads it
_OPEN = ("/", "/health")  # the page has no secrets, and the field in which its user types the token


@dataclass(eq=False)
class Guard:
    """ASGI middleware that refuses bodies that are too large or too slow, strange web pages, and a wrong token."""

    app: ASGIApp
    settings: ServiceSettings
    count: Callable[[str, int, float], None]  # takes route, status and seconds of every request that was answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401, 403, 408, 413 or, when the server ends before the answer is there, 503."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check_headers(scope)
            except HTTPException as error:
                await JSONResponse({"error": error.detail}, error.status_code)(scope, receive, answer)
            else:
                await self.app(scope, self._limited(receive), answer)
        except asyncio.CancelledError:  # the server ends, and would log it as an error of ours
            if status == 500:  # nothing was sent yet
                await JSONResponse({"error": "The service is stopping; try again later."}, 503)(scope, receive, answer)
        finally:
            self.count(getattr(scope.get("route"), "path", "other"), status, time.monotonic() - start)

    def _check_headers(self, scope: Scope) -> None:
        headers = {key.lower(): value for key, value in scope["headers"]}
        token = self.settings.token
        if token is not None and scope["path"] not in _OPEN:
            expected, given = f"Bearer {token}".encode(), headers.get(b"authorization", b"")
            if not hmac.compare_digest(expected, given):
                raise HTTPException(401, "This service requires a token; send it as 'Authorization: Bearer TOKEN'.")
        elif token is None and self.settings.local and not _is_own(headers.get(b"host", b"").decode("latin-1")):
            raise HTTPException(403, "This service answers to localhost only; set LEXISEG_TOKEN to use another name.")
        # Browsers say whose page sends a request. Pages of others need no answer to keep the model busy.
        if scope["method"] == "POST" and headers.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none"):
            raise HTTPException(403, "A web page of another site sent this request; use this service's own page.")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > self.settings.max_bytes):
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        loop = asyncio.get_running_loop()
        deadline, total, whole = loop.time() + self.settings.seconds, 0, False

        async def limited() -> Message:
            nonlocal total, whole
            if whole:  # what comes now is the client leaving, for which there is no hurry
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - loop.time()))
            except asyncio.TimeoutError as error:
                sentence = f"The request did not arrive within {self.settings.seconds:g} seconds; send it faster."
                raise HTTPException(408, sentence) from error
            if message["type"] == "http.disconnect":
                raise HTTPException(GONE, "The client has disconnected.")
            if message["type"] == "http.request":
                total += len(message.get("body", b""))
                whole = not message.get("more_body", False)
            if total > self.settings.max_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> HTTPException:
        limit = self.settings.max_bytes / 2**20
        return HTTPException(413, f"The request is larger than {limit:g} MiB; send smaller or fewer pictures.")


def end_silent(connections: Iterable[Any], seen: MutableMapping[Any, tuple[Any, float]], seconds: float) -> None:
    """End uvicorn's connections on which no request has come for that long; uvicorn waits for one without limit.

    ``seen``: since when each has waited after which request, for the next call.
    """
    now = time.monotonic()
    for connection in tuple(connections):
        last = connection.cycle
        before, since = seen.setdefault(connection, (last, now))
        if before is not last or (last is not None and not last.response_complete):
            seen[connection] = last, now
        elif now - since > seconds:
            connection.shutdown()


def _is_own(host: str) -> bool:
    """Whether a Host header is no name of the network's, which a web page can have resolve to this machine."""
    with suppress(ValueError):
        name = urlsplit(f"//{host}").hostname
        return name in (None, "localhost") or bool(ip_address(name))
    return False
