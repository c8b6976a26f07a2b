"""What Flower's own builder puts into the app bundle, which is all that a node has of the app."""

import io
import zipfile

import pytest
from flwr.cli.build import build_fab_from_disk

from tests.conftest import REPOSITORY

PACKAGES = ("client_app", "server_app", "strategies", "task")
FAB_BYTES = 10_000_000
"""Flower's limit; a SuperLink refuses more."""


@pytest.fixture(scope="module")
def fab():
    return build_fab_from_disk(REPOSITORY)


@pytest.fixture(scope="module")
def names(fab):
    return set(zipfile.ZipFile(io.BytesIO(fab)).namelist())


def files(folder, pattern):
    return {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / folder).rglob(pattern)}


def test_it_is_within_flowers_limit(fab):
    assert len(fab) < FAB_BYTES


@pytest.mark.parametrize("package", PACKAGES)
def test_it_holds_all_code(names, package):
    assert files(package, "*.py") <= names


def test_it_holds_all_configs_the_weights_and_the_license(names):
    assert len(files("conf", "*.yaml")) > 10
    assert files("conf", "*.yaml") <= names
    assert {"task/weights/vit_pico.json", "LICENSE", "pyproject.toml"} <= names


def test_it_holds_nothing_else(names):
    assert {name.partition("/")[0] for name in names} <= {
        *PACKAGES,
        "conf",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        ".info",
    }
    assert not any("__pycache__" in name for name in names)
