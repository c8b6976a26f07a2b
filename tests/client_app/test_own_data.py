"""What a node's own data may be like: each case has its outcome at the first question, before any round."""

import os
import re
from io import BytesIO

import datasets
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from PIL import Image

from client_app.app import app
from client_app.node import Node
from client_app.worker import worker_for
from server_app.compose import compose_run
from task.config import task_to_json
from task.messages import CONFIG, IDENTIFY
from tools.debug import InProcessGrid

TINY = (
    "backbone=vit_pico_random backbone.image_size=16 backbone.arguments.embed_dim=32 backbone.arguments.depth=1 "
    "backbone.arguments.num_heads=2 partition=whole dataset.name=own"
)
SOURCES = {
    "folder": "dataset=image_folder dataset.name=own",
    "parquet": "dataset=pacs_parquet dataset.name=own dataset.classes=[]",
}


def task(source, classes="[rose,tulip]", extra=""):
    overrides = f"{SOURCES[source]} {TINY} dataset.classes={classes} dataset.test_split=test {extra}"
    return task_to_json(compose_run({"overrides": overrides}).settings)


def identify(task_json, node_config):
    grid = InProcessGrid(app, [node_config])
    query = RecordDict({CONFIG: ConfigRecord({"task": task_json, "layout": ""})})
    [reply] = grid.send_and_receive([Message(query, 1, IDENTIFY)])
    assert not reply.has_error(), reply.error.reason
    return reply.content[CONFIG]


def encoded(image, kind="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(), "JPEG", exif=exif)


def deep():
    return Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(40, 30) * 54)


PLAIN = encoded(noise())
READ = {
    "grey.png": encoded(noise("L")),
    "grey 16 bit.png": encoded(deep()),
    "grey 16 bit.tif": encoded(deep(), "TIFF"),
    "black and white.png": encoded(noise("1")),
    "cmyk.jpg": encoded(noise("CMYK"), "JPEG"),
    "rgba.png": encoded(noise("RGBA")),
    "grey with alpha.png": encoded(noise("LA")),
    "palette.png": encoded(noise("P")),
    "palette.gif": encoded(noise(), "GIF"),
    "rotated.jpg": rotated(),
    "webp.webp": encoded(noise(), "WEBP"),
    "one pixel.png": encoded(Image.new("RGB", (1, 1))),
}
REFUSED = {
    "truncated.jpg": (encoded(noise(), "JPEG")[:700], "truncated"),
    "truncated.png": (PLAIN[:700], "truncated"),
    "text.jpg": (b"This is a text.", "not an image"),
    "empty.png": (b"", "not an image"),
    "float.tif": (encoded(Image.new("F", (8, 8)), "TIFF"), "floating-point pixels"),
}


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=SOURCES)
def source(request):
    return request.param


@pytest.fixture
def store(tmp_path, source):
    """Store pictures by class and name, as one folder per class or as a parquet file."""

    def write(classes, image_column="image", label_column="label"):
        root = tmp_path / "data"
        if source == "parquet":
            rows = [(content, name) for name, pictures in classes.items() for content in pictures.values()]
            columns = {image_column: [{"bytes": row[0], "path": None} for row in rows]}
            root.mkdir()
            features = datasets.Features({image_column: datasets.Image(), label_column: datasets.Value("string")})
            table = datasets.Dataset.from_dict({**columns, label_column: [row[1] for row in rows]}, features=features)
            table.to_parquet(str(root / "train-0.parquet"))
        for name, pictures in classes.items() if source == "folder" else ():
            (root / name).mkdir(parents=True)
            for file, content in pictures.items():
                (root / name / file).write_bytes(content)
        return {"name": "site-1", "data": str(root)}

    return write


def several(count=6):
    return {f"{number}.png": PLAIN for number in range(count)}


def test_pictures_of_any_mode_are_read(source, store):
    config = store({"rose": several() | READ, "tulip": several()})
    answer = identify(task(source), config)
    assert "error" not in answer
    assert answer["client"] == "site-1"
    node = Node.from_config(config, 1)
    data = worker_for(task(source), node.data, node.backbones, node.own).client_data(node)
    assert len(data.train) + len(data.test) == len(READ) + 12


@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_that_cannot_be_read_is_refused_by_name(source, store, name):
    content, reason = REFUSED[name]
    answer = identify(task(source), store({"rose": several(), "tulip": several(2) | {name: content}}))
    assert answer["client"] == "site-1"
    named = f"tulip/{name}" if source == "folder" else "row 8"
    assert answer["error"].startswith(f"1 of 9 images could not be read: {named} (")
    assert reason in answer["error"].lower()
    assert "base" not in answer


def test_all_that_cannot_be_read_are_told_at_once(source, store):
    broken = {name: content for name, (content, _) in REFUSED.items()}
    error = identify(task(source), store({"rose": several() | broken, "tulip": several(2)}))["error"]
    assert error.startswith("5 of 13 images could not be read: ")
    assert error.endswith(" and 2 more. Repair or remove them.")


def test_an_unknown_class_is_refused_by_name_and_the_nearest_is_told(source, store):
    error = identify(task(source), store({"Rose": several(), "tulip": several()}))["error"]
    assert error == "'own' has images of classes that dataset.classes lacks: Rose. Did you mean 'rose'?"


def test_a_class_may_be_absent(source, store):
    config = store({"tulip": several()})
    assert "error" not in identify(task(source), config)
    node = Node.from_config(config, 1)
    data = worker_for(task(source), node.data, node.backbones, node.own).client_data(node)
    assert set(data.train.labels.tolist()) == {1}


@pytest.mark.parametrize("source", ["folder"], indirect=True)
def test_an_empty_class_folder_is_a_class_without_images_even_an_unknown_one(source, store):
    assert "error" not in identify(task(source), store({"rose": several(), "tulip": {}, "weed": {}}))


def test_no_images_at_all_are_refused(source, tmp_path):
    (tmp_path / "data").mkdir()
    error = identify(task(source), {"name": "site-1", "data": str(tmp_path / "data")})["error"]
    expected = {"folder": "'data' holds no images; expected one folder per class", "parquet": "'data' has no parquet"}
    assert expected[source] in error


def test_too_few_images_are_refused_with_how_many_are_needed(source, store):
    error = identify(task(source), store({"rose": several(4)}))["error"]
    assert error.startswith("This node has 4 images, fewer than partition.min_samples=5;")


def test_a_folder_that_there_is_not_is_refused_without_telling_where(source, tmp_path):
    answer = identify(task(source), {"name": "site-1", "data": str(tmp_path / "gone")})
    assert answer["client"] == "site-1"
    assert "no folder 'gone'" in answer["error"]
    assert str(tmp_path) not in answer["error"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("what", ["", "tulip", "tulip/1.png"])
@pytest.mark.parametrize("source", ["folder"], indirect=True)
def test_what_may_not_be_read_is_refused_by_name(source, store, tmp_path, what):
    config, path = store({"rose": several(), "tulip": several()}), tmp_path / "data" / what
    path.chmod(0)
    error = identify(task(source), config)["error"]
    path.chmod(0o700)
    assert "Permission denied" in error
    assert (what or "data") in error
    assert str(tmp_path) not in error


def test_a_class_named_twice_is_refused(source, store):
    error = identify(task(source, "[rose,tulip,rose]"), store({"rose": several()}))["error"]
    assert error == "dataset.classes names 'rose' twice; every class needs a name of its own."


@pytest.mark.parametrize("source", ["parquet"], indirect=True)
def test_a_node_names_columns_of_its_own(source, store):
    config = store({"rose": several(), "tulip": several()}, "photo", "flower")
    assert "has no column 'image' (dataset.image_column, or image-column" in identify(task(source), config)["error"]
    config["image-column"] = "photo"
    assert "has no column 'label' (dataset.label_column, or label-column" in identify(task(source), config)["error"]
    assert "error" not in identify(task(source), config | {"label-column": "flower"})


@pytest.mark.parametrize("source", ["parquet"], indirect=True)
def test_a_row_without_a_label_is_refused(source, store):
    config = store({"rose": several(4), None: several(1)})
    assert "Row 4 of the split 'train' of 'own' has no label" in identify(task(source), config)["error"]


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("device", "gpu", "device='gpu'; it may be auto, cpu, cuda"),
        ("device", "cuda:99", "cuda:99 .* this process sees"),
        ("batch-size", 0, "batch-size=0; it must be a whole number of at least 1"),
        ("batchsize", 8, "the key 'batchsize', .* Did you mean 'batch-size'"),
    ],
)
def test_a_node_config_that_cannot_be_used_is_refused_under_the_nodes_name(store, source, key, value, sentence):
    answer = identify(task(source), store({"rose": several()}) | {key: value})
    assert answer["client"] == "site-1"
    assert re.search(sentence, answer["error"])
