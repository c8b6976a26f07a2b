"""What a round measures and sends: on the real tiny model, beside training and measuring by hand."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import MessageType
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from client_app import measuring
from client_app.app import app
from client_app.measuring import (
    GramTaps,
    Recorder,
    class_signals,
    class_statistics,
    features_of,
    fisher_diagonal,
    last_epoch_start,
    packed,
)
from client_app.signals import label_entropy, update_norms
from client_app.training import make_optimizer, train
from client_app.worker import Node, worker_for
from server_app.compose import compose_run
from strategies.livar import Livar
from task.backbone import build_backbone
from task.config import TrainConfig
from task.data.batches import Normaliser, train_batches
from task.data.images import ImageSet
from task.messages import ARRAYS, MEASURE, METRICS, SIGNALS, received_flat
from task.model import build_model, canonical_name
from task.signals import NOTHING, SignalRequest, signal_layout
from task.units import lora_layers
from tests.client_app.test_app import TINY, ask, content, task_json
from tests.client_app.test_signals import filled, reference_scores
from tests.conftest import NUM_CLASSES
from tools.debug import InProcessGrid, simulated_nodes

NORMALISER = Normaliser.of([0.5] * 3, [0.25] * 3)
CONFIG = TrainConfig(lr=0.01, weight_decay=0.1, batch_size=6, local_epochs=3)
LAYERS = [f"blocks.{block}.{kind}" for block in (0, 1) for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
PARTS = {
    "class_variance": True,
    "class_moments": "diagonal",
    "update_scores": True,
    "update_norms": True,
    "gram": True,
    "fisher_samples": 3,
}
EVERYTHING = SignalRequest(**PARTS)
EVERYTHING_AFTER = SignalRequest(
    **{**PARTS, "class_moments": "full"}, taken="after", model="frozen", images="raw", samples="all"
)


def image_set(count, seed=0):
    """Images of which each class has its own shade, so that training learns some; the last class has none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, NUM_CLASSES - 1, (count,), generator=generator)
    noise = torch.randint(0, 160, (count, 3, 16, 16), generator=generator)
    return ImageSet((noise + 24 * labels[:, None, None, None]).to(torch.uint8), labels)


DATA = image_set(20)


@pytest.fixture(scope="module")
def frozen_a_model(tiny_task):
    return build_model(replace(tiny_task, lora=replace(tiny_task.lora, freeze_a=True)), NUM_CLASSES)


@pytest.fixture(scope="module")
def dropout_model(tiny_task):
    return build_model(replace(tiny_task, lora=replace(tiny_task.lora, dropout=0.2)), NUM_CLASSES)


def batches_of(config):
    generator = torch.Generator().manual_seed(7)
    return train_batches(
        DATA, config.batch_size, config.local_epochs, config.max_steps, config.augment, NORMALISER, generator
    )


def measured(model, request, config=CONFIG):
    """A round as the ClientApp makes it; the answer as one array."""
    optimizer = make_optimizer(model, config)
    with Recorder(request, model, optimizer, last_epoch_start(len(DATA), config)) as recorder:
        train(model, optimizer, batches_of(config), recorder=recorder)
    return recorder.signals(DATA, NORMALISER, torch.Generator().manual_seed(3))


def by_name(values, request, model):
    """The parts of an answer."""
    return {
        name: view.numpy() for name, view in signal_layout(request, model.layout).views(torch.tensor(values)).items()
    }


def epochs_by_hand(model, config):
    """Train without recorder; the features, logits and labels of every step."""
    model.module.train()
    optimizer, backbone, seen = make_optimizer(model, config), model.submodule(""), []
    for images, labels in batches_of(config):
        model.flat.grad.zero_()
        features = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
        logits = backbone.head(features)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        seen.append((features.detach(), logits.detach(), labels))
    return seen


@pytest.mark.parametrize(("key", "value"), PARTS.items())
def test_what_is_asked_for_alone_is_what_it_is_among_everything(tiny_model, key, value):
    initial, request = filled(tiny_model).read(), SignalRequest(**{key: value})
    everything = by_name(measured(tiny_model, EVERYTHING), EVERYTHING, tiny_model)
    tiny_model.load(initial)
    values = measured(tiny_model, request)
    assert values.dtype == np.float32
    assert values.shape == (signal_layout(request, tiny_model.layout).size,)
    for name, part in by_name(values, request, tiny_model).items():
        np.testing.assert_array_equal(part, everything[name])
        assert part.any() != (name == "refused-scores"), name


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("request_", [EVERYTHING, EVERYTHING_AFTER], ids=["along", "after"])
def test_training_is_bit_for_bit_the_same_whatever_is_measured(dropout_model, kind, request_):
    """Also in the round after, which starts from what measuring left behind."""
    model, initial = dropout_model, filled(dropout_model).read()
    config = replace(CONFIG, optimizer=kind, augment="crop_flip")

    def two_rounds(request):
        model.load(initial)
        torch.manual_seed(5)
        optimizer, since = make_optimizer(model, config), last_epoch_start(len(DATA), config)
        rounds = []
        for _ in range(2):
            with Recorder(request, model, optimizer, since) as recorder:
                outcome = train(model, optimizer, batches_of(config), 0.1, recorder if request.anything else None)
            rounds.append((outcome, model.read().tobytes(), torch.get_rng_state().tolist()))
            if request.anything:
                recorder.signals(DATA, NORMALISER, torch.Generator())
        return rounds

    assert two_rounds(request_) == two_rounds(SignalRequest())


@pytest.mark.parametrize("at_once", [1, 20, 256])
@pytest.mark.parametrize("samples", ["correct", "all"])
@pytest.mark.parametrize(("max_steps", "since"), [(0, 8), (3, 0), (7, 4)])
def test_class_moments_are_those_of_the_last_epochs_own_forward_passes(
    tiny_model, samples, max_steps, since, at_once, monkeypatch
):
    monkeypatch.setattr(measuring, "BATCH_SIZE", at_once)
    initial, config = filled(tiny_model).read(), replace(CONFIG, max_steps=max_steps)
    request = SignalRequest(class_variance=True, class_moments="diagonal", samples=samples)
    found = by_name(measured(tiny_model, request, config), request, tiny_model)
    tiny_model.load(initial)
    seen = epochs_by_hand(tiny_model, config)
    assert len(seen) == (max_steps or 12)
    features, logits, labels = (torch.cat(parts) for parts in zip(*seen[since:], strict=True))
    correct = logits.argmax(1) == labels
    assert 2 < correct.sum() < len(labels) - 2
    chosen = correct if samples == "correct" else torch.ones_like(correct)
    for c in range(NUM_CLASSES):
        z = features[chosen & (labels == c)].double().numpy()
        assert found["class-count"][c] == len(z)
        mean, variance = z.mean(0) if len(z) else 0, z.var(0, ddof=1) if len(z) > 1 else np.zeros(32)
        np.testing.assert_allclose(found["class-mean"][c], np.broadcast_to(mean, 32), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found["class-variances"][c], variance, rtol=1e-5, atol=1e-7)
        assert found["class-variance"][c] == pytest.approx(variance.mean(), rel=1e-5)
    assert found["class-count"].max() >= 2


def test_scores_are_in_order_of_the_layers(tiny_model):
    initial, request = filled(tiny_model).read(), SignalRequest(update_scores=True)
    found = by_name(measured(tiny_model, request), request, tiny_model)
    tiny_model.load(initial)
    specs = {spec.name: spec for spec in tiny_model.layout.tensors}
    for key, factor in (("score-a", "A"), ("score-b", "B")):
        tiny_model.load(initial)
        chosen = [specs[f"{layer}.lora_{factor}.weight"] for layer in LAYERS]
        expected = reference_scores(tiny_model, make_optimizer(tiny_model, CONFIG), batches_of(CONFIG), 0.0, chosen)
        np.testing.assert_allclose(found[key], expected, rtol=1e-4)
        assert len(set(found[key])) == len(LAYERS)


def test_norms_are_of_the_whole_round_and_the_entropy_of_all_labels(tiny_model):
    initial, request = filled(tiny_model).read(), SignalRequest(update_norms=True)
    found = by_name(measured(tiny_model, request), request, tiny_model)
    expected = update_norms(tiny_model.layout, torch.from_numpy(initial), torch.from_numpy(tiny_model.read()))
    for name, norms in expected.items():
        np.testing.assert_allclose(found[name], norms, rtol=1e-6)
    assert found["label-entropy"] == pytest.approx([label_entropy(DATA.labels).item()])


def test_dot_products_that_are_not_finite_are_counted(tiny_model):
    optimizer = make_optimizer(tiny_model, replace(CONFIG, optimizer="sgd"))
    layers = lora_layers(tiny_model.layout)
    request = SignalRequest(update_scores=True)

    def refused(recorder):
        values = recorder.signals(DATA, NORMALISER, torch.Generator())
        return by_name(values, request, tiny_model)["refused-scores"].tolist()

    with Recorder(request, tiny_model, optimizer, 0) as recorder:
        optimizer.step()
        assert refused(recorder) == [0]
        for spec in (layers[0].a, layers[3].b):
            tiny_model.flat.grad[spec.offset] = float("inf")
        optimizer.step()
    assert refused(recorder) == [2]


class Reads(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: values read by Python, and copies to another device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function.name())] += 1
        return function(*args, **(kwargs or {}))


def test_measuring_adds_no_read_to_those_of_training(tiny_model):
    """All of LIVAR's signals leave the device in the one copy at the end; on the CPU that copy is none."""
    filled(tiny_model)
    optimizer, found = make_optimizer(tiny_model, CONFIG), []
    for request in (NOTHING, Livar().request()):
        with Reads() as reads:
            with Recorder(request, tiny_model, optimizer, last_epoch_start(len(DATA), CONFIG)) as recorder:
                train(tiny_model, optimizer, batches_of(CONFIG), recorder=recorder)
            if request.anything:
                recorder.signals(DATA, NORMALISER, torch.Generator())
        found.append(reads.counts["aten::_local_scalar_dense"])
    assert found[0] == found[1] > 0


class Inputs:
    """Keeps what named modules of the timm model get, by hooks of its own."""

    def __init__(self, model, names):
        self.of, self._handles = {name: [] for name in names}, []
        for name, kept in self.of.items():
            module = model.submodule(name)
            self._handles.append(module.register_forward_hook(lambda _, x, y, kept=kept: kept.append(x[0].detach())))

    def gram(self, name, batches=slice(None)):
        x = torch.cat([x.flatten(0, -2) for x in self.of[name][batches]]).double()
        x = torch.cat([x, torch.ones(len(x), 1)], 1) if name == "head" else x
        return (x.T @ x).numpy()

    def remove(self):
        for handle in self._handles:
            handle.remove()


def test_gram_matrices_are_those_of_the_last_epochs_inputs(tiny_model):
    filled(tiny_model)
    request, inputs = SignalRequest(gram=True), Inputs(tiny_model, [*LAYERS, "head"])
    found = by_name(measured(tiny_model, request), request, tiny_model)
    inputs.remove()
    assert list(found) == [f"gram:{name}" for name in inputs.of]
    for name, values in found.items():
        expected = inputs.gram(name.removeprefix("gram:"), slice(8, 12))
        np.testing.assert_allclose(values, expected[np.triu_indices(len(expected))], rtol=1e-4, atol=1e-2)
    assert found["gram:head"][-1] == len(DATA)  # of the column of ones with itself


def test_gram_matrices_count_only_while_active_and_tapped(tiny_model, images):
    filled(tiny_model)
    inputs = Inputs(tiny_model, LAYERS[:1])
    with torch.no_grad():
        with GramTaps(tiny_model) as taps:
            tiny_model(images[:2])
            assert not any(gram.any() for gram in taps.grams.values())
            taps.active = True
            tiny_model(images[2:5])
        tiny_model(images[5:])
    inputs.remove()
    np.testing.assert_allclose(taps.grams[LAYERS[0]], inputs.gram(LAYERS[0], slice(1, 2)), rtol=1e-4, atol=1e-3)


def test_where_a_is_frozen_signals_are_of_b_alone(frozen_a_model):
    """A's score and norm are zero, the product's norm is that of B, and Gram matrices are of A's outputs."""
    model = filled(frozen_a_model)
    before = model.read()
    a = {canonical_name(n): p.double() for n, p in model.module.named_parameters() if ".lora_A." in n}
    inputs = Inputs(model, LAYERS)
    found = by_name(measured(model, EVERYTHING), EVERYTHING, model)
    inputs.remove()
    after, specs = model.read(), {spec.name: spec for spec in model.layout.tensors}
    assert not found["score-a"].any()
    assert not found["norm-a"].any()
    assert found["fisher"].shape == before.shape
    np.testing.assert_array_equal(found["norm-product"], found["norm-b"])
    for index, layer in enumerate(LAYERS):
        spec = specs[f"{layer}.lora_B.weight"]
        part = slice(spec.offset, spec.offset + spec.size)
        assert found["norm-b"][index] == pytest.approx(np.linalg.norm(after[part] - before[part]), rel=1e-5)
        factor = a[f"{layer}.lora_A.weight"].numpy()
        expected = factor @ inputs.gram(layer, slice(8, 12)) @ factor.T
        np.testing.assert_allclose(found[f"gram:{layer}"], expected[np.triu_indices(4)], rtol=1e-4, atol=1e-3)
    model.load(before)
    chosen = [specs[f"{layer}.lora_B.weight"] for layer in LAYERS]
    expected = reference_scores(model, make_optimizer(model, CONFIG), batches_of(CONFIG), 0.0, chosen)
    np.testing.assert_allclose(found["score-b"], expected, rtol=1e-4)


def features_by_timm(task, images):
    """Features of the backbone alone, built without adapter."""
    backbone = build_backbone(task.backbone, NUM_CLASSES, seed=task.seed)
    with torch.no_grad():
        return backbone.forward_head(backbone.forward_features(images), pre_logits=True)


@pytest.mark.parametrize("samples", ["correct", "all"])
@pytest.mark.parametrize("images", ["normalised", "raw"])
@pytest.mark.parametrize("model", ["adapted", "frozen"])
def test_class_signals_are_of_the_model_the_images_and_the_samples_asked_for(
    tiny_task, tiny_model, model, images, samples
):
    request = SignalRequest(class_moments="full", taken="after", model=model, images=images, samples=samples)
    filled(tiny_model, 4)
    found = class_signals(request, tiny_model, DATA, NORMALISER)
    pixels = DATA.images.float() / 255
    shown = pixels if images == "raw" else (pixels - 0.5) / 0.25
    if model == "frozen":
        features = features_by_timm(tiny_task, shown)
    else:
        backbone = tiny_model.submodule("")
        with torch.no_grad():
            features = backbone.forward_head(backbone.forward_features(shown), pre_logits=True)
    views = tiny_model.layout.views(tiny_model.flat.detach())
    correct = (features @ views["head.weight"].T + views["head.bias"]).argmax(1) == DATA.labels
    assert 2 < correct.sum() < len(DATA) - 2
    chosen = correct if samples == "correct" else torch.ones_like(correct)
    expected = class_statistics(features[chosen], DATA.labels[chosen], NUM_CLASSES, full=True)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-5)
    assert packed(found, request, tiny_model).shape == (signal_layout(request, tiny_model.layout).size,)


@pytest.mark.parametrize("name", ["tiny_model", "frozen_a_model"])
def test_features_without_adapter_leave_the_model_as_it_was(name, request, images):
    model = filled(request.getfixturevalue(name))
    values, trainable = model.read(), [n for n, p in model.module.named_parameters() if p.requires_grad]
    model.module.eval()
    with torch.no_grad():
        expected = model(images)
        adapted, _ = features_of(model, DATA, NORMALISER)
        frozen, _ = features_of(model, DATA, NORMALISER, frozen=True)
        assert not torch.allclose(frozen, adapted, rtol=0.1, atol=0.1)
        assert torch.equal(model(images), expected)
    np.testing.assert_array_equal(model.read(), values)
    assert [n for n, p in model.module.named_parameters() if p.requires_grad] == trainable


def test_features_come_in_order_of_the_images_however_many_there_are_to_a_batch(tiny_model, monkeypatch):
    at_once = features_of(filled(tiny_model), DATA, NORMALISER)
    monkeypatch.setattr(measuring, "BATCH_SIZE", 7)
    for batchwise, expected in zip(features_of(tiny_model, DATA, NORMALISER), at_once, strict=True):
        assert len(batchwise) == len(DATA)
        torch.testing.assert_close(batchwise, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("full", [True, False])
def test_class_statistics_are_numpys(full):
    """Of classes with many samples, two, one and none; with a mean far above the deviation."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 0, 0, 2, 0, 0, 1, 0])
    features = 1e3 + torch.randn(9, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    found = class_statistics(features, labels, 4, full)
    assert ("class-covariance" in found) == full
    assert found["class-count"].tolist() == [6, 2, 1, 0]
    for c in (0, 1):
        z = features[labels == c].double().numpy()
        np.testing.assert_allclose(found["class-mean"][c], z.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found["class-variances"][c], z.var(0, ddof=1), rtol=1e-9)
        assert found["class-variance"][c].item() == pytest.approx(z.var(0, ddof=1).mean(), rel=1e-9)
        if full:
            np.testing.assert_allclose(found["class-covariance"][c], np.cov(z.T), rtol=1e-9, atol=1e-9)
    assert torch.equal(found["class-mean"][2], features[4].double())
    assert not found["class-mean"][3].any()
    for name in set(found) - {"class-count", "class-mean"}:
        assert not found[name][2:].any(), name


def fisher(model, data, max_samples, seed=0):
    return fisher_diagonal(model, data, NORMALISER, max_samples, torch.Generator().manual_seed(seed))


def squared_gradients(model, data):
    """Squared gradient of log p(y | x) by every trainable value, of each image and each class y; and p."""
    parameters = {canonical_name(name): p for name, p in model.module.named_parameters() if p.requires_grad}
    ordered = [parameters[spec.name] for spec in model.layout.tensors]
    rows, log_p = [], model(NORMALISER(data.images)).log_softmax(1)
    for index, label in itertools.product(range(len(data)), range(NUM_CLASSES)):
        gradients = torch.autograd.grad(log_p[index, label], ordered, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradients]).square())
    return torch.stack(rows).view(len(data), NUM_CLASSES, -1), log_p.detach().exp()


@pytest.mark.parametrize(("count", "max_samples"), [(1, 1), (3, 3), (3, 100), (4, 2)])
@pytest.mark.parametrize("name", ["tiny_model", "frozen_a_model"])
def test_fisher_is_a_mean_over_images_of_a_squared_gradient_by_a_drawn_label(name, request, count, max_samples):
    """It is that of one of the ways to choose so many different images and a label for each."""
    model, data = filled(request.getfixturevalue(name)), image_set(count)
    found = fisher(model, data, max_samples)
    model.module.eval()
    squares, _ = squared_gradients(model, data)
    used = min(count, max_samples)
    ways = [
        sum(squares[index, label] for index, label in zip(chosen, labels, strict=True)) / used
        for chosen in itertools.combinations(range(count), used)
        for labels in itertools.product(range(NUM_CLASSES), repeat=used)
    ]
    distances = torch.tensor([(found - way).norm() / way.norm() for way in ways])
    assert distances.min() < 1e-4
    assert distances.sort().values[1] > 1e-3  # the ways differ


def test_fisher_draws_labels_from_the_models_own_distribution(tiny_model):
    data = image_set(1)
    filled(tiny_model)
    squares, p = squared_gradients(tiny_model, data)
    assert 0.3 < p.max() < 0.9  # neither flat nor certain
    bias = slice(-NUM_CLASSES, None)
    counts = torch.zeros(NUM_CLASSES)
    for seed in range(100):
        distance = (fisher(tiny_model, data, 1, seed)[bias] - squares[0][:, bias]).norm(dim=1)
        counts[distance.argmin()] += 1
    assert ((counts / 100 - p[0]).abs() < 3.5 * (p[0] * (1 - p[0]) / 100).sqrt() + 0.01).all()


def test_fisher_does_not_look_at_the_labels_and_follows_its_generator(tiny_model):
    filled(tiny_model)
    found = fisher(tiny_model, DATA, 6)
    assert torch.equal(fisher(tiny_model, ImageSet(DATA.images, 3 - DATA.labels), 6), found)
    assert not torch.equal(fisher(tiny_model, DATA, 6, seed=1), found)
    assert found.shape == tiny_model.flat.shape
    assert found.min() >= 0


def test_fisher_is_of_images_of_all_classes_where_images_are_sorted_by_class(tiny_model):
    """As a folder of images per class is: the first few are of one class."""
    shown = []
    order = DATA.labels.argsort()
    data = ImageSet(DATA.images[order], DATA.labels[order])
    handle = tiny_model.module.register_forward_pre_hook(lambda _, x: shown.append(x[0].clone()))
    fisher(tiny_model, data, 8)
    handle.remove()
    rows = [int((NORMALISER(data.images) == image).flatten(1).all(1).nonzero()) for image in shown]
    assert len(set(rows)) == 8
    assert len(data.labels[rows].unique()) > 2 > len(data.labels[:4].unique())


def test_fisher_leaves_values_and_a_gradient_of_zero(tiny_model):
    values = filled(tiny_model).read()
    tiny_model.flat.grad.fill_(3)
    tiny_model.module.train()
    first = fisher(tiny_model, DATA, 2)
    assert not tiny_model.flat.grad.any()
    assert torch.equal(fisher(tiny_model, DATA, 2), first)
    np.testing.assert_array_equal(tiny_model.read(), values)


@pytest.mark.parametrize(
    ("num_images", "config", "since"),
    [
        (20, TrainConfig(batch_size=6, local_epochs=1), 0),
        (20, TrainConfig(batch_size=6, local_epochs=3), 8),
        (24, TrainConfig(batch_size=6, local_epochs=3), 8),
        (25, TrainConfig(batch_size=6, local_epochs=3), 10),
        (3, TrainConfig(batch_size=6, local_epochs=3), 2),
        (20, TrainConfig(batch_size=6, local_epochs=3, max_steps=100), 8),
        (20, TrainConfig(batch_size=6, local_epochs=3, max_steps=9), 8),
        (20, TrainConfig(batch_size=6, local_epochs=3, max_steps=4), 0),
        (20, TrainConfig(batch_size=6, local_epochs=3, max_steps=1), 0),
    ],
)
def test_the_last_epochs_first_step(num_images, config, since):
    assert last_epoch_start(num_images, config) == since


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 3), st.integers(0, 30))
def test_since_the_last_epochs_first_step_no_image_comes_twice(count, batch_size, epochs, max_steps):
    """In a round that is not cut short, each comes once."""
    config = TrainConfig(batch_size=batch_size, local_epochs=epochs, max_steps=max_steps)
    data = ImageSet(torch.zeros(count, 3, 1, 1, dtype=torch.uint8), torch.arange(count))
    generator = torch.Generator().manual_seed(0)
    steps = list(train_batches(data, batch_size, epochs, max_steps, "none", NORMALISER, generator))
    remaining = [labels for _, labels in steps[last_epoch_start(count, config) :]]
    labels = torch.cat(remaining).tolist()
    assert len(set(labels)) == len(labels) > 0
    if len(steps) == epochs * math.ceil(count / batch_size):
        assert sorted(labels) == list(range(count))


@pytest.fixture(scope="module")
def built_app_model():
    model = build_model(compose_run({"overrides": TINY}).settings, num_classes=10)
    return model, model.read()


@pytest.fixture
def app_model(built_app_model):
    model, initial = built_app_model
    model.load(initial)
    return model


@pytest.fixture
def grid():
    return InProcessGrid(app, simulated_nodes(3))


@pytest.mark.parametrize("request_", [EVERYTHING, EVERYTHING_AFTER], ids=["along", "after"])
def test_a_reply_to_training_carries_the_signals_asked_for(grid, app_model, request_):
    size = signal_layout(request_, app_model.layout).size
    reply = ask(grid, 1, MessageType.TRAIN, content(app_model, signals=request_))
    signals = received_flat(reply, size, SIGNALS)
    found = by_name(signals, request_, app_model)
    assert np.isfinite(signals).all()
    counted, examples = found["class-count"].sum(), reply.content[METRICS]["num-examples"]
    assert counted == examples if request_.samples == "all" else 0 < counted < examples
    assert found["score-b"].min() > 0
    assert found["refused-scores"] == [0]
    again = ask(grid, 1, MessageType.TRAIN, content(app_model, signals=request_))
    np.testing.assert_array_equal(received_flat(again, size, SIGNALS), signals)


def test_a_reply_to_training_carries_no_signals_where_none_are_asked_for(grid, app_model):
    plain = ask(grid, 1, MessageType.TRAIN, content(app_model))
    measured_too = ask(grid, 1, MessageType.TRAIN, content(app_model, signals=EVERYTHING))
    assert list(plain.content.array_records) == [ARRAYS]
    assert sorted(measured_too.content.array_records) == [ARRAYS, SIGNALS]
    values = [received_flat(reply, app_model.layout.size) for reply in (plain, measured_too)]
    np.testing.assert_array_equal(*values)


def test_a_query_measures_the_received_model_without_training(grid, app_model):
    request = SignalRequest(class_variance=True, class_moments="full", taken="after", samples="all")
    filled(app_model)
    reply = ask(grid, 1, MEASURE, content(app_model, signals=request))
    assert list(reply.content.array_records) == [SIGNALS]
    signals = received_flat(reply, signal_layout(request, app_model.layout).size, SIGNALS)
    worker, node = worker_for(task_json(), None, None), Node.from_config(simulated_nodes(3)[0], 1)
    data = worker.client_data(node).train
    expected = packed(class_signals(request, app_model, data, worker.normaliser), request, app_model)
    np.testing.assert_array_equal(signals, expected)
    assert reply.content[METRICS]["num-examples"] == len(data) == signals[:10].sum()


@pytest.mark.parametrize(
    "request_",
    [
        SignalRequest(),
        SignalRequest(class_variance=True),
        SignalRequest(update_scores=True),
        SignalRequest(class_variance=True, taken="after", update_scores=True),
        SignalRequest(class_variance=True, taken="after", fisher_samples=1),
        SignalRequest(taken="after", gram=True),
        SignalRequest(taken="after", update_norms=True),
    ],
    ids=SignalRequest.to_json,
)
def test_a_query_for_what_needs_training_is_refused(grid, app_model, request_):
    reply = ask(grid, 1, MEASURE, content(app_model, signals=request_))
    assert reply.has_error()
    assert reply.error.reason == "Without training only class signals, taken=after, can be measured."


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MEASURE])
def test_a_request_that_cannot_be_followed_is_answered_with_the_reason(grid, app_model, kind):
    message = content(app_model)
    message["config"]["signals"] = '{"class_variance": true, "model": "frozen"}'
    reply = ask(grid, 1, kind, message)
    assert reply.has_error()
    assert "frozen model or of raw images are taken after training" in reply.error.reason
