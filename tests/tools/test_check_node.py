"""A node's check of itself, without joining: the account, or the one sentence that a server would show."""

import os
import re
import shlex
import subprocess
import sys

import datasets
import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from tools.check_node import main

TINY = [
    "backbone=vit_pico_random",
    "backbone.image_size=16",
    "backbone.arguments.embed_dim=32",
    "backbone.arguments.depth=1",
    "backbone.arguments.num_heads=2",
]


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def data(tmp_path):
    """Ten roses and five tulips, one of them grey and larger, and a file that is no image."""
    folder = tmp_path / "images of a site"
    for name, count in (("rose", 10), ("tulip", 5)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 10), (number, 0, 0)).save(folder / name / f"{number}.png")
    Image.new("L", (30, 30)).save(folder / "tulip" / "0.png")
    (folder / "rose" / "notes.txt").write_text("seen in May")
    return folder


@pytest.fixture
def check(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PETALWISE_STATE", str(tmp_path))

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def test_a_good_node_gets_an_account(check, data):
    options = ("--data", data, "--name", "site-1", "--batch-size", "4", "--device", "cpu")
    status, out, _ = check(*options, *TINY, "dataset.classes=[rose,tulip,weed]")
    assert status == 0
    lines = {line[:14].strip(): line[14:] for line in out.splitlines()}
    assert out.startswith("The node 'site-1' can take part.\n")
    assert lines["Data set"] == f"image_folder (folder) in {data}"
    assert lines["Images"].startswith("12 to train on, 3 to test on; ")
    assert lines["Pictures"] == "RGB 14, L 1; 20 x 10 pixels to 30 x 30"
    assert lines["Not read"] == "files without an image's suffix: .txt 1"
    assert lines["Classes"] == "3, named by dataset.classes"
    assert re.search(r"^  rose +8 +2$", out, re.MULTILINE)
    assert re.search(r"^  tulip +4 +1$", out, re.MULTILINE)
    assert "  without images: weed\n" in out
    assert (lines["Device"], lines["Batch size"]) == ("cpu", "4")
    assert re.fullmatch(r"[0-9a-f]{64}", lines["Frozen hash"])


def test_what_a_site_should_think_about_is_said(check, data):
    status, out, _ = check("--node-config", f'data="{data}" region="north"', *TINY, "dataset.test_split=")
    assert status == 0
    assert out.startswith("The node can take part, but has no name of its own.\nNot read here are its keys: region.\n")
    assert "2, named by this node's data; where nodes differ, set dataset.classes" in out
    assert "20% of all are held out for a server's test, since dataset.test_split is empty" in out


def test_the_federations_run_config_is_taken_as_it_is(check, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f"partition = 'iid'\noverrides = '{' '.join(TINY)}'\n")
    status, out, _ = check("--run-config", file, "--partition-id", "1", "--num-partitions", "20")
    assert status == 0
    assert "Data set      digits (packaged)\n" in out
    assert "The node '1' can take part.\n" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["dataset.classes=[rose,lily]"], "client site-1: 'image_folder' has images of classes .* lacks: tulip."),
        (["--device", "cuda:77"], "client site-1: The device is to be cuda:77"),
        (["--batch-size", "none"], "client site-1: The node config has batch-size='none'"),
        (["--node-config", 'nmae="a"'], "client site-1: The node config has the key 'nmae'"),
        (["--node-config", "name=a b"], "The node config cannot be read: "),
        (["--run-config", "gone.toml"], "The run config gone.toml cannot be read: "),
        (["train.lrr=1"], "train has no key 'lrr'"),
        (["--data", "/gone"], "client site-1: There is no folder 'gone' on this node"),
    ],
)
def test_a_node_that_cannot_take_part_gets_the_servers_sentence(check, data, arguments, sentence):
    status, out, err = check("--data", data, "--name", "site-1", *TINY, *arguments)
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]
    assert re.match(f"This node cannot take part: {sentence}", last)


def test_pictures_that_cannot_be_read_are_listed(check, data, caplog):
    for number in range(4):
        (data / "tulip" / f"{number}.png").write_text("text")
    status, _, err = check("--data", data, *TINY)
    assert status == 1
    assert "4 of 15 images could not be read: tulip/0.png (not an image" in err
    assert [line[:11] for line in caplog.text.splitlines()[1:]] == [f"tulip/{number}.png" for number in range(4)]


def test_a_state_folder_that_cannot_be_written_is_told(check, data, monkeypatch, tmp_path):
    monkeypatch.delenv("PETALWISE_STATE")
    (tmp_path / "petalwise").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, _, err = check("--data", data, *TINY)
    assert status == 1
    assert "This node cannot write to its state folder" in err
    assert "Not a directory" in err


@pytest.mark.slow
def test_make_passes_on_what_it_is_given(data, tmp_path):
    arguments = [f"DATA={data}", 'NODE_CONFIG=name="site-1" batch-size=2', f"ARGS={shlex.join(TINY)}"]
    command = ["make", "--no-print-directory", "-o", ".venv/.installed", "check-node", *arguments]
    command += [f"BIN={os.path.dirname(sys.executable)}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The node 'site-1' can take part.\n")
    assert "Batch size    2\n" in result.stdout
