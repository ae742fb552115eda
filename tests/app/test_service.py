"""The service over loopback, as clients use and misuse it."""

from __future__ import annotations

import base64
import io
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from pycocotools import mask as coco

import lexiseg
from lexiseg.app.results import encode_png
from lexiseg.app.service import ServiceSettings, create_app
from lexiseg.exemplars import Exemplar
from lexiseg.formats import bounding_box, to_geojson
from lexiseg.notes import mark_drawn
from lexiseg.samples import sample_path
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import Vocabulary, VocabularyClass
from tests.models.test_cat_seg import build

WORDS = "giraffe; elephant; butterfly; tree; leaves, bush; grass"
MUG = {"name": "mug", "box": [0, 0, 9, 9]}
SMALL = ServiceSettings(max_bytes=2 * 2**20, max_pixels=1_000_000, max_classes=50, seconds=20, queue=4, max_pictures=3)


class Running:
    """A service in a thread, at a free port of the loopback address."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.segmenter = lexiseg.load("zegclip-emoji", device="cpu", max_pixels=settings.max_pixels)
        app = create_app({"zegclip-emoji": self.segmenter}, settings)
        self.service = app.state.service
        config = uvicorn.Config(app, port=0, log_level="error")
        self.server = uvicorn.Server(config)
        listening = config.bind_socket()
        self.port: int = listening.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running(SMALL)
    yield found
    found.stop()


def png(size: tuple[int, int] = (64, 48), seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def demo(size: tuple[int, int]) -> bytes:
    """The upper left of the demo picture."""
    stream = io.BytesIO()
    Image.open(sample_path("demo")).crop((0, 0, *size)).save(stream, "PNG", **mark_drawn(".png"))
    return stream.getvalue()


def head(length: int) -> bytes:
    lines = (
        "POST /v1/segment HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        "",
        "",
    )
    return "\r\n".join(lines).encode()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def assert_sentence(reply: httpx.Response, status: int, says: str) -> None:
    assert reply.status_code == status, reply.text
    sentence = reply.json()["error"]
    assert says in sentence and sentence.endswith(".") and "\n" not in sentence, sentence


def test_a_picture_in_every_form(running: Running) -> None:
    data = demo((512, 300))
    expected = running.segmenter.predict(data, WORDS)
    labels = np.asarray(expected.label_map)
    found = {}
    for output in ("rle", "png", "polygons", "geojson", "scores"):
        reply = running.client.post(
            "/v1/segment", files={"image": ("demo.png", data)}, data={"classes": WORDS, "output": output}
        )
        assert reply.status_code == 200, reply.text
        found[output] = reply.json()
    again = running.client.post("/v1/segment", json={"image": b64(data), "classes": WORDS.split("; ")})
    assert again.json() == found["rle"]
    for row in found["rle"]["classes"]:
        mask = coco.decode(row["rle"]).astype(bool)
        assert np.array_equal(mask, labels == row["id"])
        assert row["area"] == mask.sum() and row["name"] == found["rle"]["names"][row["id"]]
        assert row["bbox"] == bounding_box(mask) and row["color"] == expected.palette()[row["id"]].tolist()
    facts = {row.name: (row.seen, row.fraction, row.score) for row in expected.table()}
    assert {row["name"]: (row["seen"], row["fraction"], row["score"]) for row in found["rle"]["classes"]} == facts
    picture = Image.open(io.BytesIO(base64.b64decode(found["png"]["png"])))
    assert np.array_equal(np.asarray(picture), labels)
    assert all(polygon[0] for row in found["polygons"]["classes"] for polygon in row["polygons"])
    features = found["geojson"]["geojson"]["features"]
    assert found["geojson"]["geojson"] == to_geojson(expected)
    assert all(ring[0] == ring[-1] for one in features for part in one["geometry"]["coordinates"] for ring in part)
    scores = found["scores"]["scores"]
    assert set(scores["maps"]) == set(expected.classes) and scores["low"] < scores["high"]
    maps = [Image.open(io.BytesIO(base64.b64decode(one))) for one in scores["maps"].values()]
    assert max(maps[0].size) == 128 and (np.min(maps), np.max(maps)) == (0, 255)
    best = np.argmax(maps, axis=0)
    small = np.asarray(picture.resize(maps[0].size, Image.Resampling.NEAREST))
    assert (best == small).mean() > 0.9


def test_a_background_and_a_window_can_be_asked_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    data, given, predict = demo((160, 96)), {}, Segmenter.predict

    def noted(segmenter: Segmenter, pictures: Any, classes: Any, background: Any, window: Any) -> Any:
        given.update(background=background, window=window)
        return predict(segmenter, pictures, classes, background=background)  # such windows take seconds

    monkeypatch.setattr(Segmenter, "predict", noted)
    asked = {"image": b64(data), "classes": WORDS, "output": "png", "background": 0.5, "window": 48}
    found = running.client.post("/v1/segment", json=asked).json()
    monkeypatch.undo()
    expected = running.segmenter.predict(data, WORDS, background=0.5)
    assert given == {"background": 0.5, "window": 48}
    assert found["png"] == encode_png(expected.label_image()) and found["ignore_index"] == 255
    assert 0 < found["ignored_fraction"] == expected.num_ignored / (found["width"] * found["height"]) < 1


def test_a_cat_seg_is_served_like_any_other() -> None:
    """In windows and the whole, as the released models run."""
    model = build(resolution=32, window_size=32, window_stride=24, canvas=(48, 48), whole=True)
    segmenter = Segmenter(model, disk_cache=False)
    asked = {"image": b64(png()), "classes": "cat; dog, puppy; grass", "output": "png"}
    with TestClient(create_app({"cat-seg": segmenter}, SMALL)) as client:
        reply = client.post("/v1/segment", json=asked)
    assert reply.status_code == 200, reply.text
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.json()["png"]))))
    expected = segmenter.predict(png(), "cat; dog, puppy; grass").label_map
    assert np.array_equal(picture, np.asarray(expected)) and len(np.unique(picture)) > 1


def test_a_refinement_can_be_asked_for(running: Running) -> None:
    data = sample_path("demo").read_bytes()
    asked = {"image": b64(data), "classes": WORDS, "output": "png"}
    plain = running.client.post("/v1/segment", json=asked).json()
    edges = running.client.post("/v1/segment", json={**asked, "refine": "edges"}).json()
    picture = Image.open(io.BytesIO(base64.b64decode(edges["png"])))
    expected = running.segmenter.with_refinement("edges").predict(data, WORDS).label_map
    assert edges["png"] != plain["png"] and np.array_equal(np.asarray(picture), np.asarray(expected))


def test_no_client_has_sam_downloaded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"image": b64(png()), "classes": WORDS, "refine": "regions"}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *given: None)
    assert_sentence(running.client.post("/v1/segment", json=asked), 422, "no SAM for 'regions'; choose none, edges")


def test_every_client_gets_the_note_on_models_of_the_picture_world(running: Running) -> None:
    asked = {"image": b64(png()), "classes": WORDS}
    answers = [running.client.post("/v1/segment", json=asked).json() for _ in range(2)]
    assert all(len(answer["notes"]) == 1 and "drawn scenes" in answer["notes"][0] for answer in answers)


@pytest.mark.filterwarnings("ignore::lexiseg.LexisegWarning")
def test_no_client_gets_the_note_of_another(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noted of one client's words, which a thread of its own reads, while the model works for another."""
    predict = running.segmenter.predict

    def interrupted(*arguments: Any, **more: Any) -> Any:
        words = threading.Thread(target=running.service.vocabulary, args=("name\nsecret",))
        words.start()
        words.join()
        return predict(*arguments, **more)

    monkeypatch.setattr(running.segmenter, "predict", interrupted)
    reply = running.client.post("/v1/segment", json={"image": b64(png()), "classes": WORDS})
    assert [note for note in reply.json()["notes"] if "drawn scenes" not in note] == []


def test_a_box_on_a_picture_is_a_class(running: Running) -> None:
    data, other = sample_path("demo").read_bytes(), sample_path("street").read_bytes()
    box = [40, 60, 200, 220]
    shown = VocabularyClass("thing", exemplars=(Exemplar(data, box=box),), scored=False)
    expected = running.segmenter.predict(data, Vocabulary((VocabularyClass("grass"), shown)))
    asked = {"image": b64(data), "classes": "grass", "exemplars": [{"name": "thing", "box": box}], "output": "png"}
    found = running.client.post("/v1/segment", json=asked).json()
    assert found["names"] == ["grass", "thing"] and found["png"] == encode_png(expected.label_image())
    form = {"classes": "grass", "output": "png"}
    for image in (None, b64(data)):
        form["exemplars"] = json.dumps([{"name": "thing", "box": box, "image": image}])
        reply = running.client.post("/v1/segment", files={"image": data}, data=form)
        assert reply.json() == found
    reply = running.client.post("/v1/segment", files={"image": other}, data=form)  # an example from another picture
    assert reply.status_code == 200 and reply.json()["names"] == ["grass", "thing"]
    alone = {
        **asked,
        "classes": "",
        "exemplars": [{"name": name, "box": [*box[:2], 90 + i, 99]} for i, name in enumerate("ab")],
    }
    assert running.client.post("/v1/segment", json=alone).json()["names"] == ["a", "b"]
    places = [box, [300, 300, 440, 420]]
    shown = VocabularyClass("thing", exemplars=tuple(Exemplar(data, box=place) for place in places), scored=False)
    expected = running.segmenter.predict(data, Vocabulary((VocabularyClass("grass"), shown)))
    twice = {**asked, "exemplars": [{"name": "thing", "box": place} for place in places]}
    found = running.client.post("/v1/segment", json=twice).json()
    assert found["names"] == ["grass", "thing"] and found["png"] == encode_png(expected.label_image())
    both = {**asked, "classes": "Thing; grass"}
    assert running.client.post("/v1/segment", json=both).json()["names"] == ["Thing", "grass"]
    for exemplar, says in (
        ({"name": "thing", "box": [9, 9, 3, 3]}, "left, top, right, bottom"),
        ({"name": "thing", "box": [5000, 5000, 6000, 6000]}, "nowhere"),
        ({"name": "", "box": box}, "class name"),
        ({"name": "thing", "box": box, "image": "http://a/b"}, "does not fetch"),
        ({"name": "thing", "box": box, "image": b64(b"no picture")}, "picture"),
        ({"name": "thing"}, "box"),
    ):
        assert_sentence(running.client.post("/v1/segment", json={**asked, "exemplars": [exemplar]}), 422, says)
    many = {**asked, "exemplars": [{"name": f"t{i}", "box": box} for i in range(4)]}
    assert_sentence(running.client.post("/v1/segment", json=many), 422, "more than 3 exemplars")
    assert_sentence(
        running.client.post("/v1/segment", files={"image": data}, data={**form, "exemplars": "["}), 422, "exemplars"
    )


def test_a_batch_keeps_the_order(running: Running) -> None:
    pictures = [png((40 + 8 * index, 32), index) for index in range(3)]
    reply = running.client.post(
        "/v1/batch",
        files=[("images", (f"{i}.png", one)) for i, one in enumerate(pictures)],
        data={"classes": "cat; dog"},
    )
    assert [one["width"] for one in reply.json()["results"]] == [40, 48, 56]
    reply = running.client.post("/v1/batch", json={"images": [b64(pictures[2])], "classes": "cat; dog"})
    assert [one["width"] for one in reply.json()["results"]] == [56]
    for broken in (b"no picture", pictures[1][:60]):
        for place in (0, 1, 2):
            images = [b64(broken if index == place else one) for index, one in enumerate(pictures)]
            reply = running.client.post("/v1/batch", json={"images": images, "classes": "cat; dog"})
            assert reply.status_code == 422 and reply.json()["error"].startswith(f"Picture {place + 1}: "), reply.text


def test_what_is_wrong_is_a_sentence_with_its_status(running: Running) -> None:
    client, good = running.client, {"image": b64(png()), "classes": "cat; dog"}
    huge = io.BytesIO()
    Image.new("L", (3000, 3000)).save(huge, "PNG")
    for change, status, says in (
        ({"image": "http://example.org/a.png"}, 422, "does not fetch URLs"),
        ({"image": "%%%"}, 422, "base64"),
        ({"image": b64(b"not a picture")}, 422, "picture"),
        ({"image": b64(huge.getvalue())}, 422, "pixels"),
        ({"image": b64(png()[:60])}, 422, "picture"),
        ({"classes": ""}, 422, "class"),
        ({"classes": "cat; cat"}, 422, "twice"),
        ({"classes": "cat; " + "very " * 100 + "long"}, 422, "shorter name"),
        ({"classes": "; ".join(f"c{i}" for i in range(60))}, 422, "more than 50 classes"),
        ({"classes": [f"c{i}" for i in range(49)], "exemplars": [MUG, MUG]}, 422, "more than 50 classes"),
        ({"classes": ["cat", "dog, " + ", ".join(f"c{i}" for i in range(200))]}, 422, "200 words"),
        ({"background": "sky, " * 1000 + "sky"}, 422, "1000 characters"),
        ({"classes": '["cat", "Cat"]'}, 422, "twice"),
        ({"exemplars": [{**MUG, "image": "%%%"}]}, 422, "exemplar's picture is not"),
        ({"classes": 5}, 422, "'classes': "),
        ({"model": "other"}, 404, "not served"),
        ({"window": -3}, 422, "window"),
        ({"background": True}, 422, "background"),
        ({"output": "bitmap"}, 422, "output"),
        ({"colour": "red"}, 422, "colour"),
        ({"refine": "polish"}, 422, "refine"),
    ):
        reply = client.post("/v1/segment", json={**good, **change})
        assert_sentence(reply, status, says)
    for path, body in itertools.product(("/v1/segment", "/v1/classes"), (b"", b"{", b"11", b"[]", b'{"classes": 1,}')):
        reply = client.post(path, content=body, headers={"content-type": "application/json"})
        assert_sentence(reply, 422, "The body is not a JSON object (")
    assert_sentence(client.post("/v1/segment", data={"classes": "a"}, files={"x": ("", b"")}), 422, "picture")
    assert_sentence(client.post("/v1/segment", data={"classes": ["a", "b"]}, files={"image": png()}), 422, "twice")
    two = [("image", ("a.png", png())), ("image", ("b.png", png()))]
    assert_sentence(client.post("/v1/segment", data={"classes": "a; b"}, files=two), 422, "send several to /v1/batch")
    assert_sentence(
        client.post("/v1/batch", json={"images": [good["image"]] * 4, "classes": "a; b"}), 422, "more than 3"
    )
    images = [good["image"], "%%%"]
    assert_sentence(client.post("/v1/batch", json={"images": images, "classes": "a; b"}), 422, "Picture 2 is not valid")
    assert_sentence(client.get("/nothing"), 404, "Not Found")
    assert_sentence(client.get("/v1/segment"), 405, "Method")


def test_empty_options_are_left_out(running: Running) -> None:
    words, picture = {"classes": "cat; dog"}, png()
    names = ("model", "exemplars", "background", "window", "refine", "output")
    empty = {**words, **dict.fromkeys(names, "")}
    plain = running.client.post("/v1/segment", files={"image": picture}, data=words).json()
    assert "rle" in plain["classes"][0]
    assert running.client.post("/v1/segment", files={"image": picture}, data=empty).json() == plain
    assert running.client.post("/v1/segment", json={"image": b64(picture), **empty}).json() == plain
    reply = running.client.post("/v1/segment", files={"image": picture}, data={**words, "windows": ""})
    assert_sentence(reply, 422, "windows")


@pytest.mark.parametrize("text", ["cat; dog", "[cat, dog]", '["cat", "dog"]', "cat\ndog"])
def test_a_list_may_come_as_text(running: Running, text: str) -> None:
    reply = running.client.post("/v1/classes", json={"classes": text})
    assert [one["name"] for one in reply.json()["classes"]] == ["cat", "dog"]


def test_words_of_clients_are_never_files(running: Running, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("hunter2\n")
    for text in (f"@{secret}", str(secret), f"[{secret}]", f"mug = cup, photo:{secret}"):
        reply = running.client.post("/v1/classes", json={"classes": text})
        assert "hunter2" not in reply.text
        if text.startswith("mug"):
            assert_sentence(reply, 422, "does not open files")
        elif reply.status_code == 200:
            assert secret.name in reply.text  # the words themselves


def test_classes_are_checked_as_they_are_typed(running: Running) -> None:
    found = running.client.post("/v1/classes", json={"classes": "giraffe; elephant; tree, bush"}).json()["classes"]
    assert [(one["name"], one["seen"]) for one in found] == [("giraffe", False), ("elephant", True), ("tree", True)]
    assert_sentence(running.client.post("/v1/classes", json={"classes": "a; a"}), 422, "twice")


def test_health_models_metrics_and_openapi(running: Running) -> None:
    client = running.client
    assert client.get("/health").json()["status"] == "UP"
    assert client.get("/v1/models").json()["models"][0]["name"] == "zegclip-emoji"
    client.post("/v1/segment", json={"image": b64(png()), "classes": "cat; dog"})
    assert 'lexiseg_requests_total{path="/v1/segment",status="200"}' in client.get("/metrics").text
    paths = client.get("/openapi.json").json()["paths"]
    assert "example" in json.dumps(paths["/v1/segment"])
    assert "<title>lexiseg</title>" in client.get("/").text
    assert client.get("/samples/demo").headers["content-type"] == "image/png"
    assert_sentence(client.get("/samples/..%2Fsecret"), 404, "Not Found")
    assert_sentence(client.get("/samples/nothing"), 422, "no sample")


def test_bodies_that_are_too_large_are_refused_early(running: Running) -> None:
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", running.port)) as line:
        line.sendall(head(2 * 2**20 + 1) + b"x" * 1000)
        assert b" 413 " in line.recv(100)
    assert time.monotonic() - started < 5

    def endless() -> Iterator[bytes]:
        for _ in range(300):
            yield b"x" * 2**16

    try:
        reply = running.client.post("/v1/segment", content=endless(), headers={"content-type": "application/json"})
        assert_sentence(reply, 413, "larger than 2 MiB")
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        pass  # the service hung up while we were still sending, which is its right


def test_pages_of_other_sites_are_refused(running: Running) -> None:
    """Without asking for leave they may send what a form could: such a body, and one of pictures."""
    asked = {"content": json.dumps({"image": b64(png()), "classes": "cat; dog"})}
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        headers = {"content-type": "text/plain", "sec-fetch-site": site}
        assert running.client.post("/v1/segment", headers=headers, **asked).status_code == status
    link = running.client.get("/", headers={"sec-fetch-site": "cross-site"})
    assert link.status_code == 200


def test_a_service_for_this_machine_has_no_other_name(running: Running) -> None:
    """A page may have its own name resolve to this machine, and then read what the service answers."""
    settings = SMALL.model_copy(update={"local": True})
    with TestClient(create_app({"zegclip-emoji": running.segmenter}, settings)) as client:
        for host in ("localhost:8080", "127.0.0.1", "[::1]:8080", "192.168.1.5:80"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200
        for host in ("rebound.example:8080", "localhost.example", "127.0.0.1.example", "[::1", "a@b"):
            assert_sentence(client.get("/v1/models", headers={"host": host}), 403, "answers to localhost only")
    settings = settings.model_copy(update={"token": "open sesame"})  # which the page's owner does not know
    headers = {"host": "proxy.example", "authorization": "Bearer open sesame"}
    with TestClient(create_app({"zegclip-emoji": running.segmenter}, settings)) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_the_token_is_asked_for() -> None:
    guarded = Running(SMALL.model_copy(update={"token": "open sesame"}))
    try:
        assert guarded.client.get("/health").status_code == 200
        assert "token" in guarded.client.get("/").text  # the page, in which a person types it
        assert_sentence(guarded.client.get("/v1/models"), 401, "token")
        headers = {"Authorization": "Bearer open sesame"}
        assert guarded.client.get("/v1/models", headers=headers).status_code == 200
    finally:
        guarded.stop()
