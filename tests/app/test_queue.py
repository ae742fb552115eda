"""How the service queues work: slow clients, full queues, clients that leave, and stopping."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from lexiseg.app import service
from lexiseg.app.guard import Guard
from lexiseg.app.queue import BusyError, Job, Queue
from tests.app.test_service import SMALL, Running, assert_sentence, b64, head, png, running  # noqa: F401 (a fixture)


class Echo:
    """A model whose results are the pictures; it waits to be released, and takes no bad one."""

    def __init__(self) -> None:
        self.started, self.release = threading.Event(), threading.Event()
        self.passes: list[list[bytes]] = []

    def predict(self, pictures: list[bytes], **arguments: Any) -> list[bytes]:
        self.passes.append(pictures)
        self.started.set()
        assert self.release.wait(20)
        if b"bad" in pictures:
            raise ValueError("bad")
        return pictures

    def scores(self, picture: bytes, **arguments: Any) -> bytes:
        return b"scores of " + picture


def test_only_pictures_that_ask_the_same_share_a_pass() -> None:
    model: Any = Echo()
    queue = Queue(size=5, batch=3, seconds_a_job=3.0)
    jobs = [Job(b"first", "x", model, {})]
    queue.submit(jobs)
    assert model.started.wait(20)
    asked = (("a", "x"), ("b", "y"), ("c", "x"), ("scored", "x"), ("bad", "x"), ("d", "x"))
    jobs += [Job(picture.encode(), key, model, {}, scores=picture == "scored") for picture, key in asked]
    queue.submit(jobs[1:])  # more than the size, but nothing waits
    with pytest.raises(BusyError) as caught:
        queue.submit(jobs[:1])
    assert caught.value.retry_after == 6 * 3
    model.release.set()
    queue.close()
    alone = [[b"a"], [b"c"], [b"bad"]]
    assert model.passes == [[b"first"], [b"a", b"c", b"bad"], *alone, [b"b"], [b"scored"], [b"d"]]
    answers = {job.picture: job.future.result(0) for job in jobs if job.picture != b"bad"}
    assert all(answer.result == picture for picture, answer in answers.items())
    assert {picture for picture, answer in answers.items() if answer.scores} == {b"scored"}
    with pytest.raises(ValueError, match="bad"):
        jobs[5].future.result(0)
    assert queue.seconds_a_job < 3  # nearer to what a picture has taken


def test_other_questions_have_other_keys(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    keys: list[Any] = []

    def refuse(jobs: list[Job]) -> None:
        keys.extend(job.key for job in jobs)
        raise BusyError(1)

    monkeypatch.setattr(running.service.queue, "submit", refuse)
    asked = {"image": b64(png()), "classes": "cat; dog"}
    for change in ({}, {"classes": "cat; cow"}, {"background": 0.5}, {"window": 64}, {"refine": "edges"}):
        assert running.client.post("/v1/segment", json={**asked, **change}).status_code == 503
    assert len(set(keys)) == 5
    running.client.post("/v1/segment", json={**asked, "output": "png"})
    assert keys[5] == keys[0]


def test_a_slow_client_is_told() -> None:
    impatient = Running(SMALL.model_copy(update={"seconds": 1.0}))
    try:
        with socket.create_connection(("127.0.0.1", impatient.port)) as line:
            line.sendall(head(1000))
            assert b" 408 " in line.recv(100)
    finally:
        impatient.stop()


@pytest.mark.parametrize("path", ["/v1/segment", "/v1/batch", "/predict"])
def test_a_client_that_leaves_while_it_sends_is_no_error(running: Running, path: str) -> None:  # noqa: F811
    def left() -> float:
        answered = {"path": path, "status": "499"}
        return running.service.registry.get_sample_value("lexiseg_requests_total", answered) or 0.0

    before, end = left(), time.monotonic() + 20
    with socket.create_connection(("127.0.0.1", running.port)) as line:
        line.sendall(head(1000).replace(b"/v1/segment", path.encode()) + b"{")
    while left() == before and time.monotonic() < end:
        time.sleep(0.02)
    assert left() == before + 1


def test_a_server_that_ends_before_the_answer_says_so() -> None:
    sent: list[Any] = []

    async def forever(*_: Any) -> None:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    async def ask() -> None:
        scope = {"type": "http", "method": "POST", "headers": [], "path": "/v1/segment"}
        asked = asyncio.create_task(Guard(forever, SMALL, lambda *_: None)(scope, forever, send))
        await asyncio.sleep(0)
        asked.cancel()
        await asked

    asyncio.run(ask())
    assert sent[0]["status"] == 503 and b"The service is stopping" in sent[1]["body"]


def test_a_server_that_is_made_to_end_ends_quietly(running: Running) -> None:  # noqa: F811
    sent: list[Any] = []
    messages = [{"type": "lifespan.startup"}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def end() -> None:
        app = service.create_app({"model": running.segmenter}, SMALL)
        asked = asyncio.create_task(app({"type": "lifespan", "state": {}}, receive, send))
        while not sent:
            await asyncio.sleep(0.01)
        asked.cancel()
        await asked

    asyncio.run(end())
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_the_model_has_the_threads_and_answers_have_one_each(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    found: dict[str, set[int]] = {"model": set(), "answer": set()}
    predict, describe = running.segmenter.predict, service.describe_result

    def counted_predict(*arguments: Any, **more: Any) -> Any:
        found["model"].add(torch.get_num_threads())
        return predict(*arguments, **more)

    def counted_describe(*arguments: Any) -> Any:
        found["answer"].add(torch.get_num_threads())
        return describe(*arguments)

    monkeypatch.setattr(running.segmenter, "predict", counted_predict)
    monkeypatch.setattr(service, "describe_result", counted_describe)
    queue = running.service.queue
    monkeypatch.setattr(queue, "threads", 3)
    for _ in range(3):
        assert running.client.post("/v1/segment", json={"image": b64(png()), "classes": "cat; dog"}).status_code == 200
    assert found == {"model": {3}, "answer": {1}}


def test_a_full_queue_says_when_to_come_back(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    release = threading.Event()
    predict = running.segmenter.predict
    sizes: list[int] = []

    def slow(pictures: list[bytes], **arguments: object) -> object:
        sizes.append(len(pictures))
        release.wait(20)
        return predict(pictures, **arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(running.segmenter, "predict", slow)
    body = {"image": b64(png()), "classes": "cat; dog"}
    with ThreadPoolExecutor(12) as clients:
        waiting = [clients.submit(running.client.post, "/v1/segment", json=body) for _ in range(12)]
        time.sleep(1.0)
        release.set()
        replies = [one.result() for one in waiting]
    codes = [reply.status_code for reply in replies]
    assert set(codes) == {200, 503} and codes.count(200) >= SMALL.queue
    busy = next(reply for reply in replies if reply.status_code == 503)
    assert int(busy.headers["retry-after"]) >= 1
    assert_sentence(busy, 503, "busy")
    assert max(sizes) > 1, "requests that waited together did not share a pass"


def test_work_that_nobody_waits_for_ends(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    started, passes, forward = threading.Event(), [], running.segmenter.model.forward

    def slow(images: torch.Tensor, text: torch.Tensor, **words: Any) -> Any:
        passes.append(len(images))
        started.set()
        time.sleep(0.3)
        return forward(images, text, **words)

    monkeypatch.setattr(running.segmenter.model, "forward", slow)
    asked = {"image": b64(png((300, 200))), "classes": "cat; dog"}
    body = json.dumps({**asked, "window": 16}).encode()
    with socket.create_connection(("127.0.0.1", running.port)) as line:
        line.sendall(head(len(body)) + body)
        assert started.wait(20)
    assert running.client.post("/v1/segment", json=asked).status_code == 200
    assert len(passes) < 24  # of 96 windows at the model's size of 192 x 128, four at a time


def test_clients_that_leave_free_their_places(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    started, release = threading.Event(), threading.Event()
    predict = running.segmenter.predict

    def slow(*arguments: Any, **more: Any) -> Any:
        started.set()
        release.wait(20)
        return predict(*arguments, **more)

    monkeypatch.setattr(running.segmenter, "predict", slow)
    queue, body = running.service.queue, json.dumps({"image": b64(png()), "classes": "cat; dog"}).encode()

    def waiting(count: int) -> bool:
        end = time.monotonic() + 20
        while sum(not job.future.cancelled() for job in queue.waiting) != count and time.monotonic() < end:
            time.sleep(0.02)
        return time.monotonic() < end

    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(running.client.post, "/v1/segment", content=body)
        assert started.wait(20)
        lines = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(SMALL.queue)]
        for line in lines:
            line.sendall(head(len(body)) + body)
        assert waiting(SMALL.queue)
        assert running.client.post("/v1/segment", content=body).status_code == 503
        for line in lines:
            line.close()
        assert waiting(0)
        last = clients.submit(running.client.post, "/v1/segment", content=body)
        assert waiting(1)
        release.set()
        assert [first.result().status_code, last.result().status_code] == [200, 200]


def test_stopping_drains_what_waits() -> None:
    stopping = Running(SMALL)
    body = {"image": b64(png((512, 512))), "classes": "cat; dog"}
    with ThreadPoolExecutor(3) as clients:
        waiting = [clients.submit(stopping.client.post, "/v1/segment", json=body) for _ in range(3)]
        time.sleep(0.3)
        stopping.server.should_exit = True
        assert [one.result().status_code for one in waiting] == [200] * 3
    stopping.stop()
