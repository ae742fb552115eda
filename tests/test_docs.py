"""The documentation: its Python runs, its command lines are right, its links lead somewhere."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import pydoc
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import lexiseg
from lexiseg.cli import app, main
from lexiseg.recipes import SegmentationRecipe, load_recipe, parse_recipe
from lexiseg.samples import list_samples, sample_classes, sample_path
from lexiseg.training.init import system_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODEL = "second-look-emoji"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def command_lines() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.splitlines():
                if line.startswith("lexiseg ") and "COMMAND" not in line:
                    yield page, line


def commands() -> dict[str, Any]:
    """Every command by the words that call it."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():
        for inner, subcommand in getattr(command, "commands", {"": command}).items():
            found[f"{name} {inner}".strip()] = subcommand
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_command_lines_are_right() -> None:
    lines = list(command_lines())
    assert len(lines) > 15
    known = commands()
    for page, line in lines:
        words = shlex.split(line, comments=True)[1:]
        name = words[0] if words[0] in known else " ".join(words[:2])
        assert name in known, f"{page.name}: {line}"
        # Parsing alone: unknown options, missing arguments and wrong values are errors here.
        known[name].make_context(name, words[len(name.split()) :])


def test_recipes_and_parts_of_recipes_are_right() -> None:
    texts = [text for name in ("training", "scale") for text in blocks(ROOT / "docs" / f"{name}.md", "yaml")]
    assert len(texts) == 4
    for text in texts:
        whole = text.startswith(("kind:", "base:"))
        recipe = parse_recipe(text if whole else f"base: zegclip-voc2012\n{text}", "my.yaml")
        assert isinstance(recipe, SegmentationRecipe)
        system_of(recipe)


def test_recipes_and_options_of_trainings_are_right() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for _, line in command_lines()] + re.findall(r"\$\(BIN\)/(lexiseg train .*)", makefile)
    trainings = [line for line in lines if line.startswith("lexiseg train ")]
    assert len(trainings) > 20
    for line in trainings:
        given = commands()["train"].make_context("train", shlex.split(line, comments=True)[2:]).params
        if given["recipe"] and not given["recipe"].startswith("my"):
            recipe = load_recipe(given["recipe"], given["set"] or ())
            if isinstance(recipe, SegmentationRecipe):
                system_of(recipe)


def plain(text: str) -> str:
    """Without markup, without links to other pages, without line breaks."""
    return " ".join(re.sub(r"See \[.*?\]\(.*?\)\.|[`\\]", "", text).split())


def test_reference_says_of_every_option_what_its_help_says() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in commands().items():
        if name == "benchmark cost":  # passes its words on, and has no options of its own
            continue
        section = text.split(f"## `lexiseg {name}`\n", 1)[1].split("\n## ", 1)[0]
        rows = re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \|$", section.split("\n\n| `--save` | file")[0], re.MULTILINE)
        said = {
            frozenset(re.findall(r"--[\w-]+", first)): (plain(rest), plain(default)) for first, rest, default in rows
        }
        for parameter in command.params:
            if parameter.name != "help" and parameter.param_type_name == "option":
                options = {option for option in (*parameter.opts, *parameter.secondary_opts) if option.startswith("--")}
                default = {"None": "", "False": "", "True": "on"}.get(str(parameter.default), str(parameter.default))
                assert said.get(frozenset(options)) == (plain(parameter.help), default), f"{name} {options}"


def test_help_has_no_line_breaks_within_a_paragraph() -> None:
    """Typer keeps them below the first one, where they end a line in its middle."""
    for name, command in commands().items():
        for paragraph in (command.help or "").strip().split("\n\n")[1:]:
            assert "\n" not in paragraph.strip(), f"{name}: {paragraph}"


def test_python_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    for name in lexiseg.__all__:
        if not name.startswith("__"):
            assert {f"lexiseg.{name}", getattr(lexiseg, name).__module__} & listed, name
    for name in listed:
        source = inspect.getsourcefile(pydoc.locate(name))
        assert source is not None
        assert ":`" not in Path(source).read_text(encoding="utf-8"), f"{name} has markup of Sphinx"


def test_exit_codes_and_model_in_make_demo() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"--model {MODEL}" in text
    assert "lexiseg/samples/demo.png" in text and "lexiseg/samples/demo.txt" in text


def test_trainings_of_make_weights_are_right() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^\t\$\(BIN\)/lexiseg (train .*)", text, re.MULTILINE)
    assert len(lines) > 6
    for line in lines:
        given = commands()["train"].make_context("train", shlex.split(line)[1:]).params
        initial = [f"initial={given['initial']}"] if given["initial"] else []
        recipe = load_recipe(given["recipe"], [*initial, *(given["set"] or [])])
        if isinstance(recipe, SegmentationRecipe):
            system_of(recipe)


def test_make_benchmark_runs_the_first_of_the_table() -> None:
    """The page said that it ran all of them."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `python -m (benchmarks\.\w+)", page, re.MULTILINE)
    target = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nbenchmark:")[2].partition("\n\n")[0]
    assert "`make benchmark` runs the first six." in page
    assert table[:6] == re.findall(r"benchmarks\.\w+", target)


def test_what_the_combination_is_ahead_of_is_in_the_results() -> None:
    page = (ROOT / "docs" / "combination.md").read_text(encoding="utf-8")
    said = re.search(r"No run of a single system reached\s+(\S+) on val or (\S+) on test", page)
    assert said is not None
    rows = json.loads((ROOT / "docs" / "results" / "picture-world.json").read_text(encoding="utf-8"))["rows"]
    single = [row for row in rows if not row["system"].startswith(("second-look", "ground truth"))]
    for metric, limit in zip(("hiou", "test_hiou"), said.groups(), strict=True):
        assert 0 <= float(limit) - max(row[metric] for row in single) <= 0.1


def test_samples_have_seen_and_unseen_classes() -> None:
    from lexiseg.data.picture_world import FIRST

    seen = {entry.name: entry.seen for entry in FIRST.vocabulary.classes}
    assert "demo" in list_samples()
    for name in list_samples():
        names = lexiseg.Vocabulary.load(sample_classes(name)).names
        assert {seen[word] for word in names} == {True, False}, name
    with pytest.raises(lexiseg.LexisegError, match="demo"):
        sample_path("no such sample")


def test_readme_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(ROOT / "README.md", "python")
    assert len(example.splitlines()) <= 12
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "overlay.png").is_file()
    assert "unseen" in capsys.readouterr().out


def test_other_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(sample_path(list_samples()[-1]), name)
    for page in ("quickstart.md", "vocabulary.md"):
        for example in blocks(ROOT / "docs" / page, "python"):
            exec(compile(example, page, "exec"), {})
    assert (tmp_path / "classes.yaml").is_file()


def test_demo_and_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What ``make demo`` runs finds classes of the sample, seen and unseen, and says where the overlay is."""
    words = ["predict", str(sample_path("demo")), f"@{sample_classes('demo')}", "--model", MODEL, "-o", str(tmp_path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "unseen" in out
    assert f"wrote {tmp_path / 'demo_overlay.png'}" in out
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["images"][0]["classes"]
    assert {row["seen"] for row in rows if row["fraction"] > 0.01} == {True, False}
    assert main(["doctor"]) == 0
    assert "self-test: ok" in capsys.readouterr().out


def test_doctor_asks_for_what_the_package_asks_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["torch>=2.6", "no-such.package>=5", 'ray-of-no-kind[data]>=2; extra == "ray"', 'ruff; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert list(report["packages"]) == ["torch", "no-such.package", "ray-of-no-kind"]
    said = "The package 'no-such.package' is not installed; run: pip install 'no-such.package>=5'"
    assert report["problems"] == [said]
    assert main(["doctor"]) == 1
    assert "ray-of-no-kind[data]>=2" in capsys.readouterr().out


def test_every_package_that_is_asked_for_is_imported() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    asked = re.findall(r'^    "([\w-]+)', text.partition("\ndependencies = [")[2].partition("]\n")[0], re.MULTILINE)
    modules = {"open_clip_torch": "open_clip", "Pillow": "PIL", "PyYAML": "yaml"}
    sources = "\n".join(path.read_text() for path in (ROOT / "lexiseg").rglob("*.py"))
    assert len(asked) > 10
    for name in asked:
        assert re.search(rf"^\s*(import|from) {modules.get(name, name)}\b", sources, re.MULTILINE), name
