import numpy as np
import pytest
import torch

from client_app.signals import UpdateScores
from client_app.training import make_optimizer, train
from task.config import BackboneConfig, LoraConfig, TaskConfig, TrainConfig
from task.errors import ModelError
from task.model import build_model
from task.units import lora_layers

ARGUMENTS = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
TASK = TaskConfig(
    backbone=BackboneConfig(source="random", image_size=16, arguments=ARGUMENTS), lora=LoraConfig(rank=2, alpha=4)
)


@pytest.fixture
def model():
    return build_model(TASK, num_classes=3)


def batches(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(steps, 4, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 3, (steps, 4), generator=generator)
    return list(zip(images, labels, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_agrees_with_plain_pytorch(model, kind):
    """The flat array changes nothing: a per-tensor optimizer on the same model takes the same steps."""
    config = TrainConfig(optimizer=kind, lr=0.01, weight_decay=0.1)
    initial = model.read()
    outcome = train(model, make_optimizer(model, config), batches(3))
    flat = model.read()

    plain = build_model(TASK, num_classes=3)
    plain.load(initial)
    parameters = [p for p in plain.module.parameters() if p.requires_grad]
    if kind == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1)
    plain.module.train()
    losses = []
    for images, labels in batches(3):
        optimizer.zero_grad(set_to_none=False)
        loss = torch.nn.functional.cross_entropy(plain(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(torch.from_numpy(flat), torch.from_numpy(plain.read()), rtol=1e-4, atol=1e-6)
    assert outcome.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert outcome.steps == 3


def test_a_fresh_optimizer_every_round(model):
    optimizer, initial = make_optimizer(model, TrainConfig(lr=0.01)), model.read()
    train(model, optimizer, batches(3))
    first = model.read()
    model.load(initial)
    train(model, optimizer, batches(3))
    torch.testing.assert_close(torch.from_numpy(model.read()), torch.from_numpy(first), rtol=0, atol=0)


def test_frozen_weights_stay_and_every_unit_moves(model):
    frozen = {n: p.detach().clone() for n, p in model.module.named_parameters() if not p.requires_grad}
    before = torch.from_numpy(model.read())
    train(model, make_optimizer(model, TrainConfig(lr=0.01)), batches(2))
    moved = torch.from_numpy(model.read()) - before
    assert all(torch.equal(p, frozen[n]) for n, p in model.module.named_parameters() if not p.requires_grad)
    assert all(values.abs().max() > 0 for values in model.layout.unit_views(moved).values())


def test_the_proximal_term_is_its_gradient(model):
    """One SGD step from anywhere but the received point moves by lr mu (w - w_received) more."""
    received = torch.from_numpy(model.read())
    config = TrainConfig(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
    train(model, make_optimizer(model, config), batches(2))
    plain = torch.from_numpy(model.read())
    model.load(received.numpy())
    train(model, make_optimizer(model, config), batches(2)[:1])
    after_one = torch.from_numpy(model.read())
    model.load(received.numpy())
    train(model, make_optimizer(model, config), batches(2), proximal_mu=2.0)
    proximal = torch.from_numpy(model.read())
    torch.testing.assert_close(proximal, plain - 0.1 * 2.0 * (after_one - received), rtol=1e-4, atol=1e-6)


def test_frozen_units_keep_their_bits_and_the_rest_trains_as_without_decay_of_them(model):
    head, config = model.layout.slices["head"], TrainConfig(lr=0.01, weight_decay=0.5)
    before = model.read()
    train(model, make_optimizer(model, config), batches(3), frozen=["head"])
    after = model.read()
    np.testing.assert_array_equal(after[head], before[head])
    plain = build_model(TASK, num_classes=3)
    plain.load(before)
    parameters = [p for name, p in plain.module.named_parameters() if p.requires_grad and "lora_" in name]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5)
    plain.module.train()
    for images, labels in batches(3):
        optimizer.zero_grad(set_to_none=False)
        torch.nn.functional.cross_entropy(plain(images), labels).backward()
        optimizer.step()
    np.testing.assert_allclose(after, plain.read(), rtol=1e-4, atol=1e-6)


def test_with_a_frozen_adapter_the_head_trains_as_ever_and_no_gradient_is_computed_for_the_rest(model):
    head, config = model.layout.slices["head"], TrainConfig(lr=0.01)
    before, adapter = model.read(), [unit for unit in model.layout.units if unit != "head"]
    train(model, make_optimizer(model, config), batches(1), frozen=adapter)
    after, gradient = model.read(), model.flat.grad.clone()
    model.load(before)
    train(model, make_optimizer(model, config), batches(1))
    np.testing.assert_array_equal(after[head], model.read()[head])
    np.testing.assert_array_equal(after[: head.start], before[: head.start])
    assert not gradient[: head.start].any()
    assert gradient[head].any()


def test_a_loss_that_is_not_finite_stops_before_the_step(model):
    before = model.read()
    images, labels = batches(1)[0]
    with pytest.raises(ModelError, match="lower train.lr"):
        train(model, make_optimizer(model, TrainConfig()), [(images * float("nan"), labels)])
    assert (model.read() == before).all()


def spoil_gradient(model, value):
    """Set every gradient of one factor to a value, from now on."""
    parameter = next(p for name, p in model.module.named_parameters() if "lora_B" in name)
    parameter.register_hook(lambda gradient: torch.full_like(gradient, value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_gradient_that_is_not_finite_ends_the_training_or_leaves_an_update_that_is_none(model, kind, value):
    initial, config = model.read(), TrainConfig(optimizer=kind, lr=0.01)
    spoil_gradient(model, value)
    with pytest.raises(ModelError, match="at local step 2; lower train.lr"):
        train(model, make_optimizer(model, config), batches(2))
    model.load(initial)
    train(model, make_optimizer(model, config), batches(1))
    assert not np.isfinite(model.read()).all(), "the server drops it"


def test_only_a_dot_product_that_overflows_counts_as_zero_in_a_training_that_goes_on(model):
    optimizer = make_optimizer(model, TrainConfig(optimizer="sgd", lr=2e-38, momentum=0.0, weight_decay=0.0))
    spoil_gradient(model, 3e38)
    first, second = (layer.b for layer in lora_layers(model.layout)[:2])
    with UpdateScores(model, optimizer, [first, second]) as scores:
        train(model, optimizer, batches(2))
    assert np.isfinite(model.read()).all()
    assert scores.refused.tolist() == [2]
    assert scores.scores[0] == 0
