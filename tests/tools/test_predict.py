"""Predictions of a folder of images by real runs: what they are, what is told, how it ends."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from server_app.compose import RunSettings
from server_app.saving import open_adapter
from task.config import typed
from task.data.batches import Normaliser
from task.data.images import decode
from task.data.sources import load_split
from task.seeding import derive_seed
from tests.conftest import REPOSITORY
from tools.predict import main


def split_of(run):
    """The server's own test images of a run."""
    settings = typed(RunSettings, OmegaConf.load(run / "config.yaml"))
    return settings, load_split(settings.dataset, "test", None, derive_seed(settings.seed, "dataset"))


def written(split, folder):
    for number, record in enumerate(split):
        (folder / str(record["label"])).mkdir(parents=True, exist_ok=True)
        record["image"].save(folder / str(record["label"]) / f"{number:04}.png")
    return folder


@pytest.fixture(scope="module")
def digits(digits_run, tmp_path_factory):
    """The test images of a run as files, in a folder per class."""
    return written(split_of(digits_run)[1], tmp_path_factory.mktemp("digits"))


@pytest.fixture
def predict(capsys):
    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.slow
def test_the_runs_own_test_images_get_the_accuracy_of_its_central_evaluation(predict, digits_run, digits):
    status, out, err = predict(digits_run, digits, "--batch-size", "100")
    found = rows(out)
    assert (status, err) == (0, "")
    assert list(found[0]) == ["file", *(f"class_{k}" for k in range(1, 6)), *(f"probability_{k}" for k in range(1, 6))]
    hits = sum(row["file"].split("/")[0] == row["class_1"] for row in found)
    last = json.loads((digits_run / "metrics.jsonl").read_text().splitlines()[-1])["central"]
    assert len(found) == last["num-examples"]
    assert hits / len(found) == last["accuracy"]
    assert len({row["class_1"] for row in found}) > 5, "a model that knows nothing would show nothing"


@pytest.mark.slow
def test_probabilities_are_those_of_the_opened_model(predict, digits_run, digits):
    settings, split = split_of(digits_run)
    _, out, _ = predict(digits_run, digits)
    found = {row["file"]: row for row in rows(out)}
    images = decode(split.select(range(6)), settings.backbone.image_size).images
    with torch.inference_mode():
        logits = open_adapter(digits_run)(Normaliser.of(settings.backbone.mean, settings.backbone.std)(images))
    top = logits.softmax(1).topk(5)
    for number, (codes, probabilities) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True)):
        row = found[f"{split[number]['label']}/{number:04}.png"]
        assert [row[f"class_{k}"] for k in range(1, 6)] == [str(code) for code in codes]
        assert [float(row[f"probability_{k}"]) for k in range(1, 6)] == pytest.approx(probabilities, abs=2e-6)


def test_json_says_the_same_as_csv_whatever_the_batch(predict, personal_run, tmp_path):
    folder = written(split_of(personal_run)[1], tmp_path / "images")
    _, table, _ = predict(personal_run, folder, "--batch-size", "7")
    _, out, _ = predict(personal_run, folder, "--format", "json")
    found = json.loads(out)
    assert [list(row) for row in found] == [list(row) for row in rows(table)]
    for row, other in zip(found, rows(table), strict=True):
        for key, value in row.items():
            expected = pytest.approx(float(other[key]), abs=2e-6) if key.startswith("prob") else other[key]
            assert value == expected


def test_a_client_has_a_model_of_its_own(predict, personal_run, tmp_path):
    folder = written(split_of(personal_run)[1], tmp_path / "images")
    shared, first, second = (
        rows(predict(personal_run, folder, *client)[1]) for client in ((), ("--client", "0"), ("--client", "1"))
    )
    assert len({json.dumps(found) for found in (shared, first, second)}) == 3
    settings, split = split_of(personal_run)
    images = decode(split, settings.backbone.image_size).images
    with torch.inference_mode():
        model = open_adapter(personal_run, client="1")
        codes = model(Normaliser.of(settings.backbone.mean, settings.backbone.std)(images)).argmax(1).tolist()
    by_number = sorted(second, key=lambda row: row["file"].split("/")[1])
    assert [row["class_1"] for row in by_number] == [str(code) for code in codes]


def test_an_unknown_client_is_told_whom_there_is(predict, personal_run, tmp_path):
    status, out, err = predict(personal_run, tmp_path, "--client", "9")
    assert (status, out) == (1, "")
    assert err == "Nothing is predicted: There is no personal model of client '9'; there are: 0, 1, 2.\n"


def test_images_that_cannot_be_read_are_named_and_left_out(predict, flowers_run, backbones, flowers, tmp_path):
    folder = tmp_path / "[new] images"
    shutil.copytree(flowers / "test", folder)
    (folder / "rose" / "[b].jpg").write_text("no image")
    whole = (folder / "rose" / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:60])
    (folder / "notes.txt").write_text("passed over")
    (folder / ".hidden.png").write_text("passed over")
    status, out, err = predict(flowers_run, folder, "--backbones", backbones, "--batch-size", "3")
    assert status == 3
    assert [row["file"] for row in rows(out)] == [
        *(f"rose/{i}.png" for i in range(4)),
        *(f"tulip, red/{i}.png" for i in range(4)),
    ]
    told = err.splitlines()
    assert told[0].startswith("cut.png: ")
    assert told[1] == "rose/[b].jpg: not an image, or of a kind that Pillow cannot read"
    assert told[2:] == ["2 of 10 images could not be read and are left out."]


def test_of_two_classes_two_are_told(predict, flowers_run, backbones, flowers, tmp_path):
    file = tmp_path / "found.csv"
    status, out, _ = predict(flowers_run, flowers / "test", "--backbones", backbones, "--out", file)
    assert (status, out) == (0, "")
    found = rows(file.read_text())
    assert list(found[0]) == ["file", "class_1", "class_2", "probability_1", "probability_2"]
    assert {found[0]["class_1"], found[0]["class_2"]} == {"rose", "tulip, red"}
    assert float(found[0]["probability_1"]) + float(found[0]["probability_2"]) == pytest.approx(1, abs=2e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["found.csv"]


def test_a_backbone_that_is_not_here_is_named(predict, flowers_run, flowers):
    status, _, err = predict(flowers_run, flowers / "test")
    assert status == 1
    assert err.startswith("Nothing is predicted: The backbone file 'mine.safetensors' is not in this party's backbone")


def test_what_cannot_be_predicted_ends_in_one_sentence(predict, personal_run, tmp_path):
    for arguments, sentence in (
        ((tmp_path, tmp_path), "is no run folder: it has no config.yaml."),
        ((personal_run, tmp_path), "holds no images: no file with one of the suffixes"),
        ((personal_run, tmp_path / "gone"), "IMAGES must be a folder of images."),
        ((personal_run, tmp_path, "--batch-size", "0"), "--batch-size is 0; it must be at least 1."),
        ((personal_run, tmp_path, "--device", "tpu"), "--device is 'tpu'; it may be auto, cpu, cuda"),
    ):
        status, out, err = predict(*arguments)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("Nothing is predicted: ")
        assert sentence in err


def test_a_damaged_run_ends_in_one_sentence(predict, personal_run, tmp_path):
    copy = shutil.copytree(personal_run, tmp_path / "run")
    adapter = copy / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:200])
    status, _, err = predict(copy, tmp_path)
    assert (status, err.count("\n")) == (1, 1)
    assert "is damaged: " in err
    shutil.rmtree(copy / "adapter")
    assert "has no adapter: the run has not ended, or has merged nothing." in predict(copy, tmp_path)[2]


@pytest.mark.slow
def test_make_predicts_and_shows_a_person_how_far_it_is(personal_run, tmp_path):
    Image.new("L", (8, 8), 200).save(tmp_path / "grey.png")
    arguments = [f"RUN={personal_run}", f"IMAGES={tmp_path}", "CLIENT=2", "ARGS=--format json"]
    command = ["make", "--no-print-directory", "-o", ".venv/.installed", "predict", *arguments]
    command += [f"BIN={os.path.dirname(sys.executable)}"]
    environment = {**os.environ, "FORCE_COLOR": "1"}
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert [row["file"] for row in json.loads(result.stdout)] == ["grey.png"]
    assert "1/1" in result.stderr
