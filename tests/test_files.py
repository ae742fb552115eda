"""Files: written whole or not at all, and found by the names that people and disks give them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write, is_folder, new_folder, spelled


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
