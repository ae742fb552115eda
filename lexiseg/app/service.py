"""The HTTP service: ``POST /v1/segment`` and its siblings, over one queue in front of the models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from copy import copy
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

import lexiseg
from lexiseg.app.annotation import add_annotation_routes
from lexiseg.app.guard import GONE, Guard
from lexiseg.app.queue import Answer, BusyError, Job, Queue
from lexiseg.app.requests import (
    BatchRequest,
    ClassesRequest,
    ExemplarRequest,
    Question,
    SegmentRequest,
    decode_picture,
    describe_body,
    first_complaint,
    read_question,
)
from lexiseg.app.results import OUTPUTS, describe_result
from lexiseg.class_forms import entries_read
from lexiseg.class_list import typed_read
from lexiseg.devices import use_threads
from lexiseg.errors import LexisegError
from lexiseg.exemplars import PREFIX, Exemplar
from lexiseg.refine import has_sam
from lexiseg.samples import list_samples, sample_path
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from lexiseg.words import word_key

if TYPE_CHECKING:
    from lexiseg.segmenter import Segmenter

_POLL_SECONDS = 0.25
# What can stand between words: they are counted before they are taken apart.
_SEPARATORS = ";\uff1b,\uff0c\u3001\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


_ERROR: dict[int | str, dict[str, Any]] = {
    code: {"description": what, "content": {"application/json": {"schema": {"type": "object"}}}}
    for code, what in (
        (400, "The body cannot be read."),
        (401, "The token is missing or wrong."),
        (403, "It comes from a web page of another site."),
        (404, "There is no such model."),
        (408, "The request arrived too slowly."),
        (413, "The request is too large."),
        (422, "The request is invalid; the message says why."),
        (503, "The service is busy; Retry-After says when to try again."),
        (504, "It took too long."),
    )
}


class ServiceSettings(BaseModel):
    """What a service allows; what goes beyond a limit is refused with a sentence and its status code."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # clients must send it as ``Authorization: Bearer TOKEN``; None asks for none
    token: str | None = Field(default=None, min_length=1)
    # it is meant for this machine alone: without a token, requests to other names than localhost are refused (403)
    local: bool = False
    max_bytes: int = Field(default=32 * 2**20, ge=1024)  # of a request's body (413)
    max_pixels: int = Field(default=40_000_000, ge=1)  # of a picture (422)
    max_classes: int = Field(default=1000, ge=1)  # of a request (422)
    max_pictures: int = Field(default=32, ge=1)  # of a batch (422)
    # a request may take, its upload included (408 while it uploads, 504 later)
    seconds: float = Field(default=120.0, gt=0)
    queue: int = Field(default=32, ge=1)  # requests that wait at most; more are answered 503 with Retry-After
    batch: int = Field(default=8, ge=1)  # pictures in one forward pass at most
    classes: str | None = None  # of annotation tools that send no words, such as CVAT; None: there are none for them
    files: Path | None = None  # below which Label Studio's local files lie; None: pictures come in the request alone


class Service:
    """The models by name, the first of which is the default, the queue before them, and the counters."""

    def __init__(self, segmenters: dict[str, Segmenter], settings: ServiceSettings) -> None:
        if not segmenters:
            raise LexisegError("A service needs at least one model; name one.")
        if settings.classes is not None:
            Vocabulary.parse(typed_read(settings.classes))  # what is wrong with them is said here, not to every client
        self.segmenters = segmenters
        self.settings = settings
        self.queue = Queue(settings.queue, settings.batch)
        self.registry = CollectorRegistry()
        self.requests = Counter("lexiseg_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("lexiseg_request_seconds", "Seconds a request.", ["path"], registry=self.registry)
        waiting = Gauge("lexiseg_queue_waiting", "Pictures that wait.", registry=self.registry)
        waiting.set_function(lambda: len(self.queue.waiting))

    def count(self, path: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def segmenter(self, name: str | None) -> tuple[str, Segmenter]:
        """A model by its name, or the first. Raises HTTPException if it is not served."""
        name = next(iter(self.segmenters)) if name is None else name
        if name not in self.segmenters:
            raise HTTPException(404, f"The model is not served here; choose {' or '.join(self.segmenters)}.")
        return name, self.segmenters[name]

    def vocabulary(
        self, classes: str | Sequence[str], exemplars: Sequence[ExemplarRequest] = (), picture: bytes = b""
    ) -> Vocabulary:
        """The classes of a client: words and pictures; nothing in the words is ever taken for a file.

        ``classes``, ``exemplars``: as in `Question`. ``picture``: what exemplars without a picture show. Raises
        LexisegError if they are wrong, HTTPException if they are too many.
        """
        most = self.settings.max_classes
        too_many = HTTPException(422, f"There are more than {most} classes, or {4 * most} words of them; send fewer.")
        texts = [classes] if isinstance(classes, str) else list(classes)
        if len(texts) + sum(text.count(mark) for text in texts for mark in _SEPARATORS) > 4 * most:
            raise too_many
        # A form, which has no lists, may hold one as text.
        listed = typed_read(classes).classes if isinstance(classes, str) else entries_read(texts)
        if len(listed) + len(exemplars) > most:
            raise too_many
        if len(exemplars) > self.settings.max_pictures:
            raise HTTPException(422, f"There are more than {self.settings.max_pictures} exemplars; send fewer.")
        if any(word.startswith(PREFIX) for one in listed for word in (one.name, *one.synonyms)):
            raise HTTPException(422, "This service does not open files; send a picture as a class in 'exemplars'.")
        words = [VocabularyClass(one.name, one.synonyms, scored=one.scored) for one in listed]
        for one in exemplars:
            shows = picture if one.image is None else decode_picture(one.image, "An exemplar's picture")
            shown = (Exemplar(shows, box=one.box),)
            made = VocabularyClass(one.name, exemplars=shown, scored=False)
            place = next(
                (place for place, word in enumerate(words) if word_key(word.name) == word_key(made.name)), None
            )
            if place is None:
                words.append(made)
            else:
                words[place] = replace(words[place], exemplars=words[place].exemplars + shown)
        return Vocabulary(tuple(words))

    async def answer(
        self, request: Request, question: Question, pictures: list[bytes], vocabulary: Vocabulary | None = None
    ) -> tuple[str, list[Answer]]:
        """Put pictures into the queue and wait for them, as long as the client does.

        Raises HTTPException if there is no room, it takes too long, or the client has gone; LexisegError if a picture
        or the classes are wrong.
        """
        if len(pictures) > self.settings.max_pictures:
            raise HTTPException(
                422, f"There are more than {self.settings.max_pictures} pictures; send fewer at a time."
            )
        name, segmenter = self.segmenter(question.model)
        segmenter = copy(segmenter)  # which has said no note yet: what is said once is said to every client
        if question.refine not in (None, segmenter.refinement.kind):
            if question.refine == "regions" and not has_sam():  # no client may have the service download gigabytes
                raise HTTPException(422, "This service has no SAM for 'regions'; choose none, edges or pamr.")
            segmenter = segmenter.with_refinement(question.refine)
        if vocabulary is None:
            vocabulary = await asyncio.to_thread(self.vocabulary, question.classes, question.exemplars, pictures[0])
        arguments: dict[str, Any] = {"classes": vocabulary}
        for key in ("background", "window"):
            if (value := getattr(question, key)) is not None:
                arguments[key] = value
        alike = (name, vocabulary.hash(), question.background, question.window, question.refine)
        jobs = [Job(picture, alike, segmenter, arguments, question.output == "scores") for picture in pictures]
        try:
            self.queue.submit(jobs)
        except BusyError as error:
            sentence = f"The service is busy; try again in {error.retry_after} seconds."
            raise HTTPException(503, sentence, {"Retry-After": str(error.retry_after)}) from error
        futures = [asyncio.wrap_future(job.future) for job in jobs]
        for future in futures:  # of several only the first error is told; asyncio need not report the others
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await self._wait(request, futures)
        finally:
            for job in jobs:
                job.left = True
                job.future.cancel()
        for number, future in enumerate(futures, 1):  # others may not have ended when one has failed
            failed = future.exception() if future.done() and not future.cancelled() else None
            if isinstance(failed, LexisegError) and len(futures) > 1:
                raise LexisegError(f"Picture {number}: {failed}") from failed
            if failed is not None:
                raise failed
        return name, [future.result() for future in futures]

    async def _wait(self, request: Request, futures: list[asyncio.Future[Answer]]) -> None:
        deadline = time.monotonic() + self.settings.seconds
        pending: set[asyncio.Future[Answer]] = set(futures)
        while pending:
            _, pending = await asyncio.wait(pending, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
            if any(future.done() and future.exception() for future in futures):
                return
            if pending and await request.is_disconnected():
                raise HTTPException(GONE, "The client has disconnected.")
            if pending and time.monotonic() > deadline:
                raise HTTPException(
                    504, f"It took longer than {self.settings.seconds:g} seconds; send a smaller picture."
                )


def create_app(segmenters: dict[str, Segmenter], settings: ServiceSettings | None = None) -> FastAPI:
    """The service as an ASGI application.

    ``segmenters``: the models by name; the first is the default. ``settings``: the limits; None takes the defaults.
    Raises LexisegError if there is no model.
    """
    settings = settings or ServiceSettings()
    service = Service(segmenters, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # The model has all of torch's threads; what writes answers meanwhile gets one each.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(initializer=use_threads, initargs=(1,)))
        with suppress(asyncio.CancelledError):  # at a second Ctrl-C, for which a traceback would be printed
            yield
        await asyncio.to_thread(service.queue.close)

    app = FastAPI(title="lexiseg", version=lexiseg.__version__, lifespan=lifespan, redoc_url=None)
    app.state.service = service
    app.add_middleware(Guard, settings=settings, count=service.count)
    _handle_errors(app)
    _add_routes(app, service)
    add_annotation_routes(app, service)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(LexisegError)
    async def _(_: Request, error: LexisegError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 422)

    @app.exception_handler(HTTPException)
    async def _(_: Request, error: HTTPException) -> JSONResponse:
        sentence = error.detail if error.detail.endswith(".") else f"{error.detail}."
        return JSONResponse({"error": sentence}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def _(_: Request, error: RequestValidationError | ValidationError) -> JSONResponse:
        return JSONResponse({"error": first_complaint(error.errors())}, 422)


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/segment", responses=_ERROR, openapi_extra=describe_body(SegmentRequest, file="image"))
    async def segment(request: Request) -> dict[str, Any]:
        """Segment one picture; JSON with the picture in base64, or multipart with it as the file ``image``."""
        question, pictures = await read_question(request, SegmentRequest)
        if len(pictures) > 1:
            raise HTTPException(422, "This takes one picture; send several to /v1/batch.")
        name, answers = await service.answer(request, question, pictures)
        return await asyncio.to_thread(describe_result, answers[0], name, question.output)

    @app.post("/v1/batch", responses=_ERROR, openapi_extra=describe_body(BatchRequest, file="images"))
    async def batch(request: Request) -> dict[str, Any]:
        """Segment several pictures by the same classes; the results are in the pictures' order."""
        question, pictures = await read_question(request, BatchRequest)
        name, answers = await service.answer(request, question, pictures)
        found = [await asyncio.to_thread(describe_result, answer, name, question.output) for answer in answers]
        return {"results": found}

    @app.post("/v1/classes", responses=_ERROR)
    async def classes(content: ClassesRequest) -> dict[str, Any]:
        """Check classes: their names, synonyms, and which a model has seen masks of."""
        _, segmenter = service.segmenter(content.model)
        vocabulary = await asyncio.to_thread(segmenter.vocabulary, service.vocabulary(content.classes))
        return {
            "classes": [
                {"name": one.name, "synonyms": list(one.synonyms), "seen": one.seen} for one in vocabulary.classes
            ]
        }

    @app.get("/v1/models", responses={401: _ERROR[401]})
    async def models() -> dict[str, Any]:
        """The models that are served; the first is the default."""
        return {
            "models": [
                {"name": name, "system": one.model.system, "seen": len(one.model.seen_names)}
                for name, one in service.segmenters.items()
            ],
            "outputs": list(OUTPUTS),
        }

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the service answers."""
        return {"status": "UP", "version": lexiseg.__version__, "waiting": len(service.queue.waiting)}

    @app.get("/metrics", responses={401: _ERROR[401]}, response_class=Response)
    async def metrics() -> Response:
        """Counters in the format of Prometheus."""
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse((resources.files("lexiseg.app") / "page.html").read_text(encoding="utf-8"))

    @app.get("/samples", include_in_schema=False)
    async def samples() -> list[dict[str, str]]:
        return [{"name": name} for name in list_samples()]

    @app.get("/samples/{name}", include_in_schema=False)
    async def sample(name: str) -> Response:
        path = sample_path(name)
        return Response(path.read_bytes(), media_type="image/png" if path.suffix == ".png" else "image/jpeg")
