"""Accuracy and loss against a plain loop over single images."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from task.data.batches import Normaliser
from task.data.images import ImageSet
from task.evaluation import evaluate
from tests.conftest import NUM_CLASSES

NORMALISER = Normaliser.of([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])


@pytest.fixture
def test_set():
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (23, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(0, NUM_CLASSES, (23,), generator=generator))


@pytest.mark.parametrize("batch_size", [1, 8, 23, 256])
def test_scores_are_those_of_single_images_whatever_the_batch_size(tiny_model, test_set, batch_size):
    hits, losses = 0, []
    with torch.no_grad():
        for image, label in zip(test_set.images, test_set.labels, strict=True):
            logits = tiny_model(NORMALISER(image[None]))
            hits += int(logits.argmax() == label)
            losses.append(cross_entropy(logits.double(), label[None]).item())
    score = evaluate(tiny_model, test_set, NORMALISER, batch_size)
    assert score.num_examples == 23
    assert score.accuracy == hits / 23
    assert score.loss == pytest.approx(sum(losses) / 23, rel=1e-5)


def test_a_model_that_is_always_right_scores_one(tiny_model, test_set):
    with torch.no_grad():
        predicted = tiny_model(NORMALISER(test_set.images)).argmax(1)
    assert evaluate(tiny_model, ImageSet(test_set.images, predicted), NORMALISER).accuracy == 1.0
    wrong = (predicted + 1) % NUM_CLASSES
    assert evaluate(tiny_model, ImageSet(test_set.images, wrong), NORMALISER).accuracy == 0.0


def test_evaluation_leaves_the_values_and_takes_evaluation_mode(tiny_model, test_set):
    before = tiny_model.read()
    tiny_model.module.train()
    evaluate(tiny_model, test_set, NORMALISER)
    assert not tiny_model.module.training
    assert (tiny_model.read() == before).all()
    assert not tiny_model.flat.grad.any()
