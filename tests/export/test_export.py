"""Round trips: a model, its graphs, and the same labels without torch."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import lexiseg
from lexiseg.cli import main
from lexiseg.clip.proxy import Proxy
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS
from lexiseg.segmenter import Segmenter
from tests.models.test_deop import OPTIONS as DEOP
from tests.towers import small_clip

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from lexiseg.export.exporting import export
from lexiseg.export.runtime import ExportedPredictor, open_graph

CLASSES = "giraffe; tree, bush; sky; a very old wooden door"
ZEGCLIP: dict[str, Any] = {"num_prompts": 3, "decoder_heads": 4, "decoder_layers": 2}
CAT_SEG: dict[str, Any] = {
    **{"hidden_dim": 16, "heads": 2, "guidance_dims": [8, 8], "decoder_guidance_dims": [4, 4], "decoder_dims": [8, 8]},
    **{"appearance_dim": 8, "text_dim": 8, "attention_window": 3, "padding": 6},
}
WINDOWS: dict[str, Any] = {"window_size": 32, "window_stride": 16, "short_side": 40}


def small(system: str = "zegclip", *, seen: tuple[str, ...] = ("giraffe", "sky"), **options: Any) -> Segmenter:
    torch.manual_seed(1)
    model = SYSTEMS[system].build(small_clip(vision_cfg={"layers": 2}), options, seen_names=seen)
    return Segmenter(model, disk_cache=False)


def small_proxy() -> Proxy:
    """A second encoder with patches half as large as the tower's."""
    torch.manual_seed(2)
    trunk = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=24, depth=2, num_heads=4, num_classes=0, dynamic_img_size=True
    )
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Proxy(trunk, positions="bicubic-offset")


def picture(width: int = 90, height: int = 64, seed: int = 0) -> np.ndarray:
    small_one = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
    return np.asarray(Image.fromarray(small_one).resize((width, height), Image.Resampling.BICUBIC))


def assert_same(segmenter: Segmenter, exported: Any, images: list[np.ndarray], classes: str = CLASSES) -> None:
    want = segmenter.predict(images, classes, window=exported.model.window)
    got = exported.predict(images, classes)
    equal = np.mean([np.mean(np.asarray(a.label_map) == b.label_map) for a, b in zip(want, got, strict=True)])
    assert equal >= 0.999
    for a, b in zip(want, got, strict=True):
        assert isinstance(b.label_map, np.ndarray) and b.vocabulary == a.vocabulary
        # Pillow's resize differs from torch's by a level here and there; sharp attention makes most of it.
        np.testing.assert_allclose(np.asarray(a.scores), b.scores, atol=1e-2)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return small(**ZEGCLIP)


@pytest.fixture(scope="module")
def folder(segmenter: Segmenter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(segmenter, folder)
    return folder


@pytest.fixture(scope="module")
def exported(folder: Path) -> Any:
    return lexiseg.load(folder)


def test_labels_are_the_same_at_any_size(segmenter: Segmenter, exported: Any) -> None:
    assert isinstance(exported, ExportedPredictor)
    assert not exported.model.spec.sizes
    assert_same(segmenter, exported, [picture(), picture(41, 33, 1), picture(200, 20, 2), picture(13, 70, 3)])
    assert_same(segmenter, exported, [picture()], "cat; " + "; ".join(f"thing {index}" for index in range(300)))
    with pytest.warns(lexiseg.LexisegWarning, match="only class"):
        assert_same(segmenter, exported, [picture()], "cat")


def test_a_single_word_shares_its_softmax_with_none(tmp_path: Path) -> None:
    segmenter = small(**ZEGCLIP, mask_loss="cross-entropy")
    export(segmenter, tmp_path / "model")
    with pytest.warns(lexiseg.LexisegWarning, match="only class"):
        assert_same(segmenter, lexiseg.load(tmp_path / "model"), [picture()], "cat")


def test_settings_of_a_prediction_are_the_same(segmenter: Segmenter, exported: Any) -> None:
    image = picture(120, 80)
    for settings in ({"window": (32, 24)}, {"window": 0}, {"background": "none"}, {"background": 0.45}):
        want = np.asarray(segmenter.predict(image, CLASSES, **settings).label_map)
        got = exported.predict(image, CLASSES, **settings).label_map
        assert np.mean(want == got) >= 0.999, settings
    held = exported.set_image(image)
    copied = pickle.loads(pickle.dumps(exported)).predict(image, CLASSES)
    assert np.array_equal(copied.label_map, exported.predict(image, CLASSES).label_map)
    assert np.array_equal(held.predict(CLASSES).label_map, exported.predict(None, CLASSES).label_map)
    scores = exported.scores(image, CLASSES)
    assert np.mean(scores.label_map((80, 120))[0].numpy() == exported.predict(image, CLASSES).label_map) >= 0.999
    refined = exported.with_refinement("edges").predict(image, CLASSES).label_map
    assert np.mean(np.asarray(segmenter.with_refinement("edges").predict(image, CLASSES).label_map) == refined) >= 0.999


def test_words_are_not_remembered_without_end(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text, templates = exported.model.text, exported.model.default_templates
    expected = text(["cat", "dog", "owl"], templates)
    monkeypatch.setattr("lexiseg.export.runtime.REMEMBERED", 2)
    for _ in range(2):
        np.testing.assert_allclose(text(["owl", "dog", "fox"], templates)[:2], expected[[2, 1]], atol=1e-5)
    text(["fox", "elk"], templates)
    assert set(text.known) == {("fox", templates), ("elk", templates)}


def test_tokens_are_open_clips(segmenter: Segmenter, exported: Any) -> None:
    texts = [
        "a photo of a cat",
        "don't stop",
        "naïve café",
        "日本語の犬",
        "x &amp;amp; y",
        "\uff26\uff35LL width",
        "5kg 42",
    ]
    texts += ["emoji 🦒🦒!", "  white \t space ", "a-b_c/d?!...", "it's I've WE'LL", "straße ŒUVRE", "schÃ¶n"]
    texts += ["<end_of_text> x", "<START_of_text>", "", "!"]
    texts += [f"{word} {index}" for index, word in enumerate(("grass", "wall-concrete", "Sea; sand", "o'clock", "3D"))]
    for text in texts:
        want = segmenter.model.clip.tokenize([text])[0]
        ids = exported.model.text.tokens(text)
        assert ids == want[: len(ids)].tolist(), text
        assert exported.model.text.count_tokens(text) == segmenter.model.clip.count_tokens(text)


def test_text_embeddings_are_the_same(segmenter: Segmenter, exported: Any) -> None:
    vocabulary = segmenter.vocabulary("cat; a rather long name of a thing; tree, bush")
    templates = ("a photo of a {}.", "{}")
    want = segmenter.embedder.embed(vocabulary.words, templates).numpy()
    np.testing.assert_allclose(exported.model.text(vocabulary.words, templates), want, atol=1e-5)
    with pytest.raises(LexisegError, match="tokens"):
        exported.predict(picture(), "cat; " + "very " * 100)


def test_what_an_export_does_not_do_is_a_sentence(folder: Path, exported: Any, tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "mug.png")
    mug = f"mug = photo:{tmp_path / 'mug.png'}#1 1 20 20; sky"
    for call, sentence in (
        (lambda: lexiseg.load(folder, dtype="bf16"), "precision it was exported in"),
        (lambda: lexiseg.load(folder, device="moon").predict(picture(), CLASSES), "no device 'moon'"),
        (lambda: exported.predict(picture(), mug), "only words"),
        (lambda: export(exported, tmp_path / "again"), "already exported"),
        (lambda: export("zegclip-emoji", tmp_path / "again"), "a Segmenter, not zegclip-emoji"),  # type: ignore[arg-type]
    ):
        with pytest.raises(LexisegError, match=sentence):
            call()
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "image.onnx").write_bytes(b"no graph")
    with pytest.raises(LexisegError, match="cannot be loaded"):
        lexiseg.load(broken).predict(picture(), CLASSES)


def test_predict_imports_no_torch(folder: Path, tmp_path: Path) -> None:
    for index in range(2):
        Image.fromarray(picture(seed=index)).save(tmp_path / f"{index}.png")
    script = (
        "import sys; from lexiseg.cli import main; code = main(sys.argv[1:]); "
        "print(code, *sorted({'torch', 'open_clip', 'transformers', 'timm'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(lexiseg.__file__).parents[1])}
    for pictures in (["0.png"], ["0.png", "1.png"]):
        words = ["predict", *pictures, CLASSES, "--model", str(folder), "--save", "overlay,labels,json,coco"]
        command = [sys.executable, "-c", script, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "0", done.stdout + done.stderr
    assert (tmp_path / "out" / "1_labels.png").is_file()


def test_the_command_line(
    folder: Path, segmenter: Segmenter, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    load = lexiseg.load
    monkeypatch.setattr(lexiseg, "load", lambda name, **more: segmenter if name == "small" else load(name, **more))

    def copy(*_: Any, **__: Any) -> Any:
        shutil.copytree(folder, tmp_path / "new")
        return load(folder).model.spec

    monkeypatch.setattr("lexiseg.export.exporting.export", copy)
    assert main(["export", "small", "-o", str(tmp_path / "new"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["equal"] >= 0.999 and said["precision"] == "fp32"
    assert json.loads((tmp_path / "new" / "report.json").read_text())["equal"] == said["equal"]
    (tmp_path / "new" / "export.json").write_text("{")
    image = tmp_path / "a.png"
    Image.fromarray(picture()).save(image)
    assert main(["predict", str(image), CLASSES, "--model", str(tmp_path / "new"), "-o", str(tmp_path)]) == 2
    assert "not readable JSON" in capsys.readouterr().err


def test_graphs_of_other_models_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    new = shutil.copytree(folder, tmp_path / "new")
    said = json.loads((new / "export.json").read_text())
    for part, change, words in (
        ("decode", {"resize_to": "frame"}, "is 'frame'"),
        ("fit", {"kind": "pad", "size": [16, 16]}, "'fit.size'"),
    ):
        (new / "export.json").write_text(json.dumps(said | {part: said[part] | change}))
        with pytest.raises(LexisegError, match=words):
            lexiseg.load(new)
    (new / "export.json").write_text(json.dumps(said))
    shutil.copy(folder / "text.onnx", new / "image.onnx")
    with pytest.raises(LexisegError, match=r"image\.onnx' cannot be run \(.*; export the model again"):
        lexiseg.load(new).predict(picture(), CLASSES)
    (new / "tokenizer.json").write_text(Tokenizer(WordLevel({"cat": 0}, unk_token="")).to_str())
    with pytest.raises(LexisegError, match="cannot be read; export the model again"):
        lexiseg.load(new)


def test_it_is_served_and_evaluated(exported: Any, folder: Path, tmp_path: Path) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    from lexiseg.app.service import create_app
    from lexiseg.evaluation import evaluate

    Image.fromarray(picture()).save(tmp_path / "a.png")
    with testclient.TestClient(create_app({"small": exported})) as client:
        for output in ("rle", "png", "scores"):
            data = {"classes": CLASSES, "output": output}
            answer = client.post("/v1/segment", data=data, files={"image": (tmp_path / "a.png").read_bytes()})
            assert answer.status_code == 200, answer.text
        assert client.get("/v1/models").json()["models"][0]["system"] == "zegclip"
    evaluate("picture-world", exported, size=64, limit=1, progress=False)  # as it is loaded
    report = evaluate("picture-world", folder, size=64, limit=2, progress=False)
    assert report.protocol["model"]["system"] == "zegclip" and 0 <= report.metrics.pacc <= 1


def test_one_fixed_size_and_a_folder_that_is_replaced(segmenter: Segmenter, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(LexisegError, match="not an exported model"):
        export(segmenter, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(LexisegError, match="multiple of the patch"):
        export(segmenter, tmp_path / "model", sizes=[36])
    spec = export(segmenter, tmp_path / "model", sizes=[40])
    assert spec.sizes == ((40, 40),) and spec.window.size == 40
    fixed = lexiseg.load(tmp_path / "model")
    assert_same(segmenter, fixed, [picture(), picture(30, 90, 1)])
    with pytest.raises(LexisegError, match="windows of 40 x 40 pixels, not of 32 x 32"):
        fixed.predict(picture(), CLASSES, window=32)
    with pytest.raises(LexisegError, match="crop the picture until its longer side is at most 4 times"):
        fixed.predict(picture(10, 90), CLASSES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("cascade-clip", {**ZEGCLIP, "groups": "{1},{2}"}),
        ("cascade-clip", {**ZEGCLIP, "groups": "{1},{2}", "base": "spt-seg"}),
        ("spt-seg", ZEGCLIP),
        ("second-look", ZEGCLIP),
        ("cat-seg", CAT_SEG),
        ("dense-clip", {"method": "maskclip"}),
        ("dense-clip", {"method": "naclip", "window_size": 32, "window_stride": 16}),
        ("dense-clip", {"method": "clearclip", "window_size": 30, "window_stride": 20, "short_side": 40}),
        ("dense-clip", {"method": "sclip"}),
        ("dense-clip", {"method": "gem", "depth": 2}),
        ("dense-clip", {"method": "resclip", "middle_blocks": [0], **WINDOWS}),
        ("dense-clip", {"method": "proxyclip", "proxy": "small.dino", "pad_to": 16, **WINDOWS}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("method", value.get("base", "")),
)
def test_every_system_makes_the_round_trip(
    system: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lexiseg.clip.proxy.load_proxy", lambda _: small_proxy())
    segmenter = small(system, **options)
    export(segmenter, tmp_path / "model")
    exported = lexiseg.load(tmp_path / "model")
    assert_same(segmenter, exported, [picture(), picture(32, 32, 1), picture(57, 100, 2)])
    with pytest.warns(lexiseg.LexisegWarning, match="only class"):
        assert_same(segmenter, exported, [picture()], "cat")
    if options.get("method") == "resclip":  # whose second pass looks at 32 words at most
        assert_same(segmenter, exported, [picture()], "; ".join(f"thing {index}" for index in range(50)))


def test_a_full_disk_is_a_sentence(segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LexisegError, match=r"Cannot write .*tokenizer.*No space left on device\); free disk space\.$"):
        export(segmenter, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LexisegError, match="regions and crops depend on the picture"):
        export(Segmenter(SYSTEMS["deop"].build(small_clip(), DEOP), disk_cache=False), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_fewer_bits_change_few_labels(segmenter: Segmenter, tmp_path: Path, precision: str) -> None:
    export(segmenter, tmp_path / "model", precision=precision)
    narrow = lexiseg.load(tmp_path / "model")
    image = picture()
    want, got = np.asarray(segmenter.predict(image, CLASSES).scores), narrow.predict(image, CLASSES).scores
    np.testing.assert_allclose(want, got, atol=0.05)
    assert not np.array_equal(want, got)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_other_formats(segmenter: Segmenter, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.setattr("lexiseg.export.exporting.shutil.which", lambda _: None)  # compiling takes minutes
    export(segmenter, tmp_path / "model", kind=kind)
    exported = lexiseg.load(tmp_path / "model")
    assert_same(segmenter, exported, [picture(), picture(41, 33, 1)])
    with pytest.warns(lexiseg.LexisegWarning, match="only class"):
        assert_same(segmenter, exported, [picture()], "cat")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++")
def test_torch_is_compiled_where_there_is_a_compiler(tmp_path: Path) -> None:
    clip = small_clip(vision_cfg={"layers": 1}, text_cfg={"layers": 1})
    model = SYSTEMS["zegclip"].build(clip, {**ZEGCLIP, "decoder_layers": 1})
    segmenter = Segmenter(model, disk_cache=False)
    assert export(segmenter, tmp_path / "model", kind="torch").compiled
    exported = lexiseg.load(tmp_path / "model")
    assert exported.model.spec.compiled
    assert_same(segmenter, exported, [picture(), picture(41, 33, 1)])
    with pytest.warns(lexiseg.LexisegWarning, match="only class"):
        assert_same(segmenter, exported, [picture()], "cat")


FIRST_RUNS = """
import sys, threading, types
import numpy as np
from lexiseg.export.runtime import open_graph

graph = open_graph({path!r}, types.SimpleNamespace(kind="openvino"), "cpu")
sys.setswitchinterval(1e-6)
together = threading.Barrier(8)
threads = [threading.Thread(target=lambda: (together.wait(), graph(np.ones((3, 256), np.float32)))) for _ in range(8)]
for one in threads:
    one.start()
"""
"""A process's first runs of a graph, all at once: they waited for each other for ever, one time in four."""


def test_threads_share_a_graph_of_openvino(tmp_path: Path) -> None:
    """One request for all of them was busy, or gave one thread what it had computed for another."""
    openvino = pytest.importorskip("openvino")
    given = openvino.opset13.parameter([-1, 256], np.float32, name="x")
    weights = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    model = openvino.Model([openvino.opset13.matmul(given, weights, False, False)], [given])
    openvino.save_model(model, tmp_path / "graph.xml", compress_to_fp16=False)
    spec: Any = SimpleNamespace(kind="openvino")
    graph = open_graph(tmp_path / "graph.xml", spec, "cpu")

    first = FIRST_RUNS.format(path=str(tmp_path / "graph.xml"))
    subprocess.run([sys.executable, "-c", first], check=True, timeout=120)

    def differs(row: int) -> bool:
        inputs = np.full((200, 256), row, np.float32)
        return any(not np.allclose(graph(inputs), inputs @ weights, rtol=1e-3, atol=1e-2) for _ in range(30))

    with ThreadPoolExecutor(4) as threads:
        assert not any(threads.map(differs, range(4)))
