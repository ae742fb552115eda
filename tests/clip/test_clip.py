"""The towers against open_clip's own forward, loading by name, cached text embeddings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import lexiseg.clip.text
from lexiseg.catalog import packaged_clips
from lexiseg.clip.load import load_clip
from lexiseg.clip.model import CLIP, save_clip
from lexiseg.clip.positions import resize_positions
from lexiseg.clip.text import TextEmbedder
from lexiseg.clip.text_cache import TextCache
from lexiseg.clip.tower import ImageTower, block_attention, run_block
from lexiseg.errors import LexisegError
from lexiseg.models.deop import patch_severance
from lexiseg.templates import PAPER_TEMPLATES
from lexiseg.vocabulary import Vocabulary
from tests.towers import small_architecture, small_clip


@pytest.fixture
def clip() -> CLIP:
    return small_clip()


# ---- towers ----


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quick_gelu": True},
        {"vision_cfg": {"no_ln_pre": True, "ls_init_value": 0.3, "mlp_ratio": 2.5}},
        {"vision_cfg": {"image_size": [24, 40]}},
        {"custom_text": True, "text_cfg": {"layers": 3}},
        {"text_cfg": {"proj_bias": True, "context_length": 12}},
        {"custom_text": True, "text_cfg": {"no_causal_mask": True, "pool_type": "last"}},
    ],
)
@torch.no_grad()
def test_equal_to_open_clip(changes: dict[str, object]) -> None:
    clip = small_clip(**changes)
    height, width = clip.visual.image_size
    images = torch.randn(2, 3, height, width)
    tower = clip.image_tower
    result = tower.run(*tower.embed(images))
    torch.testing.assert_close(
        tower.project(result.tokens)[:, 0], clip.model.encode_image(images), rtol=1e-4, atol=1e-5
    )
    tokens = clip.tokenize(["a photo of a cat", "a large photo of the traffic light.", ""])
    torch.testing.assert_close(clip.encode_text(tokens), clip.model.encode_text(tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_text_with_an_end_mark_of_its_own() -> None:
    clip = small_clip(text_cfg={"pool_type": "eos", "eos_id": 7, "vocab_size": 20})
    tokens = torch.tensor([[1, 19, 4, 7, 0, 0], [3, 7, 0, 0, 0, 0]])
    padded = F.pad(tokens, (0, 71))
    torch.testing.assert_close(clip.encode_text(padded), clip.model.encode_text(padded), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_grids_of_any_shape(clip: CLIP) -> None:
    tower = clip.image_tower
    tokens, grid = tower.embed(torch.randn(1, 3, 16, 72))
    assert grid == (2, 9)
    assert tower.run(tokens, grid).tokens.shape == (1, 19, 24)
    with pytest.raises(LexisegError, match="17 x 72"):
        tower.embed(torch.randn(1, 3, 17, 72))


def test_positions_resized_as_open_clip_does() -> None:
    table = torch.randn(17, 24)
    state = {"visual.positional_embedding": table}
    wide = small_clip(vision_cfg={"image_size": 56})
    resize_pos_embed(state, wide.model)
    ours = resize_positions(table, (7, 7), interpolation="bicubic-antialias")
    torch.testing.assert_close(ours, state["visual.positional_embedding"])
    assert resize_positions(table, (4, 4)) is table is resize_positions(table, (2, 8), by_count=True)
    assert not torch.equal(resize_positions(table, (2, 8)), table)
    with pytest.raises(LexisegError, match="18 rows is not"):
        resize_positions(torch.randn(18, 4), (2, 2))


@torch.no_grad()
def test_levels_hooks_and_masks(clip: CLIP) -> None:
    tower = clip.image_tower
    tokens, grid = tower.embed(torch.randn(2, 3, 24, 32))
    plain = tower.run(tokens, grid, levels=[0, 3])
    assert sorted(plain.levels) == [0, 3]
    assert torch.equal(plain.levels[3], plain.tokens)
    assert plain.num_patches == 12
    everything = torch.ones(13, 13, dtype=torch.bool)
    masked = tower.run(tokens, grid, attention={1: partial(block_attention, mask=everything)})
    torch.testing.assert_close(masked.tokens, plain.tokens)
    extra = torch.randn(1, 2, 24)
    as_context = tower.run(tokens, grid, before_block=lambda index, x: (x, extra if index == 0 else None))
    rows = torch.cat([tokens, extra.expand(2, -1, -1)], dim=1)
    as_rows = run_block(clip.visual.transformer.resblocks[0], rows)[:, :13]
    again = tower.run(tokens, grid, before_block=lambda index, x: (x, extra if index == 0 else None), levels=[0])
    torch.testing.assert_close(again.levels[0], as_rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.tokens, as_context.tokens)


@torch.no_grad()
def test_severance_is_a_mixture_of_value_and_attention(clip: CLIP) -> None:
    attention = clip.visual.transformer.resblocks[-1].attn
    x = torch.randn(2, 5, 24)
    plain = block_attention(attention, x)
    expected = attention(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)
    value = attention.out_proj(F.linear(x, attention.in_proj_weight[48:], attention.in_proj_bias[48:]))
    torch.testing.assert_close(patch_severance(attention, x), value)
    mixed = patch_severance(attention, x, alpha=0.3)
    torch.testing.assert_close(mixed, 0.3 * value + 0.7 * plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_class_embedding_can_enter_twice(clip: CLIP) -> None:
    clip.visual.ln_pre = torch.nn.Identity()
    images = torch.randn(1, 3, 32, 32)
    once = clip.image_tower.embed(images)[0]
    twice = clip.image_tower.embed(images, added=clip.visual.class_embedding[None])[0]
    torch.testing.assert_close(twice[0, 0] - once[0, 0], clip.visual.class_embedding)
    assert torch.equal(once[:, 1:], twice[:, 1:])


def test_towers_that_cannot_be_run_are_refused() -> None:
    resnet = open_clip.CLIP(
        16, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, {"layers": 1, "width": 8, "heads": 1}
    )
    with pytest.raises(LexisegError, match="ModifiedResNet"):
        ImageTower(resnet.visual)
    with pytest.raises(LexisegError, match="pools with attention"):
        small_clip(vision_cfg={"attentional_pool": True})


def test_counting_tokens(clip: CLIP) -> None:
    assert clip.count_tokens("cat") == 3
    assert clip.count_tokens("a photo of a traffic light.") == 9
    assert int((clip.tokenize(["a photo of a traffic light."]) != 0).sum()) == 9


# ---- loading ----


def test_save_and_load(clip: CLIP, tmp_path: Path) -> None:
    clip.architecture["preprocess_cfg"]["mean"] = [0.5, 0.4, 0.3]
    again = load_clip(save_clip(clip, tmp_path / "clip"))
    assert again.fingerprint() == clip.fingerprint()
    assert again.mean == (0.5, 0.4, 0.3)
    assert (again.embed_dim, again.patch_size, again.image_size, again.context_length) == (16, 8, 32, 77)
    half = load_clip(save_clip(clip, tmp_path / "half", dtype=torch.float16))
    assert half.fingerprint() != clip.fingerprint()
    assert next(half.parameters()).dtype == torch.float32


def test_open_clip_reads_what_we_write(clip: CLIP, tmp_path: Path) -> None:
    save_clip(clip, tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs.encode_image(images), clip.model.encode_image(images))


def test_positions_of_another_size_are_resized_at_loading(clip: CLIP, tmp_path: Path) -> None:
    save_clip(clip, tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = 48
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert load_clip(tmp_path).visual.positional_embedding.shape == (37, 24)


def test_fingerprints_follow_the_weights(clip: CLIP) -> None:
    before, text = clip.fingerprint(), clip.text_fingerprint()
    with torch.no_grad():
        clip.visual.conv1.weight[0, 0, 0, 0] += 1
    assert clip.fingerprint() != before
    assert clip.text_fingerprint() == text


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ViT-B-16/opnai", "known tags: openai"),
        ("VitB16/openai", "did you mean 'ViT-B-16/openai'"),
        ("ViT-B-16", "did you mean 'ViT-B-16/"),
        ("nothing/like/this", "give one such as 'ViT-B-16/openai'"),
        ("./nowhere", "no folder './nowhere'"),
        ("hf-hub:alone", "write hf-hub:OWNER/NAME"),
        ("ViT-B-16-SigLIP/webli", "timm library"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", "an image tower that pools with attention"),
        ("roberta-ViT-B-32/laion2b_s12b_b32k", "text tower that is not open_clip's own"),
    ],
)
def test_unknown_names(name: str, sentence: str) -> None:
    with pytest.raises(LexisegError) as error:
        load_clip(name)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LexisegError, match=r"HF_HUB_OFFLINE is set.*give the folder with all its files instead"):
        load_clip("hf-hub:somebody/something")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LexisegError, match=r"127.0.0.1:9 cannot be reached .*refused"):
        load_clip("hf-hub:somebody/something")


def test_a_cached_hub_file_is_used_without_the_hub(clip: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_clip(clip, tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda _, name: str(folder / name) if (folder / name).exists() else None,
    )
    assert load_clip("hf-hub:somebody/something").fingerprint() == clip.fingerprint()


def test_broken_folders(clip: CLIP, tmp_path: Path) -> None:
    with pytest.raises(LexisegError, match=r"has no open_clip_config.json"):
        load_clip(tmp_path)
    save_clip(clip, tmp_path)
    weights = tmp_path / "open_clip_model.safetensors"
    state = load_file(weights)
    for change, sentence in (
        ({"extra": torch.ones(1)}, "does not fit; left over: extra"),
        ({"ln_final.bias": torch.ones(3)}, r"ln_final.bias is \(3,\) instead of \(16,\)"),
    ):
        save_file({**state, **change}, weights)
        with pytest.raises(LexisegError, match=sentence):
            load_clip(tmp_path)
    save_file({key: value for key, value in state.items() if key != "ln_final.bias"}, weights)
    with pytest.raises(LexisegError, match=r"missing: ln_final.bias"):
        load_clip(tmp_path)
    weights.write_bytes(b"not safetensors")
    with pytest.raises(LexisegError, match="not a readable safetensors file"):
        load_clip(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(LexisegError, match="not readable JSON"):
        load_clip(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 3}}))
    with pytest.raises(LexisegError, match="lacks the key 'model_cfg"):
        load_clip(tmp_path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({}, path)
    with pytest.raises(LexisegError, match="lexiseg convert"):
        load_clip(f"ViT-B-32/{path}")


def test_packaged_names(clip: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lexiseg.catalog.PACKAGED_FOLDER", tmp_path)
    save_clip(clip, tmp_path / "clip-test")
    assert packaged_clips() == ["clip-test"]
    assert load_clip("clip-test").packaged
    assert not load_clip(tmp_path / "clip-test").packaged
    with pytest.raises(LexisegError, match="did you mean 'clip-test'"):
        load_clip("clip-tset")


# ---- text embeddings ----


def test_text_embeddings_are_the_normalised_mean_over_templates(clip: CLIP) -> None:
    vocabulary = Vocabulary.parse(["cat", "traffic light, semaphore"], templates=PAPER_TEMPLATES)
    ours = TextEmbedder(clip, chunk=4)(vocabulary)
    assert ours.shape == (3, 16)
    with torch.no_grad():
        for row, word in zip(ours, vocabulary.words, strict=True):
            texts = [template.replace("{}", word) for template in PAPER_TEMPLATES]
            vectors = F.normalize(clip.model.encode_text(clip.tokenize(texts)), dim=-1)
            torch.testing.assert_close(row, F.normalize(vectors.mean(0), dim=0), rtol=1e-4, atol=1e-5)


def test_many_texts_are_never_held_at_once(clip: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    words, templates = [f"thing {index}" + " more" * (index % 5) for index in range(12)], PAPER_TEMPLATES[:3]
    whole = TextEmbedder(clip, chunk=4).embed(words, templates)
    joined = TextEmbedder(clip).embed_joined([words[:7], words[7:]], templates)
    sizes: list[int] = []
    tokenize = clip.tokenize
    monkeypatch.setattr(lexiseg.clip.text, "BLOCK", 10)
    monkeypatch.setattr(clip, "tokenize", lambda texts: sizes.append(len(texts)) or tokenize(texts))
    embedder = TextEmbedder(clip, chunk=4)
    torch.testing.assert_close(embedder.embed(words, templates), whole)
    assert sizes == [9] * 4
    torch.testing.assert_close(embedder.embed_joined([words[:7], words[7:]], templates), joined)
    before = embedder.num_forwards
    with pytest.raises(LexisegError, match="needs"):  # the last one, and nothing was encoded for the others
        embedder.embed([*words, "cat " * 90], templates)
    assert embedder.num_forwards == before


def test_the_second_call_runs_no_text_tower(clip: CLIP, tmp_path: Path) -> None:
    embedder = TextEmbedder(clip, tmp_path)
    first = embedder(Vocabulary.parse("cat; dog"))
    assert embedder.num_forwards == 1
    assert torch.equal(embedder(Vocabulary.parse(["cat", "dog"])), first)
    assert embedder.num_forwards == 1
    from_disk = TextEmbedder(clip, tmp_path)
    assert torch.equal(from_disk(Vocabulary.parse("cat; dog")), first)
    assert from_disk.num_forwards == 0
    # Neither another order nor a part is another list, and a new word is encoded alone.
    assert torch.equal(from_disk(Vocabulary.parse("dog; cat")), first.flip(0))
    assert torch.equal(from_disk(Vocabulary.parse("dog")), first[1:])
    assert from_disk.num_forwards == 0 and len(list(tmp_path.rglob("*.*"))) == 1
    assert torch.equal(from_disk(Vocabulary.parse("horse; dog; bird"))[1], first[1])
    assert from_disk.num_forwards == 1 and len(list(tmp_path.rglob("*.*"))) == 1
    assert torch.equal(embedder(Vocabulary.parse("bird; horse")), from_disk(Vocabulary.parse("bird; horse")))
    assert embedder.num_forwards == 1  # what another process wrote is seen
    from_disk(Vocabulary.parse("cat; dog", templates=["a {}"]))
    assert from_disk.num_forwards == 2
    other = TextEmbedder(small_clip(seed=5), tmp_path)
    assert not torch.equal(other(Vocabulary.parse("cat; dog")), first)
    assert other.num_forwards == 1


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_broken_cache_is_written_anew(clip: CLIP, tmp_path: Path, content: bytes | None) -> None:
    vocabulary = Vocabulary.parse("cat; dog")
    first = TextEmbedder(clip, tmp_path)(vocabulary)
    (path,) = tmp_path.rglob("*.safetensors")
    if content is None:
        words = torch.tensor(list(b'["cat", "dog"]'), dtype=torch.uint8)
        save_file({"vectors": torch.full((2, 16), float("nan")), "words": words}, path)
    else:
        path.write_bytes(content)
    embedder = TextEmbedder(clip, tmp_path)
    assert torch.equal(embedder(vocabulary), first)
    assert embedder.num_forwards == 1
    assert torch.equal(load_file(path)["vectors"], first)


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    def encode(found: list[int]) -> torch.Tensor:
        return torch.ones(len(found), 256)

    def sizes() -> list[int]:
        return [path.stat().st_size for path in (tmp_path / "text").iterdir()]

    cache = TextCache(tmp_path / "text", 256, disk_bytes=40_000, memory_bytes=20_000)
    half_written = tmp_path / "text" / ".a.0.tmp.safetensors"
    for index in range(6):
        words = [f"{index} {word}" for word in range(10)]
        assert cache.get(f"shelf{index}", words, encode).shape == (10, 256)
        assert sum(sizes()) <= 40_000
        half_written.touch()
        os.utime(half_written, (0, 0))
    assert len(sizes()) == 4  # three shelves, and the half-written file, which goes at the next write
    assert (tmp_path / "text" / "shelf5.safetensors").exists() and not (
        tmp_path / "text" / "shelf0.safetensors"
    ).exists()
    many = [str(word) for word in range(100)]
    assert cache.get("shelf5", many, encode).shape == (100, 256)
    assert sum(sizes()) <= 45_000
    made: list[list[int]] = []
    cache.get("shelf5", many, lambda found: made.append(found) or encode(found))  # type: ignore[func-returns-value]
    assert made == [list(range(61))]  # the newest that fit were kept


def test_processes_share_the_cache(tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom lexiseg.clip.text_cache import TextCache\n"
        "encode = lambda words: lambda found: torch.tensor([[float(words[i])] * 64 for i in found])\n"
        "for round in range(12):\n"
        "    words = [str((int(sys.argv[2]) * 7 + round * k) % 97) for k in range(1, 30)]\n"
        "    found = TextCache(Path(sys.argv[1]), 64).get('shelf', words, encode(words))\n"
        "    assert found[:, 0].tolist() == [float(word) for word in words]\n"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(index)]) for index in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["shelf.safetensors"]


def test_a_cache_that_cannot_be_written_does_not_matter(clip: CLIP, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a file where the folder should be")
    embedder = TextEmbedder(clip, tmp_path)
    assert embedder(Vocabulary.parse("cat")).shape == (1, 16)


def test_a_long_name_is_refused(clip: CLIP) -> None:
    with pytest.raises(LexisegError, match=r"needs \d+ tokens and the text tower takes 77"):
        TextEmbedder(clip)(Vocabulary.parse(["cat " * 90]))


def test_architectures_that_open_clip_cannot_build() -> None:
    from lexiseg.clip.model import build_clip

    with pytest.raises(LexisegError, match="cannot build"):
        build_clip(small_architecture(vision_cfg={"colour": 1}))
    below = small_architecture()
    below["model_cfg"]["vision_cfg"]["image_size"] = -32
    with pytest.raises(LexisegError, match=r"cannot build .*image_size is below 1"):
        build_clip(below)
    with pytest.raises(LexisegError) as error:
        build_clip({}, name="long" * 1000)
    assert len(str(error.value)) < 400
