import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from task.data.batches import Normaliser, augment, eval_batches, train_batches
from task.data.images import ImageSet
from task.errors import ConfigError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PLAIN = Normaliser.of([0.0] * 3, [1 / 255] * 3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(count=32, side=16, seed=0):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator(seed))


def numbered(count):
    """Images whose every pixel says their number, which is their label too."""
    labels = torch.arange(count)
    return ImageSet(labels.to(torch.uint8)[:, None, None, None].expand(count, 3, 8, 8).contiguous(), labels)


def test_normaliser_is_the_formula():
    images = random_images()
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    result = Normaliser.of(MEAN, STD)(images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, (images / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(images, random_images())


@pytest.mark.parametrize("kind", ["none", "flip", "crop_flip"])
@settings(deadline=None, max_examples=20)
@given(count=st.integers(0, 9), side=st.integers(8, 40), seed=st.integers(0, 2**63 - 1))
def test_augmentation_keeps_shape_type_and_follows_the_generator(kind, count, side, seed):
    images = random_images(count, side)
    result = augment(images, kind, generator(seed))
    assert result.shape == images.shape
    assert result.dtype == torch.uint8
    assert torch.equal(result, augment(images, kind, generator(seed)))
    assert torch.equal(images, random_images(count, side))


def test_flips_really_flip_about_half():
    images = random_images(400, 8)
    result = augment(images, "flip", generator())
    kept = (result == images).flatten(1).all(1)
    mirrored = (result == images.flip(-1)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_crop_flip_shifts_by_up_to_an_eighth_and_reflects():
    images = random_images(300, 16)
    result = augment(images, "crop_flip", generator(3))
    padded = torch.nn.functional.pad(images.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    crops = torch.stack(
        [
            crop if not flip else crop.flip(-1)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            for crop in [padded[:, :, top : top + 16, left : left + 16]]
        ]
    )
    hits = (crops == result).flatten(2).all(2)
    assert (hits.sum(0) == 1).all()
    assert (hits.sum(1) > 0).all()


def test_crop_flip_of_images_that_are_not_square():
    images = random_images(10, 16)[:, :, :8]
    assert augment(images, "crop_flip", generator()).shape == (10, 3, 8, 16)


def test_unknown_augmentation_is_refused():
    with pytest.raises(ConfigError, match=r"train.augment='mixup' is not one of: none, flip, crop_flip"):
        augment(random_images(1), "mixup", generator())


@pytest.mark.parametrize("kind", ["none", "flip", "crop_flip"])
def test_the_same_seed_gives_the_same_bits(kind):
    data = ImageSet(random_images(50), torch.arange(50))

    def batches(seed):
        return list(train_batches(data, 8, 2, 0, kind, Normaliser.of(MEAN, STD), generator(seed)))

    first, again, other = batches(1), batches(1), batches(2)
    assert len(first) == len(again) == 14
    assert all(
        torch.equal(a, b) for left, right in zip(first, again, strict=True) for a, b in zip(left, right, strict=True)
    )
    assert not torch.equal(first[0][1], other[0][1])


def test_every_epoch_has_every_image_once_in_its_own_order():
    batches = list(train_batches(numbered(10), 4, 3, 0, "none", PLAIN, generator()))
    assert [len(labels) for _, labels in batches] == [4, 4, 2] * 3
    for images, labels in batches:
        assert torch.equal(images[:, 0, 0, 0].round().long(), labels)
    epochs = [torch.cat([labels for _, labels in batches[start : start + 3]]).tolist() for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("max_steps", "expected"), [(0, 6), (1, 1), (4, 4), (99, 6)])
def test_max_steps_ends_the_round(max_steps, expected):
    assert len(list(train_batches(numbered(10), 4, 2, max_steps, "flip", PLAIN, generator()))) == expected


def test_eval_batches_keep_the_order():
    batches = list(eval_batches(numbered(7), 3, PLAIN))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(7))
    assert torch.cat([images for images, _ in batches])[:, 0, 0, 0].round().tolist() == list(range(7))


def test_batches_of_one_class_and_one_image():
    assert [labels.tolist() for _, labels in train_batches(numbered(1), 16, 1, 0, "crop_flip", PLAIN, generator())] == [
        [0]
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_batches_of_the_cpu():
    data = ImageSet(random_images(50), torch.arange(50))
    plain = train_batches(data, 8, 2, 0, "crop_flip", Normaliser.of(MEAN, STD), generator())
    on_gpu = train_batches(data.to("cuda"), 8, 2, 0, "crop_flip", Normaliser.of(MEAN, STD, "cuda"), generator())
    for (images, labels), (gpu_images, gpu_labels) in zip(plain, on_gpu, strict=True):
        assert torch.equal(labels, gpu_labels.cpu())
        torch.testing.assert_close(images, gpu_images.cpu())
