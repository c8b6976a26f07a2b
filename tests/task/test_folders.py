"""A party's folders, and that their place never leaves this machine."""

from pathlib import Path

import pytest

from task.errors import DataError
from task.folders import node_folder, reason_of


def test_a_folder_is_absolute_with_the_home_filled_in(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert node_folder({"data": "~/photos"}, "data", "UNSET") == tmp_path / "photos"
    assert node_folder({"data": "photos"}, "data", "UNSET") == tmp_path / "photos"
    assert node_folder({}, "data", "UNSET") is None


def test_a_folder_that_is_none_is_told_by_its_last_name(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SOME_VARIABLE", str(tmp_path / "gone"))
    with pytest.raises(DataError, match="no folder 'gone' .* the environment's SOME_VARIABLE") as of_environment:
        node_folder({}, "data", "SOME_VARIABLE")
    with pytest.raises(DataError, match="no folder 'file' .* the node config's key \"data\"") as of_node:
        node_folder({"data": str(tmp_path / "file")}, "data", "SOME_VARIABLE")
    assert str(tmp_path) not in f"{of_environment.value} {of_node.value}"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FileNotFoundError(2, "No such file", "/home/my name/x y.png"), "[Errno 2] No such file: 'x y.png'"),
        (ValueError("cannot read /home/me/x.png: broken"), "cannot read x.png: broken"),
        (ValueError("(file:///home/me/x.png)"), "(x.png)"),
        (ValueError("see https://host.org/a/b, 1/2 and n/a/b"), "see https://host.org/a/b, 1/2 and n/a/b"),
        (KeyError(), "KeyError"),
    ],
)
def test_of_paths_only_the_last_part_is_told(error, told):
    assert reason_of(error) == told


def test_the_whole_error_is_logged_here(caplog):
    reason_of(ValueError(f"no {Path('/home/me/x.png')}"))
    assert "/home/me/x.png" in caplog.text
