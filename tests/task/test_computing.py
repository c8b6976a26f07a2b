"""Other ways to compute than float32: what comes of them, and that the values that travel stay float32."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from client_app.signals import FeatureTap
from client_app.training import make_optimizer, train
from task.config import TrainConfig
from task.model import build_model

NUM_CLASSES = 3
LABELS = torch.arange(8) % NUM_CLASSES


@pytest.fixture
def built(tiny_task):
    """Build the tiny task's model to compute in some way, its adapter not zero."""

    def build(**options):
        model = build_model(replace(tiny_task, train=replace(tiny_task.train, lr=1e-3, **options)), NUM_CLASSES)
        values = torch.randn(model.layout.size, generator=torch.Generator().manual_seed(0))
        model.load((0.1 * values).numpy())
        return model

    return build


def gradient(model, images):
    model.module.train()
    model.flat.grad.zero_()
    cross_entropy(model(images), LABELS).backward()
    return model.flat.grad.clone()


def likeness(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


WAYS = [
    pytest.param({"precision": "bfloat16"}, 0.03, id="bfloat16"),
    pytest.param({"channels_last": True}, 1e-5, id="channels_last"),
    pytest.param({"compile": True}, 1e-4, id="compile", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("options", "tolerance"), WAYS)
def test_logits_and_gradient_are_nearly_those_of_float32_and_the_same_every_time(built, images, options, tolerance):
    plain, other = built(), built(**options)
    with torch.no_grad():
        expected, found = plain(images), other(images)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(other(images), found)
    slope = gradient(other, images)
    assert slope.dtype == torch.float32
    assert likeness(slope, gradient(plain, images)) > 0.99
    assert torch.equal(gradient(other, images), slope)


def test_bfloat16_is_really_computed_with(built, images):
    with torch.no_grad():
        assert not torch.equal(built(precision="bfloat16")(images), built()(images))


@pytest.mark.parametrize("options", [WAYS[0].values[0], pytest.param({"compile": True}, marks=pytest.mark.slow)])
def test_training_and_the_features_seen_along_with_it_work_the_same_way(built, images, options):
    model = built(**options)
    model(images)  # compiled without the hook
    before = model.read()
    with FeatureTap(model) as tap:
        outcome = train(model, make_optimizer(model, TrainConfig(lr=1e-3)), [(images, LABELS)] * 3)
    assert outcome.steps == 3
    assert tap.features.shape == (8, 32)
    assert tap.features.dtype == torch.float32
    assert (model.read() != before).any()
