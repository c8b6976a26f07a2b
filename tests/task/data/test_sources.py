import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Sequence, Value
from omegaconf import OmegaConf
from PIL import Image

from task.config import DatasetConfig, PartitionConfig, typed
from task.data.sampling import ROW, labels_of
from task.data.sources import load_split, node_location
from task.errors import ConfigError, DataError

CONF = Path(__file__).parents[3] / "conf"
DATA = os.environ.get("PETALWISE_TEST_DATA", "")
HUB_SCHEMAS = {
    "cifar100": (("train", "test"), "img", ClassLabel(names=["apple", "bear", "can"]), {"coarse_label": ClassLabel(2)}),
    "eurosat": (
        ("train", "validation", "test"),
        "image",
        ClassLabel(names=["AnnualCrop", "Forest", "SeaLake"]),
        {"image_id": Value("string")},
    ),
    "cub200": (
        ("train", "test"),
        "image",
        ClassLabel(names=["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]),
        {"bbox": Sequence(Value("float32"), length=4)},
    ),
    "imagenet_r": (("test",), "image", Value("string"), {"class_name": Value("string")}),
}


def parquet(**values):
    return DatasetConfig(name="mine", source="parquet", **values)


def config_of(name):
    return typed(DatasetConfig, OmegaConf.load(CONF / "dataset" / f"{name}.yaml"))


def file_bytes(dataset):
    stored = dataset.cast_column("image", datasets.Image(decode=False))
    return [record["bytes"] for record in stored["image"]]


def assert_common_form(dataset):
    assert isinstance(dataset.features["image"], datasets.Image)
    assert isinstance(dataset.features["label"], ClassLabel)
    assert labels_of(dataset).min() >= 0
    assert labels_of(dataset).max() < dataset.features["label"].num_classes
    assert dataset[0]["image"].size


def test_digits_are_shared_by_class_without_overlap():
    train, test = (load_split(DatasetConfig(), role, None, seed=1) for role in ("train", "test"))
    assert_common_form(train)
    assert (len(train), len(test)) == (1438, 359)
    assert len(set(file_bytes(train)) | set(file_bytes(test))) == 1797
    shares = np.bincount(labels_of(test)) / np.bincount(np.r_[labels_of(train), labels_of(test)])
    np.testing.assert_allclose(shares, 0.2, atol=0.004)
    brightest = max(np.asarray(image).max() for image in train[:50]["image"])
    assert brightest == 255


def test_a_seed_gives_one_split_and_another_seed_another():
    first, again, other = (load_split(DatasetConfig(), "test", None, seed=seed) for seed in (1, 1, 2))
    assert file_bytes(first) == file_bytes(again)
    assert file_bytes(first) != file_bytes(other)


def test_subsets_keep_the_balance_and_never_grow():
    config = DatasetConfig(max_train_samples=100, max_test_samples=50)
    train, test = (load_split(config, role, None, seed=3) for role in ("train", "test"))
    assert (len(train), len(test)) == (100, 50)
    assert set(np.bincount(labels_of(train))) <= {9, 10, 11}
    assert not set(file_bytes(train)) & set(file_bytes(test))
    assert len(load_split(DatasetConfig(max_test_samples=10_000), "test", None, seed=3)) == 359


def test_unknown_packaged_data_is_refused():
    with pytest.raises(ConfigError, match="only packaged data set is 'digits'"):
        load_split(DatasetConfig(name="mnist"), "train", None, 0)


@pytest.mark.parametrize("name", sorted(HUB_SCHEMAS))
def test_hub_configs_fit_the_schema_of_their_data(name, tmp_path, write_parquet, monkeypatch):
    config = config_of(name)
    splits, image_column, label, further = HUB_SCHEMAS[name]
    labels = ["n02088094", "n01443537", "n03967562"] * 4 if isinstance(label, Value) else [0, 1, 2] * 4
    for split in splits:
        columns = {
            key: (
                [[1.0, 2.0, 3.0, 4.0]] * 12
                if key == "bbox"
                else ["a"] * 12
                if feature == Value("string")
                else [0] * 12,
                feature,
            )
            for key, feature in further.items()
        }
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        write_parquet(path, labels, label, image_column, config.label_column, **columns)
    load_dataset = datasets.load_dataset
    asked = []

    def load_copy(path, split):
        asked.append((path, split))
        return load_dataset(str(tmp_path), split=split)

    monkeypatch.setattr(datasets, "load_dataset", load_copy)
    train, test = (load_split(config, role, None, seed=0) for role in ("train", "test"))
    assert_common_form(train)
    assert set(train.column_names) == {"image", "label", ROW, *further}
    assert {path for path, _ in asked} == {config.path}
    assert {split for _, split in asked} <= set(splits)
    assert (len(train), len(test)) == ((10, 2) if name == "imagenet_r" else (12, 12))
    assert train.features["label"] == test.features["label"]


def test_every_config_file_fits_the_schema():
    groups = {"dataset": DatasetConfig, "partition": PartitionConfig}
    for group, schema in groups.items():
        names = {path.stem: typed(schema, OmegaConf.load(path)) for path in (CONF / group).glob("*.yaml")}
        assert len(names) >= 5
    assert {path.stem for path in (CONF / "dataset").glob("*.yaml") if config_of(path.stem).source == "hub"} == set(
        HUB_SCHEMAS
    )
    assert config_of("digits") == DatasetConfig()


@pytest.mark.parametrize("path", ["", "mnist", "/etc", "../data", "a/b/c", "https://host/x"])
def test_hub_paths_that_are_no_repository_are_refused(path):
    with pytest.raises(ConfigError, match="owner/name"):
        load_split(DatasetConfig(source="hub", path=path), "train", None, 0)


def test_a_hub_path_never_reads_a_local_folder(tmp_path, monkeypatch, write_parquet):
    write_parquet(tmp_path / "owner" / "name" / "train.parquet", [0, 1], ClassLabel(2))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no local folder"):
        load_split(DatasetConfig(source="hub", path="owner/name"), "train", None, 0)


def test_a_hub_failure_is_told_in_one_sentence(monkeypatch):
    def fail(path, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"split 'train' of the hub data set a/b could not be read: no route"):
        load_split(DatasetConfig(source="hub", path="a/b"), "train", None, 0)


def test_an_empty_split_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: datasets.Dataset.from_dict({"image": []}))
    with pytest.raises(DataError, match=r"split 'train' of the data set 'mine' has no images"):
        load_split(DatasetConfig(name="mine", source="hub", path="a/b"), "train", None, 0)


def test_parquet_with_class_labels_keeps_further_columns(tmp_path, write_parquet):
    label = ClassLabel(names=["cat", "dog"])
    domain = (["photo", "sketch"] * 3, Value("string"))
    for shard in range(2):
        write_parquet(tmp_path / f"train-0000{shard}.parquet", [0, 1] * 3, label, domain=domain)
    write_parquet(tmp_path / "test.parquet", [1, 0], label, domain=(["photo"] * 2, Value("string")))
    train = load_split(parquet(), "train", tmp_path, 0)
    assert_common_form(train)
    assert (len(train), len(load_split(parquet(), "test", tmp_path, 0))) == (12, 2)
    assert Counter(train["domain"]) == {"photo": 6, "sketch": 6}
    assert train.features["label"].names == ["cat", "dog"]


def test_columns_are_renamed_and_those_in_the_way_give_place(tmp_path, write_parquet):
    further = {"image": (["a.png"] * 3, Value("string")), "label": ([7, 7, 7], Value("int64"))}
    write_parquet(tmp_path / "train.parquet", ["b", "a", "b"], Value("string"), "img", "kind", **further)
    train = load_split(parquet(image_column="img", label_column="kind"), "train", tmp_path, 0)
    assert_common_form(train)
    assert sorted(train.column_names) == [ROW, "image", "label"]
    assert labels_of(train).tolist() == [1, 0, 1]


def test_text_labels_are_numbered_alike_in_both_splits(tmp_path, write_parquet):
    write_parquet(tmp_path / "train.parquet", ["dog", "ant", "cat"], Value("string"))
    write_parquet(tmp_path / "test.parquet", ["dog", "elk"], Value("string"))
    train, test = (load_split(parquet(), role, tmp_path, 0) for role in ("train", "test"))
    assert train.features["label"].names == test.features["label"].names == ["ant", "cat", "dog", "elk"]
    assert labels_of(test).tolist() == [2, 3]
    (tmp_path / "test.parquet").unlink()
    assert load_split(parquet(), "train", tmp_path, 0).features["label"].names == ["ant", "cat", "dog"]


def test_numbers_name_themselves_or_count_through_the_classes(tmp_path, write_parquet):
    write_parquet(tmp_path / "train.parquet", [2, 0, 2], Value("int32"))
    config = parquet(test_split="", central_test_fraction=0.3)
    assert load_split(config, "train", tmp_path, 0).features["label"].names == ["0", "1", "2"]
    named = parquet(test_split="", central_test_fraction=0.3, classes=["x", "y", "z", "w"])
    assert load_split(named, "train", tmp_path, 0).features["label"].names == ["x", "y", "z", "w"]
    with pytest.raises(DataError, match=r"has the label 2; dataset.classes names 0 to 1"):
        load_split(parquet(test_split="", classes=["x", "y"]), "train", tmp_path, 0)


def test_given_classes_set_the_order_and_may_be_more_than_the_data_has(tmp_path, write_parquet):
    write_parquet(tmp_path / "train.parquet", [0, 1, 0], ClassLabel(names=["cat", "dog", "never"]))
    train = load_split(parquet(classes=["dog", "cat", "yak"]), "train", tmp_path, 0)
    assert labels_of(train).tolist() == [1, 0, 1]
    assert train.features["label"].names == ["dog", "cat", "yak"]


@pytest.mark.parametrize(
    ("feature", "labels"), [(ClassLabel(names=["cat", "dog"]), [0, 1]), (Value("string"), ["cat", "dog"])]
)
def test_an_unknown_class_is_refused_by_name(tmp_path, write_parquet, feature, labels):
    write_parquet(tmp_path / "train.parquet", labels, feature)
    with pytest.raises(DataError, match=r"classes that dataset.classes lacks: dog"):
        load_split(parquet(classes=["cat", "cow"]), "train", tmp_path, 0)


@pytest.mark.parametrize(
    ("feature", "labels", "classes"),
    [
        (ClassLabel(names=["cat", "dog", "elk"]), [0, 1, 2, 1], ["dog", "cat"]),
        (Value("string"), ["cat", "dog", "elk", "dog"], ["dog", "cat"]),
        (Value("int64"), [1, 0, 2, 0], ["zero", "one"]),
    ],
)
def test_images_of_other_classes_are_left_out_if_asked(tmp_path, write_parquet, feature, labels, classes):
    write_parquet(tmp_path / "train.parquet", labels, feature)
    train = load_split(parquet(classes=classes, other_classes="leave_out"), "train", tmp_path, 0)
    assert labels_of(train).tolist() == [1, 0, 0]
    assert train.features["label"].names == classes
    assert train[ROW][:] == [0, 1, 3]


def test_a_split_of_other_classes_alone_is_refused(tmp_path, write_parquet):
    write_parquet(tmp_path / "train.parquet", ["cat", "dog"], Value("string"))
    with pytest.raises(DataError, match=r"no image of the classes in dataset\.classes"):
        load_split(parquet(classes=["yak"], other_classes="leave_out"), "train", tmp_path, 0)


@pytest.mark.parametrize(
    ("feature", "labels", "message"),
    [
        (Value("string"), ["a", None], "Row 1 .* has no label"),
        (ClassLabel(2), [-1, 1], "Row 0 .* has no label"),
        (Value("float32"), [0.5, 1.0], "use text or whole numbers"),
        (Sequence(Value("int64")), [[0], [1]], "use text or whole numbers"),
        (Value("int64"), [-7, 1], "has the label -7"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, write_parquet, feature, labels, message):
    write_parquet(tmp_path / "train.parquet", labels, feature)
    with pytest.raises(DataError, match=message):
        load_split(parquet(test_split=""), "train", tmp_path, 0)


def test_wrong_columns_are_named_with_those_there_are(tmp_path, write_parquet):
    write_parquet(tmp_path / "train.parquet", [0, 1], Value("int64"))
    with pytest.raises(DataError, match=r"no column 'img' \(dataset.image_column, or image-column .*: image, label\."):
        load_split(parquet(image_column="img"), "train", tmp_path, 0)
    with pytest.raises(DataError, match=r"no column 'kind' \(dataset.label_column, or label-column in the node"):
        load_split(parquet(label_column="kind"), "train", tmp_path, 0)
    datasets.Dataset.from_dict({"image": [1.5], "label": [0]}).to_parquet(str(tmp_path / "odd.parquet"))
    with pytest.raises(DataError, match=r"'image' of 'mine' is .*float64.*, not images"):
        load_split(parquet(train_split="odd"), "train", tmp_path, 0)


def test_images_stored_as_bare_bytes_are_images_too(tmp_path):
    source = load_split(DatasetConfig(), "test", None, 0).cast_column("image", datasets.Image(decode=False))
    columns = {"image": [record["bytes"] for record in source["image"]], "label": source["label"][:]}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "train.parquet"))
    assert_common_form(load_split(parquet(), "train", tmp_path, 0))


@pytest.mark.parametrize("source", ["parquet", "folder"])
def test_no_location_says_how_to_give_one(source):
    with pytest.raises(DataError, match=r'data="/path" or the environment variable PETALWISE_DATA'):
        load_split(DatasetConfig(name="mine", source=source), "train", None, 0)


def test_parquet_that_is_missing_broken_or_empty_is_refused(tmp_path, write_parquet):
    with pytest.raises(DataError, match="no parquet file whose name starts with 'train'"):
        load_split(parquet(), "train", tmp_path, 0)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 this is not parquet")
    with pytest.raises(DataError, match=r"parquet files train\* in .* could not be read"):
        load_split(parquet(), "train", tmp_path, 0)
    pyarrow.parquet.write_table(pyarrow.table({"image": [], "label": []}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"parquet files none\* in .* could not be read: BatchSize"):
        load_split(parquet(train_split="none"), "train", tmp_path, 0)
    write_parquet(tmp_path / "one.parquet", [0], Value("int64"))
    with pytest.raises(DataError, match="single image"):
        load_split(parquet(train_split="one", test_split=""), "train", tmp_path, 0)


def test_folder_with_splits(tmp_path, write_images):
    for name in ("cat", "dog", "test_tube"):
        write_images(tmp_path / "train" / name, 4)
    write_images(tmp_path / "test" / "dog", 2)
    write_images(tmp_path / "train" / ".cache", 1)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    config = DatasetConfig(name="mine", source="folder")
    train, test = (load_split(config, role, tmp_path, 0) for role in ("train", "test"))
    assert_common_form(train)
    assert train.features["label"].names == test.features["label"].names == ["cat", "dog", "test_tube"]
    assert np.bincount(labels_of(train)).tolist() == [4, 4, 4]
    assert labels_of(test).tolist() == [1, 1]


def test_folder_of_classes_alone(tmp_path, write_images):
    write_images(tmp_path / "cat", 10)
    write_images(tmp_path / "dog" / "series 1", 10, brightness=200)
    whole = DatasetConfig(name="mine", source="folder")
    assert len(load_split(whole, "train", tmp_path, 0)) == 20
    with pytest.raises(DataError, match="has no folder 'test'"):
        load_split(whole, "test", tmp_path, 0)
    shared = DatasetConfig(name="mine", source="folder", test_split="", classes=["dog", "bird", "cat"])
    train, test = (load_split(shared, role, tmp_path, 0) for role in ("train", "test"))
    assert np.bincount(labels_of(train)).tolist() == [8, 0, 8]
    assert np.bincount(labels_of(test)).tolist() == [2, 0, 2]


def test_folders_that_cannot_be_read_are_refused(tmp_path, write_images):
    config = DatasetConfig(name="mine", source="folder")
    with pytest.raises(DataError, match="holds no images; expected one folder per class"):
        load_split(config, "train", tmp_path, 0)
    write_images(tmp_path / "test" / "cat", 1)
    with pytest.raises(DataError, match="has no folder 'train'"):
        load_split(config, "train", tmp_path, 0)
    for split in ("../elsewhere", "/etc", "..", "a/b"):
        with pytest.raises(ConfigError, match="not a path"):
            load_split(DatasetConfig(source="folder", train_split=split), "train", tmp_path, 0)


def test_hidden_folders_are_passed_over_and_nested_ones_are_not(tmp_path, write_images):
    write_images(tmp_path / "cat", 2)
    write_images(tmp_path / "cat" / ".thumbnails", 2)
    write_images(tmp_path / "cat" / "series 1" / "day 2", 2)
    (tmp_path / "cat" / "a.png").mkdir()
    config = DatasetConfig(name="mine", source="folder")
    assert len(load_split(config, "train", tmp_path, 0)) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_class_folder_that_may_not_be_read_is_refused(tmp_path, write_images):
    write_images(tmp_path / "cat", 2)
    write_images(tmp_path / "dog", 2)
    (tmp_path / "dog").chmod(0)
    with pytest.raises(DataError, match=r"cannot be read: .*Permission denied: 'dog'"):
        load_split(DatasetConfig(name="mine", source="folder"), "train", tmp_path, 0)


def test_a_file_name_that_is_not_utf_8_is_refused(tmp_path, write_images):
    write_images(tmp_path / "cat", 2)
    os.rename(tmp_path / "cat" / "0.png", os.fsencode(tmp_path / "cat") + b"/\xe4.png")
    with pytest.raises(DataError, match=r"name of the file '.udce4.png' in 'cat' is not UTF-8"):
        load_split(DatasetConfig(name="mine", source="folder"), "train", tmp_path, 0)


def test_node_location(tmp_path, monkeypatch):
    assert node_location({}) is None
    monkeypatch.setenv("PETALWISE_DATA", str(tmp_path))
    assert node_location({"partition-id": 1}) == tmp_path
    (tmp_path / "own").mkdir()
    assert node_location({"data": str(tmp_path / "own")}) == tmp_path / "own"
    with pytest.raises(DataError, match=r"no folder .*gone.* node config's key \"data\""):
        node_location({"data": str(tmp_path / "gone")})
    monkeypatch.setenv("PETALWISE_DATA", str(tmp_path / "lost"))
    with pytest.raises(DataError, match=r"no folder .*lost.*PETALWISE_DATA"):
        node_location({})


@pytest.mark.parametrize("source", ["parquet", "hub"])
@pytest.mark.parametrize("whole", [True, False], ids=["all", "some"])
def test_a_table_cannot_name_files_of_this_node(tmp_path, monkeypatch, source, whole):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    other = {"bytes": None if whole else secret.read_bytes(), "path": str(secret)}
    rows = datasets.Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("int64")})
    columns = {"image": [other, {"bytes": None, "path": str(secret)}], "label": [0, 1]}
    stored = datasets.Dataset.from_dict(columns, features=rows)
    stored.to_parquet(str(tmp_path / "train.parquet"))
    monkeypatch.setattr("task.data.readers._read_hub", lambda config, split: stored)
    with pytest.raises(DataError, match="rows without the bytes of an image") as caught:
        load_split(DatasetConfig(name="mine", source=source, path="a/b", test_split=""), "train", tmp_path, 0)
    assert "secret" not in str(caught.value)


def test_a_label_that_is_no_class_builds_no_names(tmp_path, write_parquet):
    write_parquet(tmp_path / "train.parquet", [0, 10**9], Value("int64"))
    for classes in ([], ["a", "b"]):
        with pytest.raises(DataError, match=rf"label {10**9}, more than 100000: the column 'label'"):
            load_split(parquet(test_split="", classes=classes), "train", tmp_path, 0)


@pytest.mark.parametrize("source", ["packaged", "hub", "parquet", "folder"])
def test_classes_named_twice_and_empty_training_splits_are_refused(tmp_path, source):
    config = DatasetConfig(source=source, path="a/b")
    with pytest.raises(ConfigError, match="dataset.classes names 'a' twice"):
        load_split(replace(config, classes=["a", "b", "a"]), "test", tmp_path, 0)
    if source != "packaged":
        with pytest.raises(ConfigError, match=f"dataset.train_split is empty; the source '{source}'"):
            load_split(replace(config, train_split=""), "test", tmp_path, 0)


@pytest.mark.parametrize("config", [parquet(), DatasetConfig(source="folder")], ids=["parquet", "folder"])
def test_errors_never_tell_where_the_data_lies(tmp_path, write_images, config):
    messages = []
    for prepare in (
        lambda: None,
        lambda: (tmp_path / "train.parquet").write_bytes(b"PAR1 this is not parquet"),
        lambda: write_images(tmp_path / "test" / "cat", 1),
    ):
        prepare()
        with pytest.raises(DataError) as caught:
            load_split(config, "train", tmp_path, 0)
        messages.append(str(caught.value))
    assert not any(str(tmp_path.parent) in message for message in messages)


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="needs PETALWISE_TEST_DATA")
@pytest.mark.parametrize(
    ("name", "folder", "classes"), [("cifar100_parquet", "cifar100", 100), ("pacs_parquet", "pacs", 7)]
)
def test_real_parquet(name, folder, classes):
    train, test = (load_split(config_of(name), role, Path(DATA) / folder, 0) for role in ("train", "test"))
    assert_common_form(train)
    assert train.features["label"].num_classes == classes
    assert train.features["label"] == test.features["label"]
    assert set(labels_of(train)) == set(labels_of(test)) == set(range(classes))
