"""What is exported of real runs, opened as its card says and compared with the model of the run."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from server_app.saving import open_adapter
from task import extras
from task.data.batches import Normaliser
from task.data.images import image_decoder
from task.libraries import timm
from tests.conftest import REPOSITORY
from tests.tools.conftest import ARGUMENTS
from tools.export import formats
from tools.export.__main__ import main
from tools.trained import open_run

RUNS = ("digits_run", "personal_run", "fixed_a_run", "flowers_run")


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory, backbones):
    """Export the run of a fixture, once for each of its models; returns the run folder and that of the export."""
    made = {}

    def export(name, client=""):
        if (name, client) not in made:
            run, folder = request.getfixturevalue(name), tmp_path_factory.mktemp("out") / "export"
            options = ["--client", client] if client else []
            assert main([str(run), "--out", str(folder), "--backbones", str(backbones), *options]) == 0
            made[name, client] = run, folder
        return made[name, client]

    return export


def blocks(folder):
    """The card's Python code by its heading."""
    sections = re.split(r"^## ", (folder / "README.md").read_text(), flags=re.MULTILINE)[1:]
    found = {section.split("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL) for section in sections}
    return {heading: code[0] for heading, code in found.items() if code}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("form", ["peft", "timm", "ONNX"])
def test_the_cards_code_gives_the_logits_of_the_run(exported, backbones, monkeypatch, name, form):
    run, folder = exported(name)
    settings = open_run(run, backbones).settings.backbone
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / "image.png")
    pixels = image_decoder(settings.image_size)({"bytes": None, "path": str(folder / "image.png")})
    normalised = Normaliser.of(settings.mean, settings.std)(torch.from_numpy(pixels.copy())[None])
    monkeypatch.chdir(folder)
    code, names = blocks(folder), {}
    with torch.inference_mode():
        wanted = open_adapter(run, backbones)(normalised)
        exec(code["Input"] + code[form], names)
    torch.testing.assert_close(torch.as_tensor(names["logits"]), wanted, rtol=1e-4, atol=1e-5)
    assert wanted.abs().max() > 0.01


@pytest.mark.slow
def test_a_clients_own_model_is_exported_with_a_card_of_its_own(exported):
    run, folder = exported("personal_run", "2")
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    merged = timm.create_model(
        "vit_tiny_patch16_224",
        checkpoint_path=folder / "timm" / "model.safetensors",
        num_classes=10,
        img_size=16,
        **ARGUMENTS,
    ).eval()
    with torch.inference_mode():
        torch.testing.assert_close(merged(images), open_adapter(run, client="2")(images), rtol=1e-4, atol=1e-5)
        assert (merged(images) - open_adapter(run)(images)).abs().max() > 1e-3
    card = (folder / "README.md").read_text()
    own = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["clients_accuracy"]["2"]
    assert "The personal model of client `2`, trained by 2 rounds" in card
    assert f"client `2` on its own test images, with the model that it was sent: {100 * own:.2f} % in round 2." in card
    assert f"python -m tools.export runs/{run.name} --client 2 --format peft timm onnx" in card
    assert "clients: 0, 1, 2." in (run / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_onnx_takes_any_number_of_images_and_says_what_they_are(exported):
    _, folder = exported("flowers_run")
    path = folder / "onnx" / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    merged = timm.create_model(
        "vit_tiny_patch16_224",
        checkpoint_path=folder / "timm" / "model.safetensors",
        num_classes=2,
        img_size=16,
        **ARGUMENTS,
    ).eval()
    for count in (1, 2, 7):
        images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        [logits] = session.run(["logits"], {"images": images.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(logits), merged(images), rtol=1e-4, atol=1e-5)
    facts = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    half = [0.5, 0.5, 0.5]
    assert facts == {"classes": ["rose", "tulip, red"], "image_size": 16, "mean": half, "std": half}
    assert json.loads((folder / "classes.json").read_text()) == ["rose", "tulip, red"]


@pytest.mark.slow
def test_large_weights_lie_beside_the_onnx_model(fixed_a_run, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_INLINE_BYTES", 1000)
    assert main([str(fixed_a_run), "--format", "onnx", "--out", str(tmp_path / "out")]) == 0
    onnx_files = sorted(path.name for path in (tmp_path / "out" / "onnx").iterdir())
    assert onnx_files == ["model.onnx", "model.onnx.data"]


@pytest.mark.slow
def test_the_card_says_what_was_trained_how_and_how_well(exported):
    run, folder = exported("digits_run")
    card, reports = (folder / "README.md").read_text(), (run / "metrics.jsonl").read_text().splitlines()
    [before, after] = [json.loads(report) for report in reports]
    for part in (
        "# digits with vit_tiny_patch16_224, merged by fedavg",
        "The model of all clients, trained by 1 rounds of federated learning with Petalwise over 3 clients",
        "Logits [batch, 10]. `classes.json` names the classes in their order: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9.",
        f"SHA-256 of these `{json.loads((run / 'adapter' / 'petalwise.json').read_text())['base']}`",
        "| partition | kind=iid,",
        "| strategy | name=fedavg,",
        f"| 0 | {100 * before['central']['accuracy']:.2f} % |",
        f"| 1 | {100 * after['central']['accuracy']:.2f} % |",
        f"python -m tools.export runs/{run.name} --format peft timm onnx",
        "max_train_samples: 240",
    ):
        assert part in card, part
    assert not re.search(r"{[a-z]", card), "a field of the card was not filled in"


@pytest.mark.slow
def test_no_path_of_this_machine_is_exported(exported, tmp_path_factory):
    _, folder = exported("flowers_run")
    for path in folder.rglob("*"):
        if path.is_file():
            assert str(tmp_path_factory.getbasetemp()).encode() not in path.read_bytes(), path.name


@pytest.mark.slow
def test_the_exported_config_makes_the_same_run_again(exported, finished, tmp_path):
    run, folder = exported("fixed_a_run")
    shutil.copy(folder / "config.yaml", tmp_path)
    again = finished(resume=str(tmp_path))
    assert again == tmp_path
    for name in ("adapter_model.safetensors", "head.safetensors"):
        first, second = load_file(run / "adapter" / name), load_file(again / "adapter" / name)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_a_format_may_be_left_out(fixed_a_run, tmp_path):
    assert main([str(fixed_a_run), "--format", "timm", "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "classes.json", "config.yaml", "timm"}
    assert set(blocks(tmp_path / "out")) == {"Input", "timm"}


@pytest.mark.slow
def test_what_cannot_be_exported_leaves_nothing_but_a_sentence(fixed_a_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def refused(*arguments):
        assert main([str(argument) for argument in arguments]) == 1
        told = capsys.readouterr()
        assert told.out == ""
        return told.err

    assert refused(tmp_path, "--out", out) == (
        f"Nothing is exported: '{tmp_path}' is no run folder: it has no config.yaml.\n"
    )
    assert "There is no personal model of client 'a/b'" in refused(fixed_a_run, "--client", "a/b")
    monkeypatch.setattr(formats, "TOLERANCE", -1.0)
    assert "The ONNX model's logits differ from torch's by up to " in refused(fixed_a_run, "--out", out)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine.txt").write_text("stays")
    assert f"'{out}' holds something already; remove it, or name another" in refused(fixed_a_run, "--out", out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch, tmp_path, capsys):
    find = extras.importlib.util.find_spec
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "Nothing is exported: onnxscript must be installed: pip install -c constraints.txt -e '.[export]'.\n"
    )


@pytest.mark.slow
def test_make_exports_into_the_run_folder(personal_run, tmp_path):
    run = shutil.copytree(personal_run, tmp_path / "a run")
    arguments = [f"RUN={run}", "CLIENT=1", "ARGS=--format timm"]
    command = ["make", "--no-print-directory", "-o", ".venv/.installed", "export", *arguments]
    command += [f"BIN={os.path.dirname(sys.executable)}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{run}/export-client-1: timm, and README.md, which says how each is opened\n"
    assert (run / "export-client-1" / "timm" / "model.safetensors").is_file()
