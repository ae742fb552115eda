"""Videos: frames as a stream, labels and overlay, going on after an interruption."""

from __future__ import annotations

import json
import resource
import struct
import tracemalloc
from copy import copy
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lexiseg
from lexiseg.cli import main
from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.formats import encode_rle
from lexiseg.images import read_pixels
from lexiseg.refine import Refinement
from lexiseg.samples import sample_path
from lexiseg.scores import GridScores
from lexiseg.video import VideoOptions, is_video, segment_video, video_files
from lexiseg.vocabulary import Vocabulary
from lexiseg.windows import WindowPolicy

av = pytest.importorskip("av")
WORDS = "giraffe; elephant; butterfly; tree; leaves; grass"


@pytest.fixture(scope="module")
def segmenter() -> Any:
    return lexiseg.load("zegclip-emoji", device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames that move over the demo picture."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    pixels = read_pixels(sample_path("demo"))[::2, ::2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        for step in range(8):
            part = np.ascontiguousarray(pixels[8 * step : 8 * step + 128, 8 * step : 8 * step + 128])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(part, format="rgb24")))
        container.mux(stream.encode())
    return path


def run(segmenter: Any, clip: Path, folder: Path, **options: Any) -> list[Any]:
    vocabulary = segmenter.vocabulary(WORDS)
    return list(segment_video(segmenter, clip, vocabulary, folder, VideoOptions(**options)))


@pytest.mark.parametrize(("count", "nothing"), [(256, 65535), (70_000, 2**31 - 1)])
def test_more_classes_than_eight_or_sixteen_bits_number(clip: Path, tmp_path: Path, count: int, nothing: int) -> None:
    found = np.full((128, 128), count - 1, np.int32)
    found[:4] = nothing
    model: Any = SimpleNamespace(identity=lambda *_: {}, predict=lambda *_: SimpleNamespace(label_map=found))
    vocabulary = Vocabulary.parse([f"class {index}" for index in range(count)])
    options = VideoOptions(frames=1, overlay=False)
    for resume in (False, True):
        (frame,) = segment_video(model, clip, vocabulary, tmp_path, replace(options, resume=resume))
        assert frame.reused == resume and np.array_equal(frame.labels, found)


def test_labels_and_overlay(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    frames = run(segmenter, clip, tmp_path)
    assert [frame.index for frame in frames] == list(range(8))
    assert frames[3].seconds == pytest.approx(0.3)
    with av.open(str(clip)) as container:
        first = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(frames[0].labels, segmenter.predict(first, WORDS).label_map)
    files = video_files(clip, tmp_path)
    head, *lines = [json.loads(line) for line in files["frames"].read_text().splitlines()]
    assert head["classes"][:2] == ["giraffe", "elephant"] and len(lines) == 8
    with av.open(str(files["overlay"])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 8


def test_every_third_frame_and_a_limit(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    frames = run(segmenter, clip, tmp_path, every=3, frames=5, overlay=False)
    assert len(frames) == 5
    assert np.array_equal(frames[1].labels, frames[0].labels) and not np.array_equal(frames[3].labels, frames[0].labels)
    assert len(video_files(clip, tmp_path)["frames"].read_text().splitlines()) == 3
    assert not video_files(clip, tmp_path)["overlay"].exists()


def changes(frames: list[Any]) -> int:
    return sum(int((a.labels != b.labels).sum()) for a, b in pairwise(frames))


def test_a_larger_weight_calms_windows_more(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    def found(weight: float) -> list[Any]:
        options = VideoOptions(smooth=weight, overlay=False, frames=5)
        words = segmenter.vocabulary(WORDS)
        return list(segment_video(segmenter, clip, words, tmp_path / str(weight), options, window=(96, 32)))

    assert changes(found(0.9)) < changes(found(0.1))


def test_smoothed_scores_are_a_running_mean(clip: Path, tmp_path: Path) -> None:
    leads = iter([1.0, -1.4, -0.1])  # of the first class: with weight 0.6 the means are 1, 0.04 and -0.016
    model: Any = SimpleNamespace(identity=lambda *_: {}, refinement=Refinement())
    model.scores = lambda *_: GridScores(torch.tensor([next(leads), 0.0]).view(1, 2, 1, 1))
    options = VideoOptions(frames=3, overlay=False, smooth=0.6)
    frames = list(segment_video(model, clip, Vocabulary.parse("cat; dog"), tmp_path, options))
    assert [np.unique(frame.labels).tolist() for frame in frames] == [[0], [0], [1]]


def test_smoothing_calms_the_labels(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    plain = run(segmenter, clip, tmp_path / "a", overlay=False)
    smooth = run(segmenter, clip, tmp_path / "b", overlay=False, smooth=0.9)
    assert np.array_equal(plain[0].labels, smooth[0].labels) and changes(smooth) < changes(plain)


def test_smoothed_labels_are_refined(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    refined = segmenter.with_refinement("edges")
    labels = [run(refined, clip, tmp_path / str(smooth), frames=1, smooth=smooth)[0].labels for smooth in (0, 0.5)]
    assert np.array_equal(*labels)  # before the first frame is nothing
    assert not np.array_equal(labels[0], run(segmenter, clip, tmp_path / "plain", frames=1)[0].labels)


def test_a_video_that_lies_on_its_side_is_turned(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    turned, data = tmp_path / "turned.mp4", clip.read_bytes()
    matrix = data.index(b"tkhd") + 44  # as telephones write it: a quarter to the right
    words = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    turned.write_bytes(data[:matrix] + struct.pack(">9i", *words) + data[matrix + 36 :])
    with av.open(str(clip)) as container:
        first = next(container.decode(video=0)).to_ndarray(format="rgb24")
    labels = run(segmenter, turned, tmp_path / "out", frames=1)[0].labels
    assert np.array_equal(labels, segmenter.predict(np.rot90(first, -1), WORDS).label_map)


def test_frames_keep_their_times(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    """Telephones and screen recorders do not write them at a constant rate, at which the overlay would drift."""
    path, times = tmp_path / "uneven.mp4", [0.0, 0.1, 0.2, 1.2, 1.3, 2.5]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        for seconds in times:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), int(50 * seconds), np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * seconds), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for source, expected in ((path, times), (clip, [step / 10 for step in range(8)])):
        run(segmenter, source, tmp_path)
        with av.open(str(video_files(source, tmp_path)["overlay"])) as container:
            found = [frame.time for frame in container.decode(video=0)]
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_pictures_that_set_in_after_the_sound_keep_their_place(segmenter: Any, tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        sound, stream = container.add_stream("pcm_s16le", rate=8000), container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        silence.sample_rate, silence.pts, silence.time_base = 8000, 0, Fraction(1, 8000)
        container.mux(sound.encode(silence))
        for step in (5, 6):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * step, np.uint8), format="rgb24")
            frame.pts, frame.time_base = step, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    run(segmenter, path, tmp_path)
    with av.open(str(video_files(path, tmp_path)["overlay"])) as container:
        np.testing.assert_allclose([frame.time for frame in container.decode(video=0)], [0.5, 0.6], atol=1e-3)


def test_frames_whose_size_changes_midway(segmenter: Any, tmp_path: Path) -> None:
    path = tmp_path / "two.m4v"
    path.write_bytes(
        b"".join(write_moving(tmp_path / "one.m4v", 2, size, "m4v").read_bytes() for size in ((64, 48), (48, 80)))
    )
    with av.open(str(path)) as container:
        third = list(container.decode(video=0))[2].to_ndarray(format="rgb24")
    for options in ({"smooth": 0.5}, {"every": 3}):
        frames = run(segmenter, path, tmp_path / str(options), **options)
        assert [frame.labels.shape for frame in frames] == [(48, 64), (48, 64), (80, 48), (80, 48)]
        assert np.array_equal(frames[2].labels, segmenter.predict(third, WORDS).label_map)
        with av.open(str(video_files(path, tmp_path / str(options))["overlay"])) as container:
            assert [(frame.width, frame.height) for frame in container.decode(video=0)] == [(64, 48)] * 4
        again = run(segmenter, path, tmp_path / str(options), resume=True, **options)
        assert all(np.array_equal(a.labels, b.labels) for a, b in zip(frames, again, strict=True))


def test_an_interrupted_run_goes_on(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    whole = run(segmenter, clip, tmp_path / "whole")
    stream = segment_video(segmenter, clip, segmenter.vocabulary(WORDS), tmp_path / "part")
    for _ in range(3):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    files = video_files(clip, tmp_path / "part")
    assert not files["overlay"].exists()
    with files["frames"].open("a") as journal:
        journal.write('{"frame": 3, "seg')  # what a kill leaves
    again = run(segmenter, clip, tmp_path / "part", resume=True)
    assert [frame.reused for frame in again] == [True] * 3 + [False] * 5
    assert all(np.array_equal(a.labels, b.labels) for a, b in zip(whole, again, strict=True))
    assert files["frames"].read_text() == video_files(clip, tmp_path / "whole")["frames"].read_text()
    assert files["overlay"].is_file()
    with pytest.raises(LexisegError, match="other settings: 'every' was 1 and is now 2; choose another folder"):
        run(segmenter, clip, tmp_path / "part", resume=True, every=2)
    vocabulary, on = segmenter.vocabulary(WORDS), VideoOptions(resume=True)
    for one, settings in ((segmenter, {"window": 64}), (segmenter.with_refinement("edges"), {})):
        with pytest.raises(LexisegError, match="other settings"):
            list(segment_video(one, clip, vocabulary, tmp_path / "part", on, **settings))


def test_the_same_weights_with_other_options_are_another_model(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    run(segmenter, clip, tmp_path, frames=1)
    other = copy(segmenter)
    other.model = copy(segmenter.model)
    other.model.options = other.model.options.model_copy(update={"seen_offset": 0.3})
    assert other.fingerprint() == segmenter.fingerprint()
    with pytest.raises(LexisegError, match="other settings"):
        run(other, clip, tmp_path, frames=1, resume=True)


def test_a_run_with_windows_on_a_canvas_goes_on(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    vocabulary, window = segmenter.vocabulary(WORDS), WindowPolicy(size=64, stride=64, canvas=(128, 64))
    for resume in (False, True):
        options = VideoOptions(frames=1, resume=resume)
        (frame,) = segment_video(segmenter, clip, vocabulary, tmp_path, options, window=window)
        assert frame.reused == resume


def test_files_that_cannot_be_gone_on_with_or_written(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    run(segmenter, clip, tmp_path, overlay=False)
    journal = video_files(clip, tmp_path)["frames"]
    head, first, *rest = journal.read_text().splitlines()
    for line in ('{"frame": 0}', first.replace('"rle"', '"x"'), first.replace('"size":[', '"size":[9')):
        journal.write_text("\n".join([head, line, *rest, ""]))
        with pytest.raises(LexisegError, match=r"line of frame 0 in '.*' is damaged; leave out --resume"):
            run(segmenter, clip, tmp_path, overlay=False, resume=True)
    journal.unlink()
    journal.mkdir()
    with pytest.raises(LexisegError, match=r"Cannot write '.*\.jsonl' \(Is a directory\)"):
        run(segmenter, clip, tmp_path, overlay=False)


def test_a_changed_video_starts_again_with_a_note(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    run(segmenter, copy, tmp_path, frames=2, overlay=False)
    write_moving(copy, 4)
    with pytest.warns(LexisegWarning, match="has changed since"):
        again = run(segmenter, copy, tmp_path, frames=2, overlay=False, resume=True)
    assert not any(frame.reused for frame in again)
    assert all(frame.reused for frame in run(segmenter, copy, tmp_path, frames=2, overlay=False, resume=True))
    journal = video_files(copy, tmp_path)["frames"]
    journal.write_text("[1, 2]\n")  # somebody else's
    with pytest.raises(LexisegError, match="other settings"):
        run(segmenter, copy, tmp_path, resume=True)
    assert journal.read_text() == "[1, 2]\n"


def write_moving(path: Path, frames: int, size: tuple[int, int] = (128, 128), form: str | None = None) -> Path:
    """A video of so many frames, no two alike; ``size`` is width and height."""
    pixels = read_pixels(sample_path("demo"))
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for step in range(frames):
            part = np.ascontiguousarray(np.roll(pixels, 3 * step, axis=1)[: size[1], : size[0]])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(part, format="rgb24")))
        container.mux(stream.encode())
    return path


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads Linux's account of memory")
def test_memory_does_not_grow_with_the_length(segmenter: Any, tmp_path: Path) -> None:
    """240 more frames with their labels would be 16 MB, and 63 as they are painted."""
    long, vocabulary = write_moving(tmp_path / "long.mp4", 300), segmenter.vocabulary(WORDS)
    used = [resident() for _ in segment_video(segmenter, long, vocabulary, tmp_path, VideoOptions(smooth=0.5))]
    assert len(used) == 300 and max(used[240:]) - max(used[30:60]) < 8e6


def test_going_on_does_not_read_what_is_there_into_memory(segmenter: Any, tmp_path: Path) -> None:
    long, vocabulary = write_moving(tmp_path / "long.mp4", 150), segmenter.vocabulary(WORDS)
    list(segment_video(segmenter, long, vocabulary, tmp_path, VideoOptions(frames=1)))
    journal, peaks = video_files(long, tmp_path)["frames"], []
    head = journal.read_text().splitlines()[0]
    noise = encode_rle(np.random.default_rng(0).random((128, 128)) < 0.5)
    lines = [{"frame": index, "segments": [{"category_id": 1, "rle": noise}]} for index in range(150)]
    for count in (30, 150):
        journal.write_text("\n".join([head, *map(json.dumps, lines[:count])]) + "\n")
        tracemalloc.start()
        stream = segment_video(segmenter, long, vocabulary, tmp_path, VideoOptions(frames=count, resume=True))
        assert all(frame.reused for frame in stream)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2e5 < journal.stat().st_size / 4


def test_frames_without_any_class_go_on_too(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    vocabulary = segmenter.vocabulary(WORDS, background=2.0)
    for resume in (False, True):
        options = VideoOptions(frames=2, resume=resume)
        frames = list(segment_video(segmenter, clip, vocabulary, tmp_path, options))
        assert [(frame.labels == 255).all() and frame.labels.shape == (128, 128) for frame in frames] == [True, True]


def test_the_command(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["predict", str(clip), WORDS, "--model", "zegclip-emoji", "-o", str(tmp_path), "--frames", "2", "--json"]
    assert main([*asked, "--device", "cpu"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["frames"] == 2 and Path(said["files"]["overlay"]).is_file()
    assert sum(row["fraction"] for row in said["classes"]) == pytest.approx(1)
    picture = str(sample_path("demo"))
    for wrong in ([str(clip), str(clip), WORDS], [picture, str(clip), WORDS], [str(clip), WORDS, "--save", "coco"]):
        assert main(["predict", *wrong, "--model", "zegclip-emoji"]) == 2


def test_a_gif_that_does_not_move_is_a_picture(tmp_path: Path) -> None:
    frames = [Image.new("L", (16, 16), grey) for grey in (0, 200)]
    frames[0].save(tmp_path / "still.gif")
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert is_video(tmp_path / "moving.gif") and not is_video(tmp_path / "moving.gif", animations=False)
    assert not is_video(tmp_path / "still.gif") and not is_video(tmp_path / "missing.gif")


def test_mistakes(segmenter: Any, clip: Path, tmp_path: Path) -> None:
    assert is_video("a.MP4") and is_video("/dev/video0") and not is_video("a.png")
    wrong = tmp_path / "wrong.mp4"
    wrong.write_bytes(b"no video")
    for path in (wrong, tmp_path / "missing.mp4"):
        with pytest.raises(LexisegError, match=r"cannot be read as a video \(.+\); check"):
            run(segmenter, path, tmp_path)
    with pytest.raises(LexisegError, match="at least 1"):
        VideoOptions(every=0)
    with pytest.raises(LexisegError, match="from 0 to below 1"):
        VideoOptions(smooth=1.0)
    assert VideoOptions(smooth="0.5").smooth == 0.5  # type: ignore[arg-type]
    with pytest.raises(LexisegError, match="does not support a background threshold"):
        vocabulary = segmenter.vocabulary(WORDS, background=0.5)
        list(segment_video(segmenter, clip, vocabulary, tmp_path, VideoOptions(smooth=0.5)))


def test_a_video_that_is_too_narrow_is_named(segmenter: Any, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (130, 2), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "strip.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(LexisegError, match=r"strip\.gif' has 130 x 2 pixels, too narrow"):
        run(segmenter, tmp_path / "strip.gif", tmp_path)
