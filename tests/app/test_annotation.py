"""Label Studio's and CVAT's requests, as these tools send them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

import lexiseg
from lexiseg.app.annotation import encode_brush
from lexiseg.app.service import ServiceSettings, create_app
from lexiseg.samples import sample_path

JSON = {"content-type": "application/json"}
INTERFACE = """<View><!-- people's comments stay -->
  <Image name="img" value="$photo"/>
  <BrushLabels name="tag" toName="img"><Label value="elephant"/>
  <Label value="leaves" alias="foliage"/><Label value="grass"/>
  </BrushLabels></View>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("files")
    (found / "sub").mkdir()
    (found / "sub" / "demo.png").write_bytes(sample_path("demo").read_bytes())
    Image.open(sample_path("demo")).crop((0, 0, 512, 300)).save(found / "sub" / "wide.png")
    (found.parent / "outside.png").write_bytes(b"secret")
    return found


@pytest.fixture(scope="module")
def segmenter() -> Any:
    return lexiseg.load("zegclip-emoji", device="cpu")


@pytest.fixture(scope="module")
def client(segmenter: Any, folder: Path) -> Any:
    settings = ServiceSettings(classes="elephant; leaves; grass", files=folder)
    with TestClient(create_app({"zegclip-emoji": segmenter}, settings), raise_server_exceptions=False) as found:
        yield found


def decode_brush(data: list[int], size: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) of Label Studio's ``rle``, ``data`` its bytes."""
    bits = "".join(f"{byte:08b}" for byte in data)
    place = 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        assert place <= len(bits)
        return int(bits[place - count : place] or "0", 2)

    total, width = take(32), take(5) + 1
    widths = [take(4) + 1 for _ in range(4)]
    assert total == 4 * size[0] * size[1]
    values: list[int] = []
    while len(values) < total:
        repeats, run = take(1), take(widths[take(2)]) + 1
        values += [take(width)] * run if repeats else [take(width) for _ in range(run)]
    return np.array(values).reshape(*size, 4)[..., 3] > 0


def test_brush_labels_survive_a_round_trip() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random((7, 9)) > 0.5, np.zeros((300, 260), bool), np.ones((300, 260), bool), np.eye(40, dtype=bool)]
    for mask in masks:
        assert np.array_equal(decode_brush(encode_brush(mask), mask.shape), mask)


def test_label_studio_connects_and_predicts(client: TestClient, segmenter: Any) -> None:
    assert client.post("/setup", json={"project": "1", "schema": INTERFACE}).json() == {
        "model_version": "zegclip-emoji"
    }
    data = sample_path("demo").read_bytes()
    expected = segmenter.predict(data, "elephant; leaves; grass")
    embedded = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (embedded, "/data/local-files/?d=sub/demo.png"):
        request = {
            "tasks": [{"id": 7, "data": {"photo": source}}],
            "label_config": INTERFACE,
            "params": {"context": None},
        }
        reply = client.post("/predict", json=request)
        assert reply.status_code == 200, reply.text
        (found,) = reply.json()["results"]
        scores = [row.score for row in expected.table()]
        assert found["model_version"] == "zegclip-emoji" and found["score"] == pytest.approx(np.mean(scores))
        assert sorted(one["score"] for one in found["result"]) == sorted(scores)
        labels = {}
        for one in found["result"]:
            assert (one["from_name"], one["to_name"], one["type"]) == ("tag", "img", "brushlabels")
            size = (one["original_height"], one["original_width"])
            labels[one["value"]["brushlabels"][0]] = decode_brush(one["value"]["rle"], size)
        assert set(labels) == {"elephant", "foliage", "grass"}
        assert np.array_equal(labels["foliage"], expected.mask("leaves").numpy())


def test_label_studio_polygons(client: TestClient, segmenter: Any, folder: Path) -> None:
    interface = INTERFACE.replace("BrushLabels", "PolygonLabels")
    request = {"tasks": [{"data": {"photo": "/data/local-files/?d=sub/wide.png"}}], "label_config": interface}
    (found,) = client.post("/predict", json=request).json()["results"]
    assert found["result"][0]["type"] == "polygonlabels"
    expected = segmenter.predict(folder / "sub" / "wide.png", "elephant; leaves; grass")
    percent = np.array(expected.size[::-1]) / 100
    leaves = [one["value"]["points"] for one in found["result"] if one["value"]["polygonlabels"] == ["foliage"]]
    for points, (outer, *_) in zip(leaves, expected.polygons()["leaves"], strict=True):
        np.testing.assert_allclose(points, np.array(outer) / percent)


def test_label_studio_with_several_controls_and_labels_of_several_words(client: TestClient) -> None:
    interface = """<View><Image name="img" value="$photo"/>
      <BrushLabels name="one" toName="img"><Label value="elephant;  big"/></BrushLabels>
      <BrushLabels name="two" toName="img"><Label value="leaves, bush"/><Label value="elephant;  big"/></BrushLabels>
      <PolygonLabels name="three" toName="img"><Label value="grass"/></PolygonLabels></View>"""
    request = {"tasks": [{"data": {"photo": "/data/local-files/?d=sub/demo.png"}}], "label_config": interface}
    (found,) = client.post("/predict", json=request).json()["results"]
    drawn = {(one["from_name"], one["type"], *one["value"][one["type"]]) for one in found["result"]}
    assert drawn == {
        ("one", "brushlabels", "elephant;  big"),
        ("two", "brushlabels", "leaves, bush"),
        ("three", "polygonlabels", "grass"),
    }


@pytest.mark.parametrize(
    ("source", "interface", "says"),
    [
        ("/data/local-files/?d=../outside.png", INTERFACE, "no such file"),
        ("/data/local-files/?d=/etc/passwd", INTERFACE, "no such file"),
        ("/data/local-files/?d=%00", INTERFACE, "no such file"),
        ("/data/local-files/?d=" + "x" * 5000, INTERFACE, "no such file"),
        ("/data/local-files/?d=sub/demo.png", INTERFACE.replace('"grass"', '"; "'), "Class 3 is empty"),
        ("http://example.org/a.png", INTERFACE, "does not fetch URLs"),
        ("http://[::1", INTERFACE, "does not fetch URLs"),
        ("[::1", INTERFACE, "not valid base64"),
        (None, INTERFACE, "no picture under 'photo'"),
        ("x", "<View>", "not valid XML"),
        ("x", "<View/>", "needs an Image"),
        ("x", '<!DOCTYPE a [<!ENTITY b "c">]>' + INTERFACE, "document type"),
        ("x", INTERFACE.replace("<Label ", "<Other "), "no Label"),
        ("x", "<View><Image/>" + "<PolygonLabels>" * 9 + "</PolygonLabels>" * 9 + "</View>", "in each other"),
    ],
)
def test_label_studio_s_mistakes(client: TestClient, source: str | None, interface: str, says: str) -> None:
    reply = client.post("/predict", json={"tasks": [{"data": {"photo": source}}], "label_config": interface})
    assert reply.status_code == 422 and says in reply.json()["error"], reply.text


@pytest.mark.parametrize("data", [[1], "x", 3])
def test_a_task_of_another_shape_has_no_picture(client: TestClient, data: Any) -> None:
    reply = client.post("/predict", json={"tasks": [{"data": data}], "label_config": INTERFACE})
    assert reply.status_code == 422 and "no picture under 'photo'" in reply.json()["error"]


def test_a_length_of_thousands_of_digits_is_too_large(client: TestClient) -> None:
    reply = client.post("/setup", content=b"{}", headers={**JSON, "content-length": "9" * 5000})
    assert reply.status_code == 413, reply.text


def test_half_of_a_surrogate_pair_is_no_interface(client: TestClient) -> None:
    reply = client.post("/setup", content=r'{"schema": "<View>\ud800</View>"}', headers=JSON)
    assert reply.status_code == 422 and "not valid XML" in reply.json()["error"], reply.text


def test_cvat_s_shape(client: TestClient, segmenter: Any) -> None:
    cv2 = pytest.importorskip("cv2")
    data = sample_path("demo").read_bytes()
    expected = segmenter.predict(data, "elephant; leaves; grass")
    lowest = min(row.score for row in expected.table())
    found = client.post("/cvat", json={"image": base64.b64encode(data).decode(), "threshold": lowest}).json()
    assert {one["label"] for one in found} == {row.name for row in expected.table()}
    for one in found:
        *inside, left, top, right, bottom = one["mask"]
        mask = np.zeros(tuple(expected.size), bool)
        shape = (bottom - top + 1, right - left + 1)
        mask[top : bottom + 1, left : right + 1] = np.reshape(inside, shape)
        assert np.array_equal(mask, expected.mask(one["label"]).numpy())
        assert one["type"] == "mask" and len(one["points"]) >= 6 and float(one["confidence"]) > 0
        outlines = [np.array(rings[0], np.float32) for rings in expected.polygons()[one["label"]]]
        assert one["points"] == max(outlines, key=cv2.contourArea).ravel().tolist()
    assert client.post("/cvat", json={"image": base64.b64encode(data).decode(), "threshold": 2.0}).json() == []


def test_what_the_service_was_not_started_with_is_said(segmenter: Any) -> None:
    task = {"data": {"photo": "/data/local-files/?d=sub/demo.png"}}
    with TestClient(create_app({"zegclip-emoji": segmenter})) as plain:
        for path, body, says in (
            ("/predict", {"tasks": [task], "label_config": INTERFACE}, "start the service with --files FOLDER."),
            ("/cvat", {"image": ""}, "start the service with --classes 'cat; dog'."),
        ):
            reply = plain.post(path, json=body)
            assert reply.status_code == 422 and reply.json()["error"].endswith(says)


@pytest.mark.parametrize("threshold", ["NaN", "Infinity", '"nan"'])
def test_a_threshold_that_is_no_number_is_refused(client: TestClient, threshold: str) -> None:
    reply = client.post("/cvat", content=f'{{"image": "", "threshold": {threshold}}}', headers=JSON)
    assert reply.status_code == 422 and "'threshold'" in reply.json()["error"], reply.text
