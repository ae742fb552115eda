"""Files: written whole or not at all, and found by the names that people and disks give them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write, is_folder, new_folder, read_json, read_lines, spelled, write_json


@pytest.mark.parametrize("error", [LexisegError("wrong"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_fails_half_way_leaves_the_file_before(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")
    with (
        pytest.raises(type(error) if not isinstance(error, OSError) else LexisegError) as found,
        atomic_write(path) as new,
    ):
        new.write_text("half")
        raise error
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"] and path.read_text() == "before"
    assert not isinstance(error, OSError) or str(found.value).endswith("(No space left on device); free disk space.")


def test_a_new_folder_stays_only_with_something_in_it(tmp_path: Path) -> None:
    for name, kept in ((None, False), ("a.txt", True)):
        with pytest.raises(LexisegError), new_folder(tmp_path / "one/two") as folder:
            assert folder.is_dir()
            if name is not None:
                (folder / name).touch()
            raise LexisegError("wrong")
        assert (tmp_path / "one").exists() == kept


def test_names_of_folders_and_of_accents(tmp_path: Path) -> None:
    assert is_folder(tmp_path) and not is_folder(tmp_path / "none") and not is_folder("\0")
    composed, apart = (tmp_path / unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    apart.touch()
    assert not is_folder(apart) and spelled(composed) == apart and spelled(apart) == apart
    composed.touch()
    assert spelled(composed) == composed and spelled(apart) == apart and spelled(tmp_path / "è") == tmp_path / "è"


def test_what_is_written_is_as_other_files_are(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "new") as new:
        new.touch(0o600)  # as safetensors leaves them
    (tmp_path / "plain").touch()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    path = write_json(tmp_path / "a.json", {"é": 1, "name": "\udce9"})
    assert path.read_bytes() == '{\n  "é": 1,\n  "name": "\\udce9"\n}\n'.encode()
    assert read_json(path) == {"é": 1, "name": "\udce9"}


def test_lines_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff\n[1]\n' + b"[" * 100_000 + b'\n{"b": "\xe2\x80\xa8"}\n{"c": ')
    assert list(read_lines(path)) == [{"a": 1}, {"b": "\u2028"}]
