"""Small data sets on disk, and a cache of the datasets library that a test leaves nothing in."""

import datasets
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.delenv("PETALWISE_DATA", raising=False)


@pytest.fixture
def write_parquet():
    """Write rows of small images with given label values and further columns as one parquet file."""

    def write(path, labels, label_feature, image_column="image", label_column="label", **further):
        rng = np.random.default_rng(len(labels))
        images = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in labels]
        further_features = {name: feature for name, (_, feature) in further.items()}
        features = datasets.Features({image_column: datasets.Image(), label_column: label_feature, **further_features})
        columns = {
            image_column: images,
            label_column: labels,
            **{name: values for name, (values, _) in further.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))

    return write


@pytest.fixture
def write_images():
    """Write ``count`` plain PNGs of a brightness into a folder."""

    def write(folder, count, brightness=100):
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (brightness, number, 0)).save(folder / f"{number}.png")

    return write
