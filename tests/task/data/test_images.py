import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from task.config import DatasetConfig
from task.data.images import ImageSet, decode
from task.data.sampling import ROW, labels_of
from task.data.sources import load_split
from task.errors import DataError

DATA = os.environ.get("PETALWISE_TEST_DATA", "")


def encoded(image, kind="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def dataset_of(*images):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=9)})
    columns = {"image": list(images), "label": list(range(len(images)))}
    return datasets.Dataset.from_dict(columns, features=features)


def decoded(image, kind="PNG", **options):
    return decode(dataset_of(encoded(image, kind, **options)), 8).images[0]


def flat(mode, colour):
    return Image.new(mode, (8, 8), colour)


def palette(colour):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, *colour])
    return image


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (flat("RGB", (10, 20, 30)), {}, (10, 20, 30)),
        (flat("L", 77), {}, (77, 77, 77)),
        (flat("1", 1), {}, (255, 255, 255)),
        (flat("LA", (0, 0)), {}, (255, 255, 255)),
        (flat("LA", (40, 255)), {}, (40, 40, 40)),
        (palette((1, 2, 3)), {}, (1, 2, 3)),
        (palette((1, 2, 3)), {"transparency": 1}, (255, 255, 255)),
        (flat("RGBA", (0, 0, 0, 128)), {}, (127, 127, 127)),
        (flat("RGBA", (200, 10, 0, 255)), {}, (200, 10, 0)),
        (flat("RGB", (5, 6, 7)), {"transparency": (5, 6, 7)}, (255, 255, 255)),
        (flat("I;16", 65_535), {}, (255, 255, 255)),
        (flat("I;16", 32_896), {}, (128, 128, 128)),
        (flat("I;16", 200), {}, (1, 1, 1)),
        (flat("CMYK", (255, 0, 0, 0)), {"kind": "TIFF"}, (0, 255, 255)),
        (flat("I;16", 32_896), {"kind": "TIFF"}, (128, 128, 128)),
        (flat("I", 32_896), {"kind": "TIFF"}, (128, 128, 128)),
        (flat("YCbCr", (90, 128, 128)), {"kind": "TIFF"}, (90, 90, 90)),
    ],
)
def test_every_mode_becomes_rgb(image, options, expected):
    result = decoded(image, **options)
    assert result.dtype == torch.uint8
    assert result.shape == (3, 8, 8)
    assert result.float().mean((1, 2)).tolist() == pytest.approx(expected, abs=1)
    assert (result.amax((1, 2)) - result.amin((1, 2))).max() <= 1


@pytest.mark.parametrize(
    ("image", "message"),
    [(flat("F", 0.5), "floating-point pixels"), (flat("I", 70_000), "outside 16 bits"), (flat("I", -1), "outside 16")],
)
def test_pixels_of_unknown_range_are_refused(image, message):
    with pytest.raises(DataError, match=message):
        decoded(image, "TIFF")


def test_the_shorter_side_is_resized_and_the_centre_kept():
    stripes = np.zeros((20, 60, 3), dtype=np.uint8)
    stripes[:, 20:40] = 200
    for image in (stripes, stripes.transpose(1, 0, 2)):
        result = decoded(Image.fromarray(np.ascontiguousarray(image)))
        assert result[:, 2:6, 2:6].unique().tolist() == [200]
    grown = decode(dataset_of(encoded(flat("RGB", (9, 8, 7)))), 32).images
    assert grown.shape == (1, 3, 32, 32)
    assert grown.float().mean((0, 2, 3)).tolist() == [9, 8, 7]


def test_an_image_of_the_right_size_is_kept_bit_for_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(Image.fromarray(pixels)).permute(1, 2, 0).numpy(), pixels)


def test_the_orientation_of_the_camera_is_applied():
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    assert decoded(Image.fromarray(pixels), exif=exif)[:, -1].min() == 255


@pytest.fixture
def files(tmp_path):
    """A good picture, one that ends in the middle, and a text that is called a picture, in folders of classes."""
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)))
    contents = {"cat/good.png": whole, "cat/cut.png": whole[:500], "dog/a day/text.png": b"text"}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_unreadable_images_are_all_found_and_named_by_file(files):
    names = ["cat/good.png", "cat/cut.png", "dog/a day/text.png", "gone.png"]
    with pytest.raises(DataError) as caught:
        decode(dataset_of(*(str(files / name) for name in names)), 8, files)
    told = str(caught.value)
    assert told.startswith("3 of 4 images could not be read: cat/cut.png (image file is truncated")
    assert "dog/a day/text.png (not an image, or of a kind that Pillow cannot read), gone.png (" in told
    assert told.endswith("'gone.png'). Repair or remove them.")
    assert str(files) not in told


def test_of_many_unreadable_images_the_first_are_named(files, caplog):
    with pytest.raises(DataError, match=r"^9 of 9 .* and 6 more\. Repair"):
        decode(dataset_of(*[str(files / "cat/cut.png")] * 9), 8, files)
    with pytest.raises(DataError, match=r": cut\.png \("):
        decode(dataset_of(str(files / "cat/cut.png")), 8)


def test_an_unreadable_image_of_a_table_is_named_by_its_row_there():
    good = encoded(flat("RGB", (1, 2, 3)))
    with pytest.raises(DataError, match=r"1 of 3 images could not be read: row 2 \(not an image"):
        decode(dataset_of(good, good, b"text"), 8)
    with pytest.raises(DataError, match=r"row 0 \(the row has no image\)"):
        decode(dataset_of(None), 8)
    named = {"bytes": b"text", "path": "folder/1.png"}
    table = dataset_of(good, good, named, good).add_column(ROW, list(range(4)))
    with pytest.raises(DataError, match=r"row 2, 1\.png \(not an image"):
        decode(table.select([1, 2]), 8)


def test_a_part_shares_the_memory():
    data = ImageSet(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4))
    part = data.part(1, 3)
    assert part.labels.tolist() == [1, 2]
    assert part.images.data_ptr() == data.images[1].data_ptr()


def test_addresses_are_not_fetched():
    with pytest.raises(DataError, match="No such file"):
        decode(dataset_of("http://127.0.0.1:9/1.png"), 8)


def test_labels_and_order_follow_the_rows():
    dataset = dataset_of(*(encoded(flat("L", level)) for level in (10, 20, 30))).select([2, 0])
    data = decode(dataset, 8)
    assert len(data) == 2
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == [2, 0]
    assert data.images[:, 0, 0, 0].tolist() == [30, 10]
    assert data.images.is_contiguous()


def test_to_moves_both_tensors():
    data = ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)).to("meta")
    assert data.images.is_meta
    assert data.labels.is_meta


def test_digits_decode():
    dataset = load_split(DatasetConfig(max_test_samples=20), "test", None, seed=0)
    data = decode(dataset, 16)
    assert data.images.shape == (20, 3, 16, 16)
    assert data.images.max() > 200
    np.testing.assert_array_equal(data.labels.numpy(), labels_of(dataset))


def test_importing_the_module_stays_light():
    program = "import sys, task.data.images, task.data.batches; print({'datasets', 'torchvision'} & set(sys.modules))"
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="needs PETALWISE_TEST_DATA")
@pytest.mark.parametrize("columns", [("cifar100", "img", "fine_label"), ("pacs", "image", "label")])
def test_real_images(columns):
    folder, image_column, label_column = columns
    config = DatasetConfig(source="parquet", image_column=image_column, label_column=label_column, max_test_samples=200)
    data = decode(load_split(config, "test", Path(DATA) / folder, seed=0), 56)
    assert data.images.shape == (200, 3, 56, 56)
    assert data.images.float().std() > 30
