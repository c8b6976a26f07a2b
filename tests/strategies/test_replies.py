"""Checks of single replies; test_base.py holds what bad ones do to a round."""

import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from strategies.codec import Codec
from strategies.cohort import MAX_REASON_LENGTH, ClientDirectory
from strategies.replies import (
    MAX_EXAMPLES,
    Update,
    check_all,
    check_evaluation,
    check_moments,
    check_signals,
    check_update,
    mean_metric,
    replies_by_client,
)
from task.arrays import FLAT, flat_to_array
from task.errors import MessageError
from task.messages import ARRAYS, CONFIG, METRICS, SIGNALS
from task.signals import NOTHING, SignalRequest, signal_layout
from tests.strategies.scripted import BASE, LAYOUT, Script, ShufflingGrid, initial_arrays, scripted_app

VALUES = np.linspace(0, 1, LAYOUT.size, dtype=np.float32)
SCORES = SignalRequest(update_scores=True)
MOMENTS = SignalRequest(class_moments="diagonal", taken="after")


@pytest.fixture(autouse=True)
def task_of_flower():
    """Flower's messages want to know their task; a grid tells them."""
    ShufflingGrid(scripted_app(Script()), [])


@pytest.fixture
def codec():
    return Codec(initial_arrays(), LAYOUT)


def asked(node):
    message = Message(RecordDict(), node, "train")
    message.metadata.__dict__["_message_id"] = f"to {node}"
    return message


def reply(content, node=1):
    return Message(content, reply_to=asked(node))


def content_of(values=VALUES, signals=None, **metrics):
    found = RecordDict(
        {
            ARRAYS: ArrayRecord({FLAT: flat_to_array(values)}),
            METRICS: MetricRecord({"num-examples": 7, "train-loss": 0.5} | metrics),
            CONFIG: ConfigRecord({"base": BASE, "layout": LAYOUT.digest}),
        }
    )
    if signals is not None:
        found[SIGNALS] = ArrayRecord({FLAT: flat_to_array(np.asarray(signals, np.float32))})
    return found


def test_replies_are_sorted_by_client_and_every_silence_has_its_reason(caplog):
    directory = ClientDirectory(nodes={"10": 1, "9": 2, "b": 3, "a": 4, "x": 5})
    directory.remember([asked(node) for node in (1, 2, 3, 4)], ["10", "9", "b", "a"])
    replies = [
        reply(content_of(), 3),
        Message(Error(code=3, reason="no disk left"), reply_to=asked(2)),
        reply(content_of(), 1),
        reply(content_of(), 3),
        reply(content_of(), 5),
        reply(content_of(), 99),
    ]
    answered, failed = replies_by_client(replies, directory, ["10", "9", "b", "a"])
    assert list(answered) == ["10", "b"]
    assert answered["b"] is replies[0]
    assert list(failed.items()) == [("9", "error 3: no disk left"), ("a", "no reply within the timeout")]
    ignored = [line for line in caplog.messages if "nobody waits for" in line]
    assert len(ignored) == 3
    assert "node 99" in ignored[2]


def test_of_two_replies_the_first_counts_also_if_it_is_an_error():
    directory = ClientDirectory(nodes={"0": 1})
    directory.remember([asked(1)], ["0"])
    error = Message(Error(code=3, reason="once"), reply_to=asked(1))
    answered, failed = replies_by_client([error, reply(content_of())], directory, ["0"])
    assert answered == {}
    assert failed == {"0": "error 3: once"}


def test_a_long_reason_is_cut():
    directory = ClientDirectory(nodes={"0": 1})
    directory.remember([asked(1)], ["0"])
    error = Message(Error(code=3, reason="x" * 100_000), reply_to=asked(1))
    _, failed = replies_by_client([error], directory, ["0"])
    assert failed["0"].startswith("error 3: xxx")
    assert len(failed["0"]) == MAX_REASON_LENGTH


def test_a_good_update_is_taken_as_it_is(codec):
    update = check_update(reply(content_of(extra=3.0)), "a", codec, BASE)
    assert (update.client, update.num_examples, update.signals) == ("a", 7, {})
    np.testing.assert_array_equal(update.flat.numpy(), VALUES)
    assert update.metrics["extra"] == 3.0
    assert update.config["layout"] == LAYOUT.digest


def two_arrays(content):
    content["more"] = ArrayRecord({FLAT: flat_to_array(VALUES)})


def other_layout(content):
    content[CONFIG]["layout"] = "00" * 32


def other_base(content):
    content[CONFIG]["base"] = "00" * 32


def half_an_image(content):
    content[METRICS]["num-examples"] = 2.5


def named_otherwise(content):
    content[ARRAYS] = ArrayRecord({"weights": flat_to_array(VALUES)})


def two_metrics(content):
    content["more"], content["last"] = MetricRecord({"num-examples": 9}), content.pop(METRICS)


def not_finite(content):
    values = VALUES.copy()
    values[[0, -1]] = math.nan, math.inf
    content[ARRAYS] = ArrayRecord({FLAT: flat_to_array(values)})


BAD = {
    two_arrays: "2 array records",
    other_layout: "another layout",
    other_base: "hash 0000.*server's abab",
    half_an_image: "'num-examples' is 2.5, not a whole number",
    named_otherwise: "'flat'.*weights",
    two_metrics: "metric record",
    not_finite: "not finite, in blocks.0, head",
}


@pytest.mark.parametrize("change", BAD)
def test_a_bad_update_is_refused_with_the_reason(codec, change):
    content = content_of()
    change(content)
    with pytest.raises(MessageError, match=BAD[change]):
        check_update(reply(content), "a", codec, BASE)


@pytest.mark.parametrize("count", [1, 3.0, MAX_EXAMPLES])
def test_numbers_of_examples_that_are_whole_count(codec, count):
    update = check_update(reply(content_of(**{"num-examples": count})), "a", codec, BASE)
    assert update.num_examples == count
    assert type(update.num_examples) is int


def test_an_app_of_another_make_needs_no_config_and_may_name_its_records_as_it_likes():
    codec = Codec(ArrayRecord({"w": Array(np.zeros((2, 3), np.float32))}))
    content = RecordDict(
        {"mine": ArrayRecord({"w": Array(np.ones((2, 3), np.float32))}), "of it": MetricRecord({"num-examples": 4})}
    )
    update = check_update(reply(content), "a", codec, base="")
    assert update.flat.tolist() == [1.0] * 6
    assert (update.num_examples, dict(update.config)) == (4, {})


def test_signals_are_views_by_name(codec):
    update = check_update(reply(content_of(signals=[1, 2, 3, 4, 0])), "a", codec, BASE, SCORES)
    found = {key: view.tolist() for key, view in update.signals.items()}
    assert found == {"score-a": [1, 2], "score-b": [3, 4], "refused-scores": [0]}


def test_signals_need_not_be_finite_here(codec):
    assert math.isnan(check_signals(reply(content_of(signals=[math.nan] * 5)), codec, SCORES)["score-a"][0])


def test_signals_that_nobody_asked_for_are_left_alone(codec):
    update = check_update(reply(content_of(signals=np.zeros(10_000))), "a", codec, BASE, NOTHING)
    assert update.signals == {}


@pytest.mark.parametrize(
    ("signals", "reason"), [(None, "'signals', got: none"), ([1, 2, 3], "shape"), ([1] * 6, "shape")]
)
def test_signals_that_are_missing_or_of_another_size_are_refused(codec, signals, reason):
    with pytest.raises(MessageError, match=reason):
        check_update(reply(content_of(signals=signals)), "a", codec, BASE, SCORES)


def moments(**found):
    layout = signal_layout(MOMENTS, LAYOUT)
    values = torch.ones(layout.size)
    for key, view in layout.views(values).items():
        view.copy_(torch.as_tensor(found.get(key.replace("-", "_"), 1.0)))
    return reply(content_of(signals=values.numpy()))


def test_good_moments_are_taken_as_they_are(codec):
    found = check_moments(moments(class_count=[0.0, 5.0, 1e6], class_mean=-2.0), codec, "", MOMENTS)
    assert found["class-count"].tolist() == [0.0, 5.0, 1e6]
    assert set(found["class-mean"].flatten().tolist()) == {-2.0}
    assert found["class-variances"].shape == (3, 4)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"class_mean": math.nan}, "its class-mean is not finite"),
        ({"class_variances": math.inf}, "its class-variances is not finite"),
        ({"class_count": math.nan}, "its class-count is not finite"),
        ({"class_count": [1.0, -1.0, 1.0]}, "not whole numbers"),
        ({"class_count": [1.0, 1.5, 1.0]}, "not whole numbers"),
        ({"class_count": 2.0 * MAX_EXAMPLES}, "not whole numbers"),
    ],
)
def test_bad_moments_are_refused_with_the_reason(codec, found, reason):
    with pytest.raises(MessageError, match=reason):
        check_moments(moments(**found), codec, "", MOMENTS)


def test_moments_of_another_base_model_are_refused(codec):
    with pytest.raises(MessageError, match="its frozen backbone has hash"):
        check_moments(moments(), codec, "cd" * 32, MOMENTS)


def evaluation(prefix="", **metrics):
    found = {"accuracy": 0.25, "loss": 2.0, "num-examples": 8} | metrics
    return reply(RecordDict({METRICS: MetricRecord({f"{prefix}{key}": value for key, value in found.items()})}))


@pytest.mark.parametrize("prefix", ["", "test-"])
@pytest.mark.parametrize("accuracy", [0, 1, 0.25])
def test_an_evaluation_is_read_under_its_prefix(prefix, accuracy):
    found = check_evaluation(evaluation(prefix, accuracy=accuracy), "a", prefix)
    assert (found.client, found.num_examples, found.accuracy, found.loss) == ("a", 8, accuracy, 2.0)
    with pytest.raises(MessageError, match="accuracy"):
        check_evaluation(evaluation(prefix), "a", "other-")


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"accuracy": 1.01}, r"its accuracy is 1.01, outside \[0, 1\]"),
        ({"accuracy": -0.1}, "outside"),
        ({"accuracy": math.nan}, "'accuracy' is nan, not a finite number"),
        ({"loss": math.inf}, "'loss' is inf, not a finite number"),
        ({"num-examples": 0}, "'num-examples' is 0"),
    ],
)
def test_a_bad_evaluation_is_refused_with_the_reason(metrics, reason):
    with pytest.raises(MessageError, match=reason):
        check_evaluation(evaluation(**metrics), "a")


def test_all_checks_are_tried_and_earlier_failures_kept():
    answered = {str(i): evaluation(accuracy=i / 2) for i in range(4)}
    found = check_all(answered, {"9": "late"}, check_evaluation)
    assert [result.client for result in found.good] == ["0", "1", "2"]
    assert list(found.dropped) == ["9", "3"]
    assert "1.5, outside" in found.dropped["3"]


def update(num_examples, **metrics):
    return Update("a", torch.empty(0), num_examples, MetricRecord(metrics), ConfigRecord())


def test_a_metric_is_averaged_by_examples_over_those_that_have_it():
    updates = [update(1, loss=4.0), update(3, loss=8), update(50), update(60, loss=math.nan), update(70, loss=[1.0])]
    assert mean_metric(updates, "loss") == (4 + 3 * 8) / 4
    assert mean_metric(updates, "other") is None
    assert mean_metric([], "loss") is None
