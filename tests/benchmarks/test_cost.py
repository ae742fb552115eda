"""The cost table: what it counts is right, and lexiseg's count explains the papers' figures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from benchmarks.cost.case import VIT_B_16, CostCase, Published, Step, shapes_of, shared_clip, text_pass
from benchmarks.cost.counting import count
from benchmarks.cost.decoupled import (
    DeOPBaselineCase,
    DeOPBaselinePlusCase,
    DeOPCase,
    FreeSegCase,
    FreeSegMaftCase,
    SamCase,
    SamMaftCase,
    ZegFormerCase,
    ZSSegCase,
    ZSSegMaftCase,
    sam_steps,
)
from benchmarks.cost.one_stage import CascadeCLIPCase, CATSegCase, CATSegLargeCase, SPTSegCase, ZegCLIPCase
from benchmarks.cost.page import explanation, page, short_table
from benchmarks.cost.table import CASES, CostRow, CostTable, cost_systems, measure_cost, speed_ratios
from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS, ZegCLIP, ZegCLIPOptions
from lexiseg.segmenter import Segmenter
from tests.towers import small_clip


@pytest.fixture
def shapes_only() -> Iterator[None]:
    """Full-size models without their numbers: built in no time."""
    shared_clip.cache_clear()
    with torch.device("meta"):
        yield
    shared_clip.cache_clear()


def zegclip_by_hand(side: int, classes: int, prompts: int) -> int:
    """Multiply-adds of ZegCLIP on `small_clip`, written down from the architecture."""
    width, dim, patch, blocks, inner_layers = 24, 16, 8, 4, 2
    patches = (side // patch) ** 2
    tokens = 1 + patches
    total = patches * width * 3 * patch**2
    total += blocks * prompts * width**2  # the map all prompts share
    for _ in range(blocks):
        total += tokens * 3 * width**2 + prompts * 2 * width**2  # prompts are keys and values only
        total += 2 * tokens * (tokens + prompts) * width  # queries by keys, weights by values
        total += tokens * width**2 + 2 * tokens * width * 4 * width
    total += tokens * width * dim
    total += classes * 2 * dim * dim
    for _ in range(inner_layers):
        total += 2 * patches * dim**2 + 2 * classes * dim**2 + 2 * classes * patches * dim
        total += 2 * classes * dim * 4 * dim
    # The last layer: queries, the map of keys on the shorter side (its bias costs a product a class), the logits.
    total += classes * dim**2 + classes * patches * dim
    total += patches * dim**2 if classes >= patches else classes * dim**2 + classes * dim
    return total


@pytest.mark.parametrize(("side", "classes"), [(32, 5), (48, 7), (16, 9)])
def test_count_is_that_of_a_hand_formula(side: int, classes: int) -> None:
    model = ZegCLIP(small_clip(), ZegCLIPOptions(num_prompts=3, short_side=side)).eval()
    segmenter = Segmenter(model, disk_cache=False)
    picture = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    words = [f"class {index}" for index in range(classes)]
    segmenter.predict(picture, words)
    counted = count(lambda: segmenter.predict(picture, words))
    assert counted.macs == zegclip_by_hand(side, classes, 3)
    assert counted.macs == sum(counted.by_operation.values())


def test_attention_products_are_seen_with_and_without_a_mask() -> None:
    query, keys = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
    products = 2 * 3 * 5 * 7 * (4 + 4)
    for mask in (None, torch.zeros(5, 7)):
        counted = count(lambda mask=mask: F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask))  # type: ignore[misc]
        assert counted.macs == counted.attention == products
    x = torch.empty(2, 3, 5, 4, device="meta")
    assert count(lambda: F.scaled_dot_product_attention(x, x, x)).macs == 2 * 3 * 5 * 5 * 8


def test_attention_modules_are_not_missed_on_their_fast_path() -> None:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    counted = count(lambda: layer(torch.randn(1, 6, 8)))
    assert counted.macs == 6 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 6 * 6 * 8


def test_products_with_vectors_are_counted() -> None:
    matrix, vector = torch.randn(3, 4), torch.randn(4)
    assert count(lambda: matrix @ vector).macs == 12
    assert count(lambda: torch.addmv(torch.randn(3), matrix, vector)).macs == 12
    assert count(lambda: vector @ vector).macs == 4


def test_norms_and_resizes_are_counted_apart() -> None:
    x = torch.randn(1, 2, 4, 4)

    def run() -> None:
        F.layer_norm(x, (4,))
        F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False)

    counted = count(run)
    assert (counted.macs, counted.norm_elements, counted.bilinear_elements) == (0, 32, 128)
    assert (counted.norms, counted.resizes) == (5 * 32, 4 * 128)


def test_counting_leaves_threads_and_fast_path_as_they_were() -> None:
    before = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError):
        count(lambda: 1 / 0)
    assert (torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()) == before


# Total and trainable parameters of the authors' modules, and fvcore's or thop's count of their code, in 1e9.
@pytest.mark.parametrize(
    ("case", "total", "trainable", "code"),
    [
        (ZegCLIPCase(), 164_907_264, 14_650_624, 123.94),
        (CascadeCLIPCase(), 193_088_774, 40_463_622, 125.51),
        (SPTSegCase(), 170_304_266, 19_201_792, 125.52),
        (ZegFormerCase(), 209_910_000, 60_290_000, 1875.19),
        (ZSSegCase(), 210_700_000, 61_080_000, None),
        (FreeSegCase(), 218_170_000, 68_550_000, 1127.04),
        # By parts: without heatmap decoder and queries (5.046 M), and without tables (2.659 M) too, proposals trained.
        (DeOPBaselineCase(), 210_696_000, 61_070_000, None),
        (DeOPBaselinePlusCase(), 213_355_000, 2_668_000, None),
        (DeOPCase(), 218_400_000, 7_714_000, 669.91),
        (FreeSegMaftCase(), 390_540_000, 28_387_000, 53.417),
    ],
    ids=lambda value: value.name if isinstance(value, CostCase) else "",
)
def test_figures_of_the_authors_code(
    case: CostCase, total: int, trainable: int, code: float | None, shapes_only: None
) -> None:
    model = case.build(512)
    parameters = case.authors_parameters(model)
    # The decoupled ones are known to five digits, the others to the last.
    assert parameters[0] == pytest.approx(total, rel=0 if total % 1000 else 3e-5)
    assert parameters[1] == pytest.approx(trainable, rel=0 if trainable % 1000 else 3e-4)
    for printed, ours in zip((case.published.parameters_m, case.published.trainable_m), parameters, strict=True):
        if printed is not None:
            assert ours / 1e6 == pytest.approx(printed, rel=0.01)
    if code is not None:
        counted = sum(step.macs for step in case.steps(model)) / 1e9
        assert counted == pytest.approx(code, rel=0.002)
        assert code == case.published.code_gmac


# Figures that the conventions name, from the methods page: every operation counted, in 1e9.
@pytest.mark.parametrize(
    ("case", "named"),
    [
        (FreeSegCase(), (1756.3,)),
        (FreeSegMaftCase(), (92.1, 96.0, 1756.3)),
        (ZSSegMaftCase(), (92.1, 96.0, 1756.3)),
        (DeOPCase(), (190.2, 699.8)),
    ],
    ids=lambda value: value.name if isinstance(value, CostCase) else "",
)
def test_further_figures_are_counted(case: CostCase, named: tuple[float, ...], shapes_only: None) -> None:
    counted = [step.macs / 1e9 for step in case.further(case.build(512))]
    assert [round(value, 1) for value in counted] == list(named)
    if not isinstance(case, FreeSegMaftCase):  # whose text gives some of them
        assert all(f"{value:.1f}" in case.convention for value in counted)


def test_segment_anything_is_counted_on_shapes(shapes_only: None) -> None:
    encoder, decoder = sam_steps()
    patches, width, window = 64 * 64, 1280, 14
    padded = (-(-64 // window) * window) ** 2  # windows of 14 patches cover 70 x 70
    linear = 32 * 8 * patches * width**2 + (28 * padded + 4 * patches) * 4 * width**2
    attention = 2 * width * (28 * padded * window**2 + 4 * patches**2)
    assert encoder.macs == pytest.approx(linear + attention, rel=0.03)  # its neck and relative positions come on top
    assert decoder.macs > 0.5 * encoder.macs
    steps = SamMaftCase().further(SamMaftCase().build(512))
    assert steps[:2] == [encoder, decoder] and len(steps) == 3
    assert not SamCase.runs and SamCase().build(512).num_parameters() > 0


@pytest.mark.parametrize("system", ["zsseg", "freeseg"])
def test_predictions_of_models_that_train_can_be_counted(system: str) -> None:
    def products(queries: int) -> int:
        sizes = {"backbone": "tiny", "hidden_dim": 32, "pixel_dim": 32, "mask_dim": 32, "heads": 2, "ffn_dim": 32}
        kind = "maskformer" if system == "zsseg" else "mask2former"
        proposals = {"kind": kind, "embed_dim": 16, "num_queries": queries, "decoder_layers": 2, **sizes}
        torch.manual_seed(0)
        model = SYSTEMS[system].build(small_clip(), {"proposals": proposals}, seen_names=()).eval()
        segmenter = Segmenter(model, disk_cache=False)
        picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
        segmenter.predict(picture, "cat; dog")
        assert model.num_parameters(trainable=True) > 0
        return count(lambda: segmenter.predict(picture, "cat; dog"), model).macs

    assert products(9) > products(3) > 0


def test_text_pass_of_all_classes(shapes_only: None) -> None:
    clip = shared_clip(224)
    counted = count(text_pass(clip, 171))
    layers = 12 * (77 * 12 * 512**2 + 2 * 77 * 77 * 512)
    assert counted.macs == 171 * (layers + 512 * 512)
    assert VIT_B_16["text_cfg"]["layers"] == 12


def test_cascades_missing_projections_explain_its_printed_figure() -> None:
    projection = (1 + 50 + 1024) * 768 * 512 / 1e9
    published = CascadeCLIPCase.published
    assert published.code_gmac - 4 * projection == pytest.approx(published.gmac, abs=0.05)  # type: ignore[operator]


def test_shapes_have_no_values_and_leave_the_model_alone() -> None:
    model = ZegCLIP(small_clip(), ZegCLIPOptions(num_prompts=2))
    shapes = shapes_of(model)
    assert {weight.device.type for weight in shapes.parameters()} == {"meta"}
    assert model.device.type == "cpu" and model.num_parameters(trainable=True) > 0
    assert any(weight.requires_grad for weight in model.parameters())


def test_counting_a_model_that_trains_leaves_it_training() -> None:
    layer = torch.nn.Linear(3, 4)
    assert count(lambda: layer(torch.randn(2, 3)), layer).macs == 24
    assert all(weight.requires_grad for weight in layer.parameters())


def test_mistakes_are_sentences() -> None:
    with pytest.raises(LexisegError, match="did you mean 'zegclip'"):
        measure_cost(["zegklip"])
    with pytest.raises(LexisegError, match="there are dense-clip"):
        measure_cost(["xyz"])
    for wrong in ({"side": 8}, {"classes": 0}, {"repeats": 0}):
        with pytest.raises(LexisegError, match="cannot be measured"):
            measure_cost(["zegclip"], **wrong)  # type: ignore[arg-type]


class SmallCase(CostCase):
    """ZegCLIP on a tiny tower, for the table's own tests."""

    name = "small"
    published = Published(1.0, 0.5, 2.0, 3.0, "a table", code_gmac=2.5)
    convention = "Counted by nobody."

    def build(self, side: int) -> ZegCLIP:
        return ZegCLIP(small_clip(), ZegCLIPOptions(num_prompts=2, short_side=side))

    def steps(self, model: object) -> list[Step]:
        return [Step("one", 10**9), Step("two", 10**9)]


def test_table_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(SmallCase):
        name = "other"

    monkeypatch.setattr("benchmarks.cost.table.CASES", (SmallCase, Other))
    table = measure_cost(side=32, classes=3, repeats=2)
    assert [row.system for row in table.rows] == ["small", "other"] == list(cost_systems())
    for row in table.rows:
        assert row.frames_per_s is not None and row.frames_per_s > 0
        assert row.parameters_m == row.live_parameters_m
        assert row.convention_gmac == 2.0
        assert row.gmac == zegclip_by_hand(32, 3, 2) / 1e9
    found = table.to_dict()
    assert {"system", "parameters_m", "trainable_m", "gmac", "frames_per_s"} <= found["rows"][0].keys()
    assert found["rows"][0]["steps"][1] == {"what": "two", "gmac": 1.0}
    assert found["machine"]["torch"] == torch.__version__
    assert measure_cost(["other"], side=32, classes=3, speed=False).rows[0].frames_per_s is None
    assert [row.timed for row in table.rows] == [2, 2]


def test_slow_systems_are_timed_once_and_some_are_only_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(SmallCase):
        name = "counted"
        runs = False

        def further(self, model: object) -> list[Step]:
            return [Step("three", 3 * 10**9)]

    monkeypatch.setattr("benchmarks.cost.table.CASES", (SmallCase, Counted))
    monkeypatch.setattr("benchmarks.cost.table.SLOW", 0.0)
    table = measure_cost(side=32, classes=3, repeats=3)
    small, counted = table.rows
    assert (small.timed, small.frames_per_s is None) == (1, False)
    assert (counted.timed, counted.frames_per_s, counted.gmac, counted.attention_gmac) == (0, None, 3.0, None)
    assert counted.to_dict()["further"] == [{"what": "three", "gmac": 3.0}]
    text = page(table, "")
    assert "one run of those that take more than" in text and "(small)" in text
    assert "| 3.000 | three |" in text
    assert "three, every operation counted" in explanation(counted)[-1]


def row(system: str, frames: float | None) -> CostRow:
    return CostRow(
        system, 1.0, 0.5, 2.0, frames, 0.9, 0.4, 0.1, None, None, 3.0, None, "a table", 2.9, 1.0, 0.5, 2.8,
        "A sentence.", (Step("a term", 2_800_000_000),),
    )  # fmt: skip


def test_page_and_terminal_say_the_same() -> None:
    machine = {"processor": "P", "threads": 2, "torch": "2", "python": "3", "load": [0.0], "cores": 2}
    table = CostTable((row("zegclip", 5.0), row("zegformer", 1.0)), 512, 171, machine, 3)
    text = page(table, "lexiseg benchmark cost")
    assert "`lexiseg benchmark cost`" in text and "median of 3 runs" in text
    assert "zegclip against zegformer: 5.00 times" in text
    assert "other work" not in text and "other work" in page(
        CostTable(table.rows, 512, 171, {**machine, "load": [9.0]}, 3), ""
    )
    assert speed_ratios([row("zegclip", None), row("zegformer", 1.0)]) == []
    (ratio,) = table.to_dict()["speed_ratios"]
    assert (ratio["fast"], ratio["slow"], ratio["ratio"]) == ("zegclip", "zegformer", 5.0)
    columns, rows = short_table(table)
    assert all(len(cells) == len(columns) for cells in rows)
    assert rows[0][4] == "-"
    lines = explanation(table.rows[0])
    assert lines[0] == "zegclip: A sentence."
    assert lines[-1].split() == ["2.800", "G", "in", "all;", "authors'", "code", "2.90", "G,", "paper", "3.0", "G"]


def test_every_row_says_how_its_paper_counts() -> None:
    assert len(set(cost_systems())) == len(CASES)
    bases = {"deop-baseline": "deop", "cat-seg-large": "cat-seg"}
    assert {bases.get(base := case.name.split("+")[0], base) for case in CASES} <= set(SYSTEMS)
    variants = {"deop-baseline", "deop-baseline+", "deop+sam", "zsseg+sam+maft"}
    assert variants <= set(cost_systems())
    assert {f"{host}+maft" for host in ("zegformer", "zsseg", "freeseg")} <= set(cost_systems())
    assert all(case.convention.endswith(".") for case in CASES)


@pytest.mark.slow
def test_cat_seg_computes_less_than_its_code() -> None:
    """What padding tokens and guidance cost for each class, worked out here once more from one class to the next."""
    case = CATSegCase()
    model = case.build(512).eval()
    assert (model.num_parameters(), model.num_parameters(trainable=True)) == (154_289_378, 25_115_873)
    ours, *more = case.steps(model)
    shape, images = shapes_of(model), torch.empty(1, 3, 384, 384, device="meta")
    one, two = (count(lambda n=n: shape(images, torch.empty(n, 512, device="meta"))).macs for n in (1, 2))
    # A class costs the same whichever it is, but for what is computed once for each 32 of them in the decoder.
    assert abs(5 * (one + 170 * (two - one)) - ours.macs) < 0.01 * ours.macs
    assert [round(step.macs / 1e9) for step in (ours, *more)] == [1351, 108, 96, 72]
    large = CATSegLargeCase()
    model = large.build(512)
    assert (model.num_parameters(), model.num_parameters(trainable=True)) == (433_726_946, 70_270_177)
    assert [round(step.macs / 1e9) for step in large.steps(model)] == [2029, 108, 96, 72]
