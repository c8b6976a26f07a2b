"""Retraining the head on virtual features: on its own, and as a phase of whole runs with scripted clients."""

import logging
import math
import re

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord

from strategies import Calibration, CalibrationConfig, FedAvg, FedAvgConfig, TaskContext
from strategies.ccvr import Gaussian, draw, retrain_head
from task.arrays import FLAT, array_to_flat, flat_to_array
from task.messages import ARRAYS, MEASURE, SIGNALS
from task.signals import SignalRequest, signal_layout
from task.units import make_layout
from tests.strategies.scripted import (
    BASE,
    CLASSES,
    LAYOUT,
    Script,
    ShufflingGrid,
    final_flat,
    initial_arrays,
    scripted_app,
    scripted_signals,
)

NAMES = ["0", "1", "2", "3"]
CENTRES = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def separable(labels=(0, 1, 2)):
    return [Gaussian(label, 1.0, CENTRES[label], torch.full((4,), 0.3)) for label in labels]


def accuracy(weight, bias):
    features, labels = draw(separable(), 600, seeded(99))
    logits = features @ weight.T + (0 if bias is None else bias)
    return float((logits.argmax(1) == labels).float().mean())


@pytest.mark.parametrize("temperature", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_biased_head_is_mended(temperature, with_bias):
    weight = CENTRES.clone()
    weight[0] += 3.0  # prefers class 0 whatever it sees
    bias = torch.tensor([4.0, 0.0, 0.0]) if with_bias else None
    before = accuracy(weight, bias)
    retrain_head(weight, bias, separable(), CalibrationConfig(temperature=temperature, epochs=20, lr=0.1), seeded())
    assert before < 0.4
    assert accuracy(weight, bias) > 0.95


def test_rows_of_classes_that_nobody_covers_stay_and_those_of_the_others_learn_their_own():
    generator = seeded(1)
    weight, bias = torch.randn(5, 4, generator=generator), torch.randn(5, generator=generator)
    old_weight, old_bias = weight.clone(), bias.clone()
    components = [Gaussian(label, 1.0, CENTRES[i], torch.full((4,), 0.3)) for i, label in enumerate((1, 4))]
    retrain_head(weight, bias, components, CalibrationConfig(epochs=20, lr=0.1), seeded())
    kept, covered = [0, 2, 3], [1, 4]
    assert torch.equal(weight[kept], old_weight[kept])
    assert torch.equal(bias[kept], old_bias[kept])
    logits = CENTRES[:2] @ weight[covered].T + bias[covered]
    assert logits.argmax(1).tolist() == [0, 1]
    before = CENTRES[:2] @ old_weight[covered].T + old_bias[covered]
    assert (logits - before).diagonal().min() > 0


def test_the_head_takes_the_steps_of_sgd_with_momentum_and_a_cosine_by_epoch():
    """One batch per epoch, and the gradient of the cross-entropy by its formula."""
    config = CalibrationConfig(draws_per_class=20, epochs=3, batch_size=1000, lr=0.5, momentum=0.7)
    weight, bias = CENTRES.clone(), torch.tensor([1.0, 0.0, -1.0])
    w, b = weight.double().numpy().copy(), bias.double().numpy().copy()
    retrain_head(weight, bias, separable(), config, seeded(5))

    generator, velocity = seeded(5), [0.0, 0.0]
    for epoch in range(3):
        features, labels = draw(separable(), 60, generator)
        torch.randperm(60, generator=generator)
        x, logits = features.double().numpy(), features.double().numpy() @ w.T + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(60), labels.numpy()] -= 1
        velocity = [0.7 * v + g for v, g in zip(velocity, (p.T @ x / 60, p.mean(0)), strict=True)]
        lr = 0.5 * (1 + math.cos(math.pi * epoch / 3)) / 2
        w, b = w - lr * velocity[0], b - lr * velocity[1]
    np.testing.assert_allclose(weight.numpy(), w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias.numpy(), b, rtol=1e-4, atol=1e-5)


def test_with_a_temperature_the_length_of_the_logits_plays_no_part():
    """A head twice as long has logits of the same direction, so its gradient is half as large."""
    config = CalibrationConfig(epochs=1, batch_size=1000, draws_per_class=20, temperature=0.1, lr=1.0)
    moves = []
    for scale in (1.0, 2.0):
        weight = scale * CENTRES.clone().add_(0.5)
        before = weight.clone()
        retrain_head(weight, None, separable(), config, seeded())
        moves.append(weight - before)
    torch.testing.assert_close(moves[0], 2 * moves[1], rtol=1e-3, atol=1e-5)
    assert moves[0].abs().max() > 1e-3


def test_draws_follow_the_seed():
    def trained(seed, **options):
        weight = CENTRES.clone()
        retrain_head(weight, None, separable(), CalibrationConfig(draws_per_class=2, **options), seeded(seed))
        return weight

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


@pytest.mark.parametrize(("every_round", "rounds"), [(False, [4]), (True, [1, 2, 3, 4])])
def test_calibration_is_due_after_the_last_round_or_after_every_one(every_round, rounds):
    calibration = Calibration(CalibrationConfig(name="ccvr", every_round=every_round))
    assert [n for n in range(1, 5) if calibration.due(n, 4)] == rounds


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_moments_are_asked_of_all_samples_of_the_model_that_is_evaluated(covariance):
    request = Calibration(CalibrationConfig(covariance=covariance)).request
    assert request == SignalRequest(class_moments=covariance, samples="all", taken="after")
    assert (request.model, request.images) == ("adapted", "normalised")
    assert request.without_training


def measured(counts, covariance="diagonal", dimension=4):
    """Moments of one client: the separable classes, as often as ``counts`` says."""
    key = "class-covariance" if covariance == "full" else "class-variances"
    spread = torch.full((3, dimension), 0.09)
    return {
        "class-count": torch.tensor(counts, dtype=torch.float32),
        "class-mean": CENTRES.clone(),
        key: torch.diag_embed(spread) if covariance == "full" else spread,
    }


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("mixture", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_only_the_head_of_a_model_changes(covariance, mixture, bias):
    shapes = {"blocks.0.fc.lora_A.weight": (1, 2), "blocks.0.fc.lora_B.weight": (3, 1), "head.weight": (3, 4)}
    layout = make_layout(shapes | ({"head.bias": (3,)} if bias else {}))
    flat = torch.randn(layout.size, generator=seeded(3))
    before = flat.clone()
    calibration = Calibration(CalibrationConfig(covariance=covariance, mixture=mixture, epochs=30, lr=0.1))
    moments = [measured([5.0, 2.0, 0.0], covariance), measured([1.0, 0.0, 7.0], covariance)]
    found = layout.views(calibration.calibrated(flat, layout, moments, seeded()))
    assert torch.equal(flat, before)
    for name in list(shapes)[:2]:
        assert torch.equal(found[name], layout.views(before)[name])
    assert accuracy(found["head.weight"], found.get("head.bias")) > 0.95
    assert accuracy(layout.views(before)["head.weight"], layout.views(before).get("head.bias")) < 0.9


@pytest.mark.parametrize("counts", [[0.0, 0.0, 0.0], [0.0, 7.0, 0.0]])
def test_without_samples_of_two_classes_there_is_no_calibrated_model(counts):
    flat = torch.randn(LAYOUT.size, generator=seeded())
    calibration = Calibration(CalibrationConfig(covariance="diagonal"))
    assert calibration.calibrated(flat, LAYOUT, [measured(counts)] * 2, seeded()) is None


def fedavg(seed=0, min_clients=2, **options):
    context, calibration = TaskContext("{}", LAYOUT, BASE, CLASSES, seed), CalibrationConfig(name="ccvr", **options)
    return FedAvg(FedAvgConfig(name="fedavg", min_clients=min_clients), context, Calibration(calibration))


def plain_fedavg():
    return FedAvg(FedAvgConfig(name="fedavg"), TaskContext("{}", LAYOUT, BASE, CLASSES, 0))


class SpyGrid(ShufflingGrid):
    """Keeps (kind, flat values) of every message that carries the model."""

    def push_messages(self, messages):
        messages = list(messages)
        self.sent = getattr(self, "sent", [])
        for message in messages:
            if ARRAYS in message.content.array_records:
                flat = array_to_flat(message.content[ARRAYS][FLAT], LAYOUT.size)
                self.sent.append((message.metadata.message_type, int(message.metadata.group_id), flat.copy()))
        return super().push_messages(messages)


def run(strategy=None, script=None, rounds=2, clients=NAMES, shuffle=None, **keywords):
    grid, reports = SpyGrid(scripted_app(script or Script()), clients, shuffle), []
    strategy = strategy or fedavg()
    result = strategy.start(grid, initial_arrays(), num_rounds=rounds, on_round=reports.append, **keywords)
    return final_flat(result.arrays), reports, grid.sent


def uncalibrated(rounds=2):
    return run(plain_fedavg(), rounds=rounds)[0]


HEAD = LAYOUT.slices["head"]


@pytest.mark.parametrize(("every_round", "rounds"), [(False, {3}), (True, {1, 2, 3})])
def test_clients_measure_the_merged_model_when_calibration_is_due(every_round, rounds):
    flat, reports, sent = run(fedavg(every_round=every_round), rounds=3)
    asked = [(server_round, model) for kind, server_round, model in sent if kind == MEASURE]
    assert {server_round for server_round, _ in asked} == rounds
    assert len(asked) == len(rounds) * len(NAMES)
    assert [sorted(report.seconds).count("calibrate") for report in reports] == [int(n in rounds) for n in range(4)]
    np.testing.assert_array_equal(flat[: HEAD.start], uncalibrated(rounds=3)[: HEAD.start])
    assert (flat[HEAD] != uncalibrated(rounds=3)[HEAD]).all()
    if not every_round:
        for _, model in asked:
            np.testing.assert_array_equal(model, uncalibrated(rounds=3))


def test_the_calibrated_head_is_evaluated_and_sent_on():
    central = []

    def evaluate(server_round, arrays):
        central.append(array_to_flat(arrays[FLAT], LAYOUT.size).copy())
        return MetricRecord({"accuracy": 0.5, "loss": 1.0})

    flat, _, sent = run(fedavg(every_round=True), evaluate_fn=evaluate)
    of = {(kind.partition(".")[0], n): model for kind, n, model in sent}
    assert not np.array_equal(of["query", 1][HEAD], central[1][HEAD])
    for found in (of["evaluate", 1], of["train", 2]):
        np.testing.assert_array_equal(found, central[1])
    for found in (of["evaluate", 2], flat):
        np.testing.assert_array_equal(found, central[2])


FORMS = {"pooled": {"covariance": "full"}, "mixture": {"mixture": True, "covariance": "diagonal", "temperature": 0.1}}


@pytest.mark.parametrize("form", FORMS)
def test_after_the_phase_the_head_tells_the_measured_classes_apart(form):
    def signals(name, instruction):
        layout = signal_layout(instruction.signals, LAYOUT)
        values = torch.zeros(layout.size)
        found = measured([3.0 + int(name), 0.0 if name == "1" else 5.0, 2.0], FORMS[form]["covariance"])
        for key, view in layout.views(values).items():
            view.copy_(found[key])
        return ArrayRecord({FLAT: flat_to_array(values.numpy())})

    flat, _, _ = run(fedavg(epochs=30, lr=0.1, **FORMS[form]), Script(signals=signals))
    before, after = (LAYOUT.views(torch.tensor(model)) for model in (uncalibrated(), flat))
    assert accuracy(before["head.weight"], before["head.bias"]) < 0.5
    assert accuracy(after["head.weight"], after["head.bias"]) > 0.95


def test_the_order_of_nodes_and_replies_changes_no_bit_and_the_seed_does():
    expected, _, _ = run(fedavg(seed=1))
    for shuffle in range(2):
        np.testing.assert_array_equal(run(fedavg(seed=1), shuffle=shuffle)[0], expected)
    other, _, _ = run(fedavg(seed=2))
    np.testing.assert_array_equal(other[: HEAD.start], expected[: HEAD.start])
    assert (other[HEAD] != expected[HEAD]).any()


def spoiled(clients, change):
    """Measurements of some clients are changed in place by ``change(views)``."""

    def signals(name, instruction):
        record = scripted_signals(name, instruction)
        if name not in clients:
            return record
        layout = signal_layout(instruction.signals, LAYOUT)
        values = torch.tensor(record[FLAT].numpy())
        change(layout.views(values))
        return ArrayRecord({FLAT: flat_to_array(values.numpy())})

    return Script(signals=signals)


def set_value(key, value):
    def change(views):
        views[key].view(-1)[0] = value

    return change


BAD = {
    "mean": (set_value("class-mean", math.nan), "class-mean is not finite"),
    "covariance": (set_value("class-covariance", math.inf), "class-covariance is not finite"),
    "count": (set_value("class-count", math.nan), "class-count is not finite"),
    "negative count": (set_value("class-count", -1.0), "not whole numbers"),
    "half a sample": (set_value("class-count", 2.5), "not whole numbers"),
    "absurd count": (set_value("class-count", 1e12), "not whole numbers"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_measurement_is_dropped_by_name_and_counts_as_none(kind):
    change, reason = BAD[kind]
    flat, reports, _ = run(script=spoiled("2", change), rounds=1)
    assert list(reports[1].clients_dropped) == ["2"]
    assert reports[1].clients_dropped["2"].startswith("calibration: its ")
    assert reason in reports[1].clients_dropped["2"]
    assert reports[1].clients_used == NAMES
    expected, _, _ = run(script=spoiled("2", lambda views: views["class-count"].zero_()), rounds=1)
    np.testing.assert_array_equal(flat, expected)


def without_signals(name, server_round, content):
    if name == "1" and ARRAYS not in content:
        del content[SIGNALS]
    return content


def oversized(name, server_round, content):
    if name == "1" and ARRAYS not in content:
        content[SIGNALS] = ArrayRecord({FLAT: flat_to_array(np.zeros(10_000, np.float32))})
    return content


def raising(name, server_round, content):
    if name == "1" and ARRAYS not in content:
        raise RuntimeError("no disk left")
    return content


@pytest.mark.parametrize(
    ("edit", "reason"), [(without_signals, "signals"), (oversized, "shape"), (raising, "error .*no disk left")]
)
def test_a_client_that_does_not_answer_well_is_named(edit, reason):
    flat, reports, _ = run(script=Script(edit=edit), rounds=1)
    assert list(reports[1].clients_dropped) == ["1"]
    np.testing.assert_array_equal(flat[: HEAD.start], uncalibrated(1)[: HEAD.start])
    assert (flat[HEAD] != uncalibrated(1)[HEAD]).all()
    assert re.search(f"^calibration: .*{reason}", reports[1].clients_dropped["1"])


@pytest.mark.parametrize("seen", [0, 1])
def test_without_samples_of_two_classes_nothing_is_calibrated_and_the_log_says_so(caplog, seen):
    caplog.set_level(logging.INFO, logger="flwr")
    flat, reports, _ = run(script=spoiled("0123", lambda views: views["class-count"][seen:].zero_()))
    np.testing.assert_array_equal(flat, uncalibrated())
    assert reports[2].details["calibrated"] is False
    told = f"Round 2: clients have samples of {seen} of 3 classes and 2 are needed: no calibration."
    assert told in caplog.text


def test_classes_that_no_client_has_keep_their_rows_and_are_counted_in_the_log(caplog):
    caplog.set_level(logging.INFO, logger="flwr")
    flat, reports, _ = run(script=spoiled("0123", lambda views: views["class-count"][2:].zero_()))
    rows, before = (LAYOUT.views(torch.tensor(model))["head.weight"] for model in (flat, uncalibrated()))
    assert torch.equal(rows[2], before[2])
    assert (rows[:2] != before[:2]).any()
    assert reports[2].details["calibrated"] is True
    assert "Round 2: no client has a sample of 1 of 3 classes; their rows stay." in caplog.text


def test_with_a_sample_of_every_class_the_log_says_nothing_of_classes(caplog):
    caplog.set_level(logging.INFO, logger="flwr")
    _, reports, _ = run()
    assert reports[2].details["calibrated"] is True
    assert "has a sample of" not in caplog.text


def test_too_few_good_measurements_leave_the_model(caplog):
    script = spoiled("123", set_value("class-mean", math.nan))
    flat, reports, _ = run(script=script)
    np.testing.assert_array_equal(flat, uncalibrated())
    assert sorted(reports[2].clients_dropped) == ["1", "2", "3"]
    assert [report.merged for report in reports] == [False, True, True]
    assert "Round 2: 1 of the 2 measurements needed: no calibration." in caplog.text
    assert (run(fedavg(min_clients=1), script=script)[0] != uncalibrated()).any()


def test_moments_by_which_the_head_diverges_leave_the_model(caplog):
    flat, _, _ = run(script=spoiled("2", set_value("class-mean", 1e30)))
    np.testing.assert_array_equal(flat, uncalibrated())
    assert "Round 2: " in caplog.text
    assert "no calibration" in caplog.text


def test_measurements_are_counted_in_the_bytes_and_leave_the_units_to_the_model():
    calibrated, plain = run()[1], run(plain_fedavg())[1]
    floats = signal_layout(Calibration(CalibrationConfig()).request, LAYOUT).size
    more = calibrated[2].bytes_up - plain[2].bytes_up
    assert 4 * len(NAMES) * floats < more < 4 * len(NAMES) * floats + len(NAMES) * 1000
    assert calibrated[2].bytes_up_by_unit == plain[2].bytes_up_by_unit
    extra = sum(calibrated[2].bytes_down_by_unit.values()) - sum(plain[2].bytes_down_by_unit.values())
    assert extra == 4 * len(NAMES) * LAYOUT.size
