from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lexiseg.errors import LexisegError
from lexiseg.templates import PAPER_TEMPLATES, SINGLE_TEMPLATE
from lexiseg.vocabulary import Background, Vocabulary, VocabularyClass
from lexiseg.words import word_key

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_text_gives_classes_and_synonyms_in_order() -> None:
    vocabulary = Vocabulary.parse(" cat;  tree , bush ; night   sky;")
    assert vocabulary.names == ("cat", "tree", "night sky")
    assert vocabulary.words == ("cat", "tree", "bush", "night sky")
    assert vocabulary.word_to_class.tolist() == [0, 1, 1, 2]
    assert vocabulary.templates == SINGLE_TEMPLATE
    assert len(PAPER_TEMPLATES) == 15
    assert vocabulary.to_text() == "cat; tree, bush; night sky"
    assert len(vocabulary) == 3


@pytest.mark.parametrize(
    "source",
    [
        ["cat", "tree, bush"],
        ("cat", "tree, bush"),
        ["cat; tree, bush"],
        (name for name in ("cat", "tree, bush")),
        [{"name": "cat"}, {"name": "tree", "synonyms": ["bush"]}],
        [{"name": "cat"}, {"name": "tree", "synonyms": "bush"}],
        [VocabularyClass("cat"), VocabularyClass("tree", ("bush",))],
        {"classes": ["cat", "tree, bush"]},
        {"classes": "cat; tree, bush"},
        "cat\ntree, bush\n",
        Vocabulary.parse("cat; tree, bush"),
    ],
)
def test_every_source_gives_the_same_vocabulary(source: object) -> None:
    assert Vocabulary.parse(source) == Vocabulary.parse("cat; tree, bush")  # type: ignore[arg-type]


def test_files(tmp_path: Path) -> None:
    text = tmp_path / "classes.txt"
    text.write_text("# animals\ncat\n\n  # plants\ntree, bush\n", encoding="utf-8-sig")
    expected = Vocabulary.parse("cat; tree, bush")
    assert Vocabulary.parse(text) == Vocabulary.parse(str(text)) == Vocabulary.load(text) == expected
    windows = tmp_path / "windows.txt"
    windows.write_text("cat\r\ntree, bush\r\n", encoding="utf-16")
    assert Vocabulary.load(windows) == expected
    full = {
        "classes": [{"name": "cat", "seen": True, "color": [1, 2, 3]}, "tree, bush"],
        "templates": ["a {}"],
        "background": "wall",
    }
    (tmp_path / "v.json").write_text(json.dumps(full))
    (tmp_path / "v.yaml").write_text(yaml.safe_dump(full))
    from_json, from_yaml = Vocabulary.load(tmp_path / "v.json"), Vocabulary.load(tmp_path / "v.yaml")
    assert from_json == from_yaml
    assert from_json.names == ("cat", "tree", "wall")
    assert from_json.classes[0] == VocabularyClass("cat", (), True, (1, 2, 3))
    assert from_json.background_index == 2


def test_yaml_words_stay_words(tmp_path: Path) -> None:
    path = tmp_path / "v.yml"
    path.write_text("- no\n- on\n- 2024-01-01\n- name: 'null'\n  seen: false\n")
    assert Vocabulary.load(path).names == ("no", "on", "2024-01-01", "null")


def test_save_and_load(tmp_path: Path) -> None:
    vocabulary = Vocabulary(
        (VocabularyClass("cat, the", ("kitten",), True, (9, 8, 7)), VocabularyClass("tree", seen=False)),
        PAPER_TEMPLATES,
        Background("threshold", threshold=0.25),
    )
    for name in ("a.json", "b.yaml", "c.yml"):
        assert Vocabulary.load(vocabulary.save(tmp_path / name)) == vocabulary
    with pytest.raises(LexisegError, match="comma, a semicolon"):
        vocabulary.save(tmp_path / "d.txt")
    with pytest.raises(LexisegError, match="only names and synonyms"):
        Vocabulary.parse("cat; dog", background="0.3").save(tmp_path / "d.txt")
    with pytest.raises(LexisegError, match=r"end the name in"):
        vocabulary.save(tmp_path / "d.csv")
    plain = Vocabulary.parse("cat; tree, bush")
    assert Vocabulary.load(plain.save(tmp_path / "e.txt")) == plain


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "is empty"),
        (" ; ", "empty"),
        ([], "is empty"),
        ("cat;;dog", "Class 2"),
        ("tree,,bush", "tree,,bush"),
        ("cat; Cat", "'Cat' is given twice"),
        ("cat; dog, CAT", "word 'CAT' of the class 'dog' already belongs to the class 'cat'"),
        ("dog, hound, Hound", "holds the word 'Hound' twice"),
        (["cat", "cat"], "'cat' is given twice"),
        ("caf\u00e9; cafe\u0301", "given twice"),
        ("stra\u00dfe; STRASSE", "given twice"),
        ("night  sky; night sky", "given twice"),
        ("cat; c\u200bat", "given twice"),
        (["cat", "  "], "Class 2 is empty"),
        (["cat", "\u200b"], "empty"),
        (["cat", 3], "Class 2 must be text"),
        (["cat", None], "Class 2 must be text"),
        ({"cat", "dog"}, "no order"),
        (7, "must be text, a list"),
        (b"cat", "must be text, a list"),
        ({"classes": ["cat"], "colors": []}, "Unknown key 'colors'"),
        ({}, "no classes"),
        ({"classes": 3}, "list of names"),
        ({"clases": ["cat", "dog"]}, "add the key 'classes'"),
        ("mug =; dog", "give one after the ="),
        ([{"synonyms": ["cat"]}], "has no name"),
        ([{"name": "cat", "colour": "red"}], "Unknown key 'colour'"),
        ([{"name": "cat", "color": "red"}], "colour of the class 'cat'"),
        ([{"name": "cat", "color": [1, 2, 300]}], "colour of the class 'cat'"),
        ([{"name": "cat", "seen": "perhaps"}], "'seen' of the class 'cat'"),
        ([{"name": "cat", "synonyms": 3}], "synonyms of the class 'cat'"),
        (["cat\x00"], "cannot be read"),
        (["\udce9"], "cannot be read"),
        (["cat\ud800"], "cannot be read"),
        ({"classes": ["cat"], "templates": ["a photo"]}, "exactly one"),
        ({"classes": ["cat"], "background": True}, "background"),
        ("nowhere.txt", "nowhere.txt"),
        (Path("nowhere"), "nowhere"),
        (Path("bad\x00name.txt"), "file name"),
        (Path(), "Cannot read"),
    ],
)
def test_mistakes_are_one_sentence_that_names_the_class(source: object, words: str) -> None:
    with pytest.raises(LexisegError) as caught:
        Vocabulary.parse(source)  # type: ignore[arg-type]
    message = str(caught.value)
    assert words in message
    assert "\n" not in message and message.endswith(".")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"{"),
        ("a.json", b"[" * 100_000),
        ("a.json", b"3"),
        ("a.json", b"1" * 5000),
        ("a.yaml", b"a: [b"),
        ("a.yaml", b"&a [*a]"),
        ("a.yaml", b"a: &a [x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a]\nclasses: [*b]"),
        ("a.yaml", b"? [a, b]\n: c"),
        ("a.txt", b"\xff\xfe\x00"),
        ("a.txt", b"\x80"),
        ("a.txt", b""),
    ],
)
def test_broken_files_name_the_file(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LexisegError) as caught:
        Vocabulary.load(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "", "{name}"])
def test_a_template_needs_one_place_for_the_name(template: str) -> None:
    with pytest.raises(LexisegError, match="template"):
        Vocabulary.parse("cat", templates=[template])


def test_templates() -> None:
    assert Vocabulary.parse("cat", templates="paper").templates == PAPER_TEMPLATES
    assert len(Vocabulary.parse("cat", templates="vild").templates) == 14
    assert Vocabulary.parse("cat", templates="the {} {x}").prompts("{}") == ("the {} {x}",)
    assert Vocabulary.parse("cat", default_templates="paper").templates == PAPER_TEMPLATES
    stated = {"classes": ["cat"], "templates": ["a {}"]}
    assert Vocabulary.parse(stated, default_templates="paper").templates == ("a {}",)
    with pytest.raises(LexisegError, match="empty"):
        Vocabulary.parse("cat", templates=[])


def test_background_policies() -> None:
    assert Vocabulary.parse("cat").background == Background()
    assert Vocabulary.parse("cat", background=0.5).background == Background("threshold", threshold=0.5)
    assert Vocabulary.parse("cat", background="0.5").background.threshold == 0.5
    assert Vocabulary.parse("cat", background=np.float32(0.5)).background.threshold == 0.5  # type: ignore[arg-type]
    named = Vocabulary.parse("cat; dog", background="wall, backdrop")
    assert named.names == ("cat", "dog", "wall")
    assert named.words == ("cat", "dog", "wall", "backdrop")
    assert named.background == Background("class", "wall")
    assert named.palette()[2].tolist() == [0, 0, 0]
    known = Vocabulary.parse("Sky; dog", background="sky")
    assert known.names == ("Sky", "dog") and known.background_index == 0
    assert Vocabulary.parse(named.to_dict()) == named
    with pytest.raises(LexisegError, match="synonyms there"):
        Vocabulary.parse("sky; dog", background="sky, heaven")
    with pytest.raises(LexisegError, match="finite"):
        Vocabulary.parse("cat", background=float("nan"))
    for number in ("nan", "inf", "-1e999"):
        with pytest.raises(LexisegError, match="must be a finite number"):
            Vocabulary.parse("cat", background=number)
    for words in ("1.5x; yes", {"name": "wall; floor"}):
        with pytest.raises(LexisegError, match=r"one class, so '.*;.*' cannot be its name"):
            Vocabulary.parse("cat", background=words)
    with pytest.raises(LexisegError, match=r"'0,3' is not a threshold; write 0.3, with a point"):
        Vocabulary.parse("cat", background="0,3")
    with pytest.raises(LexisegError, match="The background's name is empty"):
        Vocabulary.parse("cat", background=" ")
    with pytest.raises(LexisegError, match="needs a name"):
        Background("class")
    with pytest.raises(LexisegError, match="Unknown background policy"):
        Background("other")  # type: ignore[arg-type]


def test_seen() -> None:
    vocabulary = Vocabulary.parse([{"name": "cat", "seen": False}, "tree, Bush", "sky"]).with_seen(["CAT", "bush"])
    assert [entry.seen for entry in vocabulary.classes] == [False, True, False]
    assert vocabulary.seen_words.tolist() == [False, True, True, False]
    assert Vocabulary.parse("cat").seen_words.tolist() == [False]
    assert Vocabulary.parse("cat; tree").with_seen("cat").seen_words.tolist() == [True, False]


def test_palette_is_distinct_and_keeps_given_colours() -> None:
    vocabulary = Vocabulary.parse([{"name": "c0", "color": "#ff8800"}, *(f"c{index}" for index in range(1, 600))])
    palette = vocabulary.palette()
    assert palette.shape == (600, 3) and palette.dtype == "uint8"
    assert palette[0].tolist() == [255, 136, 0]
    assert len({tuple(color) for color in palette.tolist()}) == 600
    assert (Vocabulary.parse("a; b").palette() == Vocabulary.parse("x; y").palette()).all()


def test_long_names_are_found_with_the_tokenizer() -> None:
    vocabulary = Vocabulary.parse(["cat", "tree, " + "very " * 90 + "tall tree"])
    with pytest.raises(LexisegError, match=r"synonym 'very very.*class 'tree'.*97 tokens.*at most 77"):
        vocabulary.check_lengths(lambda text: len(text.split()) + 1, 77)
    Vocabulary.parse("cat; tree").check_lengths(lambda text: len(text) + 2, 77)


def test_a_hundred_thousand_classes() -> None:
    vocabulary = Vocabulary.parse([f"class {index}" for index in range(100_000)])
    assert vocabulary.names[99_999] == "class 99999"
    assert vocabulary.word_to_class.shape == (100_000,)


word = st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters=",;#\u037e"), min_size=1, max_size=8)


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    taken: set[str] = set()
    classes = []
    for words in draw(st.lists(st.lists(word, min_size=1, max_size=3), min_size=1, max_size=5)):
        kept = []
        for text in words:
            try:
                name = VocabularyClass(text).name
            except LexisegError:
                continue
            marks = set(",;\uff0c\u3001\uff1b")  # the full-width ones count as well
            if word_key(name) not in taken and not marks.intersection(name) and name[0] not in "#\"'“„«":
                taken.add(word_key(name))
                kept.append(name)
        if kept:
            color = draw(st.none() | st.tuples(*[st.integers(0, 255)] * 3))
            seen = draw(st.none() | st.booleans())
            classes.append(VocabularyClass(kept[0], tuple(kept[1:]), seen, color))
    classes = classes or [VocabularyClass("cat")]
    backgrounds = st.sampled_from([Background(), Background("threshold", threshold=-0.5)])
    return Vocabulary(tuple(classes), draw(st.sampled_from([SINGLE_TEMPLATE, PAPER_TEMPLATES])), draw(backgrounds))


@FEW
@given(vocabularies())
def test_round_trips(tmp_path: Path, vocabulary: Vocabulary) -> None:
    again = Vocabulary.parse(json.loads(json.dumps(vocabulary.to_dict())))
    assert again == vocabulary
    assert again.hash() == vocabulary.hash()
    assert Vocabulary.load(vocabulary.save(tmp_path / "v.yaml")) == vocabulary
    try:
        text = vocabulary.to_text()
    except LexisegError:  # "@a" is the name of a file
        return
    plain = Vocabulary.parse(text)
    assert plain.words == vocabulary.words
    with suppress(LexisegError):  # words such as "[" or "0: a" are refused
        assert Vocabulary.load(plain.save(tmp_path / "v.txt")) == plain


@pytest.mark.parametrize(
    "classes", [[("cup =",)], [("mug", "= cup")], [("mug", "cup =")], [("a = b",)], [("[a",), ("b]",)]]
)
def test_what_the_short_form_would_say_otherwise_it_does_not_say(classes: list[tuple[str, ...]]) -> None:
    vocabulary = Vocabulary(tuple(VocabularyClass(name, synonyms) for name, *synonyms in classes))
    with pytest.raises(LexisegError, match="save it as JSON instead"):
        vocabulary.to_text()
    assert Vocabulary.parse(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary


def test_hash_is_stable_and_sees_everything() -> None:
    assert Vocabulary.parse("cat; tree, bush").hash() == Vocabulary.parse(["cat", "tree,  bush"]).hash()
    variants = [
        Vocabulary.parse("cat; tree"),
        Vocabulary.parse("tree; cat"),
        Vocabulary.parse("cat, tree"),
        Vocabulary.parse("cat; tree", templates="paper"),
        Vocabulary.parse("cat; tree", background=0.1),
        Vocabulary.parse("cat; tree").with_seen(["cat"]),
    ]
    assert len({vocabulary.hash() for vocabulary in variants}) == len(variants)
    # A golden value: it changes only when the serialised form does, and then caches keyed by it are void.
    assert variants[0].hash() == GOLDEN_HASH


GOLDEN_HASH = "bb3511d678d28fabe1681ffc89ced6f6291b1f8b09c1cbcb132bf0f7f5ba54de"


@FEW
@given(st.text(max_size=200))
def test_arbitrary_text_never_crashes(text: str) -> None:
    try:
        vocabulary = Vocabulary.parse(text)
    except LexisegError as error:
        assert "\n" not in str(error)
        return
    assert Vocabulary.parse(vocabulary.to_dict()) == vocabulary


@FEW
@given(st.sampled_from(["txt", "json", "yaml"]), st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_arbitrary_files_never_crash(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"v.{suffix}"
    path.write_bytes(content)
    try:
        Vocabulary.load(path)
    except LexisegError as error:
        assert "\n" not in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["classes", "templates", "background", "name", "synonyms", "seen", "color", "kind", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@FEW
@given(json_values)
def test_arbitrary_structures_never_crash(value: object) -> None:
    try:
        vocabulary = Vocabulary.parse(value)  # type: ignore[arg-type]
    except LexisegError as error:
        assert "\n" not in str(error)
        return
    assert vocabulary.hash()


def test_names_alone_make_no_vocabulary_by_hand() -> None:
    with pytest.raises(LexisegError, match="made of VocabularyClass"):
        Vocabulary(("a",))  # type: ignore[arg-type]
