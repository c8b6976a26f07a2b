"""Signals of training, each beside a plain computation of the same."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from client_app.signals import ClassMoments, FeatureTap, UpdateScores, label_entropy, product_change_norm, update_norms
from client_app.training import make_optimizer, train
from task.config import BackboneConfig, LoraConfig, TaskConfig, TrainConfig
from task.errors import ModelError
from task.model import build_model
from task.units import lora_layers
from tests.conftest import NUM_CLASSES

CLASSES, DIMENSION = 4, 3


def labelled(count, seed=0, mean=0.0, deviation=1.0):
    generator = torch.Generator().manual_seed(seed)
    features = mean + deviation * torch.randn(count, DIMENSION, generator=generator)
    return features, torch.randint(0, CLASSES, (count,), generator=generator)


def moments_of(features, labels, chosen, sizes):
    moments = ClassMoments(CLASSES, features.shape[1])
    for batch in zip(features.split(sizes), labels.split(sizes), chosen.split(sizes), strict=True):
        moments.add(*batch)
    return moments


def assert_two_pass(moments, features, labels, rtol, atol=0.0):
    """Compare with numpy's own mean and variance in float64 of the same float32 features."""
    for c in range(CLASSES):
        z = features[labels == c].double().numpy()
        assert moments.count[c] == len(z)
        expected = z.mean(0) if len(z) else np.zeros(features.shape[1])
        np.testing.assert_allclose(moments.mean[c], expected, rtol=rtol, atol=atol)
        expected = z.var(0, ddof=1) if len(z) > 1 else np.zeros(features.shape[1])
        np.testing.assert_allclose(moments.variances()[c], expected, rtol=rtol, atol=atol)
        np.testing.assert_allclose(moments.variance()[c], expected.mean(), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1e4, 1e-1), (-1e6, 1.0), (1e-6, 1e-9)])
def test_moments_agree_with_two_passes_however_far_the_mean(mean, deviation):
    features, labels = labelled(500, mean=mean, deviation=deviation)
    moments = moments_of(features, labels, torch.ones(500, dtype=torch.bool), 16)
    assert_two_pass(moments, features, labels, rtol=1e-6)
    assert moments.variances().min() > 0.5 * deviation**2  # that the case is no trivial one


@st.composite
def split_samples(draw):
    """Samples of which some count, in batches of any sizes, and by classes of which some are rare or missing."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    values = st.floats(-1e3, 1e3, width=32)
    features = draw(st.lists(st.lists(values, min_size=2, max_size=2), min_size=sum(sizes), max_size=sum(sizes)))
    labels = draw(st.lists(st.integers(0, CLASSES - 1), min_size=sum(sizes), max_size=sum(sizes)))
    chosen = draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes)))
    return torch.tensor(features), torch.tensor(labels), torch.tensor(chosen), sizes


@given(split_samples())
def test_any_split_into_batches_gives_the_moments_of_the_chosen_samples(case):
    features, labels, chosen, sizes = case
    moments = moments_of(features, labels, chosen, sizes)
    assert_two_pass(moments, features[chosen], labels[chosen], rtol=1e-9, atol=1e-6)
    at_once = moments_of(features, labels, chosen, [len(labels)])
    torch.testing.assert_close(moments.mean, at_once.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.variances(), at_once.variances(), rtol=1e-9, atol=1e-6)


def test_classes_with_no_or_one_sample_have_variance_zero():
    features = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [4.0, 5.0, 8.0], [7.0, 8.0, 9.0]])
    labels, chosen = torch.tensor([1, 2, 2, 3]), torch.tensor([True, True, True, False])
    moments = moments_of(features, labels, chosen, [1, 1, 1, 1])
    assert moments.count.tolist() == [0, 1, 2, 0]
    assert moments.mean.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 7], [0, 0, 0]]
    assert moments.variances().tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 2], [0, 0, 0]]
    assert moments.variance().tolist() == [0, 0, pytest.approx(2 / 3), 0]


def test_moments_of_nothing_are_zero():
    moments = ClassMoments(CLASSES, DIMENSION)
    assert not moments.variance().any()
    assert not moments.mean.any()


def test_moments_keep_no_graph_of_the_features():
    features = torch.ones(2, DIMENSION, requires_grad=True)
    moments = moments_of(features * 2, torch.tensor([0, 0]), torch.tensor([True, True]), 2)
    assert not moments.mean.requires_grad
    assert not moments.variances().requires_grad


@pytest.fixture(scope="module")
def swin_model():
    arguments = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    backbone = BackboneConfig("swin_tiny_patch4_window7_224", source="random", image_size=16, arguments=arguments)
    return build_model(TaskConfig(backbone=backbone, lora=LoraConfig(rank=2, alpha=4)), NUM_CLASSES)


def filled(model, seed=0):
    """Give every trainable value, the zero B included, a random value."""
    model.load(np.random.default_rng(seed).normal(0, 0.2, model.layout.size).astype(np.float32))
    return model


@pytest.mark.parametrize("name", ["tiny_model", "swin_model"])
def test_features_are_timms_own_before_the_logits(name, request, images):
    model = filled(request.getfixturevalue(name))
    backbone = model.submodule("")
    with torch.no_grad(), FeatureTap(model) as tap:
        for batch in (images[:3], images[3:]):
            logits = model(batch)
            features = tap.features
            assert torch.equal(features, backbone.forward_head(backbone.forward_features(batch), pre_logits=True))
            assert torch.equal(model.head(features), logits)


def test_features_are_kept_only_while_tapped_and_without_their_graph(tiny_model, images):
    with FeatureTap(tiny_model) as tap:
        tiny_model(images).sum().backward()
        features = tap.features
    assert not features.requires_grad
    tiny_model(images[:1])
    assert tap.features is features


def batches(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(steps, 4, 3, 16, 16, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (steps, 4), generator=generator)
    return list(zip(images, labels, strict=True))


def reference_scores(model, optimizer, data, mu, specs):
    """The definition, step by step: G as the optimizer finds it, and the move it makes with it."""
    model.module.train()
    received, scores = model.read().astype(np.float64), np.zeros(len(specs))
    for images, labels in data:
        model.flat.grad.zero_()
        F.cross_entropy(model(images), labels).backward()
        before = model.read().astype(np.float64)
        model.flat.grad.add_(torch.from_numpy(mu * (before - received)).float())
        gradient = model.flat.grad.double().numpy()
        optimizer.step()
        moved = before - model.read()
        for index, spec in enumerate(specs):
            part = slice(spec.offset, spec.offset + spec.size)
            scores[index] += abs(np.sum(gradient[part] * moved[part]))
    return scores


@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_scores_are_those_of_a_loop_written_by_hand(tiny_model, kind, mu):
    config = TrainConfig(optimizer=kind, lr=0.01, weight_decay=0.1)
    specs = [spec for layer in lora_layers(tiny_model.layout) for spec in layer.specs]
    received, optimizer = filled(tiny_model).read(), make_optimizer(tiny_model, config)
    with UpdateScores(tiny_model, optimizer, specs) as scores:
        train(tiny_model, optimizer, batches(4), mu)
    trained = tiny_model.read()

    tiny_model.load(received)
    expected = reference_scores(tiny_model, make_optimizer(tiny_model, config), batches(4), mu, specs)
    np.testing.assert_array_equal(tiny_model.read(), trained)  # the loop by hand trains as train() does
    np.testing.assert_allclose(scores.scores, expected, rtol=1e-4, atol=1e-9)
    assert expected.min() > 1e-7
    assert not scores.refused.any()


def test_scores_count_weight_decay_as_part_of_the_move(tiny_model):
    """One SGD step without momentum moves by lr (g + decay w) along the gradient g."""
    filled(tiny_model)
    spec = lora_layers(tiny_model.layout)[3].b
    part = slice(spec.offset, spec.offset + spec.size)
    config = TrainConfig(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.5)
    optimizer = make_optimizer(tiny_model, config)
    w, g = (torch.randn(spec.size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    tiny_model.flat.detach()[part], tiny_model.flat.grad[part] = w, g
    with UpdateScores(tiny_model, optimizer, [spec]) as scores:
        optimizer.step()
    assert scores.scores.item() == pytest.approx(abs(0.1 * (g @ (g + 0.5 * w)).item()), rel=1e-4)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30], ids=str)
def test_a_dot_product_that_is_not_finite_counts_as_zero_and_is_counted(tiny_model, bad):
    """1e30 is finite but its square is not, in float32."""
    layers = lora_layers(tiny_model.layout)
    specs, gradient = [layers[0].a, layers[0].b, layers[1].a], tiny_model.flat.grad
    optimizer = make_optimizer(tiny_model, TrainConfig(optimizer="sgd", lr=0.5, momentum=0.0, weight_decay=0.0))
    with UpdateScores(tiny_model, optimizer, specs) as scores:
        gradient.fill_(0.25)
        optimizer.step()
        after_one = scores.scores.clone()
        gradient[specs[1].offset + 2] = bad
        optimizer.step()
    torch.testing.assert_close(after_one, torch.tensor([spec.size / 32 for spec in specs]).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(scores.scores, after_one * torch.tensor([2, 1, 2]), rtol=1e-4, atol=0)
    assert scores.refused.tolist() == [1]


def test_nothing_is_scored_after_the_block_even_if_training_failed(tiny_model):
    optimizer = make_optimizer(tiny_model, TrainConfig())
    scores = UpdateScores(tiny_model, optimizer, [lora_layers(tiny_model.layout)[0].b])
    (images, labels), broken = batches(1)[0], torch.full((1, 3, 16, 16), float("nan"))
    with pytest.raises(ModelError, match="The loss is nan at local step 2"), scores:
        train(tiny_model, optimizer, [(images, labels), (broken, labels[:1])])
    kept = scores.scores.clone()
    assert kept > 0
    train(tiny_model, optimizer, batches(2))
    assert torch.equal(scores.scores, kept)


dimensions = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))


@given(dimensions, st.sampled_from([1e-4, 1.0, 1e3]))
def test_the_norm_of_the_product_change_is_that_of_the_dense_product(dimension, change):
    rank, inputs, outputs, seed = dimension
    generator = torch.Generator().manual_seed(seed)
    a0, b0 = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    a1 = a0 + change * torch.randn(rank, inputs, generator=generator)
    b1 = b0 + change * torch.randn(outputs, rank, generator=generator)
    dense = (b1.double() @ a1.double() - b0.double() @ a0.double()).norm()
    norm = product_change_norm(a0, b0, a1, b1)
    torch.testing.assert_close(norm, dense, rtol=1e-6, atol=1e-7)


@given(dimensions)
def test_factors_that_change_but_not_their_product_have_no_product_change(dimension):
    rank, inputs, outputs, seed = dimension
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    assert product_change_norm(a, b, -2 * a, -b / 2) <= 1e-6 * (1 + (b @ a).norm())
    assert product_change_norm(a, b, a, b) <= 1e-6 * (1 + (b @ a).norm())
    assert product_change_norm(a, torch.zeros_like(b), a, b) == pytest.approx((b @ a).norm().item(), rel=1e-4)


def test_the_norms_of_every_layer_are_those_of_the_dense_matrices(tiny_model):
    before = torch.from_numpy(filled(tiny_model, 0).read())
    after = torch.from_numpy(filled(tiny_model, 1).read())
    norms = update_norms(tiny_model.layout, before, after)
    old, new = (
        {name: values.double().numpy() for name, values in tiny_model.layout.views(flat).items()}
        for flat in (before, after)
    )
    modules = [f"blocks.{block}.{kind}" for block in (0, 1) for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert {name: norm.shape for name, norm in norms.items()} == dict.fromkeys(
        ("norm-a", "norm-b", "norm-product"), (len(modules),)
    )
    for index, module in enumerate(modules):
        (a0, b0), (a1, b1) = ([of[f"{module}.lora_{factor}.weight"] for factor in "AB"] for of in (old, new))
        assert norms["norm-a"][index].item() == pytest.approx(np.linalg.norm(a1 - a0), rel=1e-6)
        assert norms["norm-b"][index].item() == pytest.approx(np.linalg.norm(b1 - b0), rel=1e-6)
        assert norms["norm-product"][index].item() == pytest.approx(np.linalg.norm(b1 @ a1 - b0 @ a0), rel=1e-6)


def test_nothing_trained_has_no_norm(tiny_model):
    flat = torch.from_numpy(filled(tiny_model).read())
    norms = update_norms(tiny_model.layout, flat, flat.clone())
    assert not norms["norm-a"].any()
    assert not norms["norm-b"].any()
    assert norms["norm-product"].max() < 1e-6


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_label_entropy_is_that_of_the_shares(labels):
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    entropy = label_entropy(torch.tensor(labels))
    assert entropy.dtype == torch.float64
    assert entropy.item() == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12, abs=1e-12)


def test_label_entropy_runs_from_zero_to_the_logarithm_of_the_classes():
    assert label_entropy(torch.full((7,), 3)) == 0
    assert label_entropy(torch.arange(8)).item() == pytest.approx(np.log(8))
