from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest

from lexiseg.class_list import class_source, read_class_list, read_classes
from lexiseg.errors import LexisegError, LexisegWarning
from lexiseg.vocabulary import Vocabulary

PLAIN = [("cat", None, None), ("dog", None, None)]
NUMBERED = [("cat", 1, None), ("dog", 12, None)]
COLORED = [("cat", None, (255, 128, 0)), ("dog", None, (0, 0, 255))]
FORMS = {
    "cat\n\n# no class\ndog\n": PLAIN,
    "cat; dog": PLAIN,
    "cat\uff1bdog": PLAIN,
    '{"labels": ["cat", "dog"]}': PLAIN,
    "- cat\n- dog\n": PLAIN,
    '["cat", "dog"]': PLAIN,
    "path: /data\ntrain: images/train\nnc: 2\nnames: [cat, dog]\n": PLAIN,
    "classes:\n- cat\n- name: dog\n": PLAIN,
    "1: cat\n12: dog\n": NUMBERED,
    "1\tcat\n12\tdog\n": NUMBERED,
    "1 cat\n12 dog\n": NUMBERED,
    "1,cat\n12,dog\n": NUMBERED,
    "1. cat\n12. dog\n": NUMBERED,
    "1) cat\n12) dog\n": NUMBERED,
    "1=cat\n12 = dog\n": NUMBERED,
    "cat: 1\ndog: 12\n": NUMBERED,
    "cat\t1\ndog\t12\n": NUMBERED,
    "cat,1\ndog, 12\n": NUMBERED,
    "cat;1\ndog;12\n": NUMBERED,
    "• cat\n• dog\n": PLAIN,
    ",name\n1,cat\n12,dog\n": NUMBERED,
    "Class ID,Class Name\n1,cat\n12,dog\n": NUMBERED,
    "id,name\n1,cat\n12,dog\n": NUMBERED,
    "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t.1\t5\t5\t0\tcat\n12\t.1\t5\t5\t0\tdog\n": NUMBERED,
    '{"1": "cat", "12": "dog"}': NUMBERED,
    '{"id2label": {"12": "dog", "1": "cat"}, "model": "x"}': NUMBERED,
    '{"cat": 1, "dog": 12}': NUMBERED,
    "names:\n  1: cat\n  12: dog\n": NUMBERED,
    '{"images": [], "categories": [{"id": 12, "name": "dog", "isthing": 1}, {"id": 1, "name": "cat"}]}': NUMBERED,
    "name,r,g,b\ncat,255,128,0\ndog,0,0,255\n": COLORED,
    " name; r; g; b\ncat;255;128;0\ndog;0;0;255\n": COLORED,
    "cat,255,128,0\ndog,0,0,255\n": COLORED,
    "255 128 0\tcat\n0 0 255\tdog\n": COLORED,
    "# label:color_rgb:parts:actions\ncat:255,128,0::\ndog:0,0,255::\n": COLORED,
    "- {name: cat, color: '#ff8000'}\n- {name: dog, color: [0, 0, 255]}\n": COLORED,
    '{"cat": [255, 128, 0], "dog": [0, 0, 255]}': COLORED,
}


@pytest.mark.parametrize("text", FORMS)
def test_forms_are_told_by_their_content(tmp_path: Path, text: str) -> None:
    endings = {".txt", ".names", ".csv", ""} | ({".json"} if text[0] in "[{" else {".yaml"})
    for ending in endings if FORMS[text] != COLORED else {".txt", ".csv"}:
        path = tmp_path / f"list{ending}"
        path.write_text(text)
        assert [(one.name, one.value, one.color) for one in read_class_list(path).classes] == FORMS[text]
        assert Vocabulary.parse(str(path)).names == ("cat", "dog")


@pytest.mark.parametrize(
    "text",
    [
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ntrain:0,0,255::\n",
        '{"background": [0, 0, 0], "train": [0, 0, 255]}',
        "background: 0\ntrain: 1\n",
        '{"background": 0, "train": 1}',
    ],
)
def test_a_class_may_be_called_as_a_key_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labelmap.txt"
    path.write_text(text)
    found = read_class_list(path)
    assert [one.name for one in found.classes] == ["background", "train"] and found.background is None
    assert all(one.value is not None or one.color is not None for one in found.classes)


@pytest.mark.parametrize(
    ("text", "ignored"),
    [
        ("0: cat\n11: (ignore)\n1: dog\n", (11,)),
        ("cat\n(void)\ndog\n", (1,)),
        ("classes: [cat, dog]\nignore: [11, 255]\n", (11, 255)),
        ("names: {0: cat, 1: dog}\nignore: 11\n", (11,)),
    ],
)  # fmt: skip
def test_values_that_are_no_class(tmp_path: Path, text: str, ignored: tuple[int, ...]) -> None:
    path = tmp_path / "classes"
    path.write_text(text)
    found = read_class_list(path)
    assert [one.name for one in found.classes] == ["cat", "dog"] and found.ignored == ignored


def test_colors_that_are_no_class_and_how_masks_lie(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text("classes: [cat]\nignore: ['#0a0b0c', 3]\nmasks: NAME_mask\nexif: raw\n")
    found = read_class_list(path)
    assert found.ignored_colors == ((10, 11, 12),) and found.ignored == (3,)
    assert (found.masks, found.exif) == ("NAME_mask", "raw")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("cat\nCat\n", "'Cat' twice"),
        ("1: cat\n1: dog\n", "number 1"),
        ("0: cat\ndog\n2: sky\n", "numbers 'cat' and not 'dog'"),
        ("0: cat\n70000: dog\n", "outside the range of label files"),
        (f"0: cat\n{'9' * 5000}: dog\n", "outside the range of label files"),
        ("Idx\tName\n-1\tcat\n", "outside the range of label files"),
        ("name,r,g,b\ncat,1,2\n", "columns name, r, g, b"),
        ("Idx\tName\nx\tcat\n", "ids are whole numbers"),
        ("- {name: cat, synonyms: [[4]]}", "list of texts"),
        ("- {name: cat, id: 3}\n- dog", "numbers 'cat' and not 'dog'"),
        ("- {name: cat, id: -1}", "outside the range of label files"),
        (f"- {{name: cat, id: {10**40}}}", "outside the range of label files"),
        ("- 'cat", "not valid YAML"),
        ("- [cat]", "must be text"),
        ("classes: [cat]\nmasks: x", "'masks'"),
        ("classes: [cat]\nexif: yes", "'exif'"),
        ("classes: [cat]\nignore: none at all", "whole numbers"),
        ("classes: [cat]\ncolours: [red]", "Unknown key 'colours'"),
        ("ignore: [3]", "is empty"),
        ('["cat", "dog"', "not valid JSON"),
        ('{"0": "cat", "0": "dog"}', "key '0' is given twice"),
        ("names:\n  0: cat\n  0: dog\n", "key '0' is given twice"),
        ("nc: 3\nnames: [cat, dog]\n", "'nc' says 3 and 'names' has 2"),
        ("c\0a\0t\0", "not UTF-8"),
        ('classes = [\n  "cat",\n  "dog",\n]\n', "TOML, INI and XML are not read; write one class per line"),
        ('[[classes]]\nname = "cat"\n', "TOML, INI and XML"),
        ("[classes]\n0 = cat\n1 = dog\n", "TOML, INI and XML"),
        ('<?xml version="1.0"?>\n<labels/>', "TOML, INI and XML"),
        ("<labels>\n  <label>cat</label>\n</labels>\n", "TOML, INI and XML"),
    ],
)
def test_mistakes_name_the_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(LexisegError, match=words) as caught:
        read_class_list(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_word_of_two_classes_is_left_out_of_a_file_and_said(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("tree, cat, oak\ncat\n")
    with pytest.warns(LexisegWarning, match="'cat' of the class 'tree'"):
        assert Vocabulary.load(path).words == ("tree", "oak", "cat")


def test_tables_with_synonyms_and_columns_with_a_heading(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text('name,synonyms\n"giraffe, tall","a;b"\ngrass,\n')
    assert [one.text for one in read_class_list(path).classes] == ["giraffe, tall, a, b", "grass"]
    path.write_text("Name\ngiraffe\ngrass\n")
    with pytest.warns(LexisegWarning, match="'Name', was read as a column header"):
        assert Vocabulary.load(path).names == ("giraffe", "grass")
    path.write_text("class\n")
    assert Vocabulary.load(path).names == ("class",)


@pytest.mark.parametrize(
    "text",
    [
        "['giraffe', 'tree, bush']",
        '["giraffe",\n "tree\uff0c bush"]',
        "[giraffe, tree\u3001bush]",
        "('giraffe',\n 'tree, bush',)\n",
        "{0: 'giraffe', 1: 'tree, bush'}",
        '{"0": "giraffe", "1": "tree, bush"}',
        '{"classes": ["giraffe", "tree, bush"]}',
    ],
)
def test_lists_as_python_writes_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "list").write_text(text)
    assert Vocabulary.parse(text).words == Vocabulary.load(tmp_path / "list").words == ("giraffe", "tree", "bush")


def test_quotation_marks_are_no_part_of_a_word() -> None:
    words = Vocabulary.parse("\"giraffe\"; 'grass', “lawn”; rock 'n' roll; 5\" disc").words
    assert words == ("giraffe", "grass", "lawn", "rock 'n' roll", '5" disc')
    with pytest.raises(LexisegError, match="'\"tree' has an unclosed quotation mark"):
        Vocabulary.parse('giraffe; "tree, bush"')


def test_files_and_paths_are_never_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my.names", "cat", "a, b", "two\nlines"):
        Path(name).write_text("giraffe\n")
        assert class_source(name) == Path(name)
        assert Vocabulary.parse(name).names == ("giraffe",)
    paths = (
        "lists/missing.x",
        "/none",
        "./none",
        "..\\none",
        "~/none",
        "C:\\data\\classes.csv",
        "C:/data/classes",
        "@none",
    )
    for name in ("missing.list", "missing.md", "missing.xlsx", *paths):
        assert class_source(name) == Path(name.removeprefix("@"))
        with pytest.raises(LexisegError, match="does not exist"):
            Vocabulary.parse(name)
    for text in ("dog", "tree/bush", "Mt. Fuji", "cat; dog.txt", "x" * 5000, "St.Bernard", "a\nb.txt", "@"):
        assert class_source(text) == text


@pytest.mark.parametrize(
    "line", ["x" + " " * 60_000 + "y", "1" * 60_000, "a," * 30_000 + "b", "name,r\n" + "x" * 200_000]
)
def test_long_lines_take_no_time(tmp_path: Path, line: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(f"cat\n{line}\n")
    start = time.process_time()  # of this process: other work does not count
    with suppress(LexisegError):
        read_class_list(path)
    assert time.process_time() - start < 4


def test_synonyms_before_a_color(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("cat, kitten, 255,128,0\ndog, 0,0,255\n")
    found = read_class_list(path).classes
    assert [(one.name, one.synonyms, one.color) for one in found] == [
        ("cat", ("kitten",), (255, 128, 0)),
        ("dog", (), (0, 0, 255)),
    ]


def test_label_maps_of_tensorflow_are_refused(tmp_path: Path) -> None:
    (tmp_path / "map.pbtxt").write_text("item { id: 1 name: 'cat' }\n")
    with pytest.raises(LexisegError, match="a line 'id: name' per class"):
        read_class_list(tmp_path / "map.pbtxt")


@pytest.mark.parametrize(
    "text", ["1: cat\n2: dog\n", "\n# pets\nname,r,g,b\ncat,255,0,0\ndog,0,255,0", "cat\n\ndog; \n", "- cat\n- dog"]
)
def test_lines_that_somebody_pasted_are_read_as_a_file_s(text: str) -> None:
    assert [one.name for one in read_classes(text).classes] == ["cat", "dog"]
