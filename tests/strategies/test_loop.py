"""The rounds: what comes after what, what is timed and counted, when a run waits and when it stops."""

import threading
import time

import numpy as np
import pytest
from flwr.app import MetricRecord, RecordDict

from strategies import Calibration, CalibrationConfig, FedAvg, FedAvgConfig, TaskContext, loop
from task.arrays import FLAT, array_to_flat
from task.errors import ConfigError, TooFewClientsError
from task.messages import ARRAYS, CONFIG, METRICS
from task.signals import SignalRequest, signal_layout
from tests.strategies.scripted import (
    BASE,
    CLASSES,
    LAYOUT,
    Script,
    ShufflingGrid,
    final_flat,
    initial_arrays,
    make_strategy,
    scripted_app,
    scripted_signals,
)

NAMES = ["0", "1", "2"]
SOME_SECONDS = 0.03


def start(script=None, rounds=1, strategy=None, grid=None, evaluate_fn=None, timeout=3600, **options):
    strategy = strategy or make_strategy("fedavg", **options)
    grid, reports = grid or ShufflingGrid(scripted_app(script or Script()), NAMES), []
    result = strategy.start(
        grid,
        initial_arrays(),
        num_rounds=rounds,
        timeout=timeout,
        evaluate_fn=evaluate_fn,
        on_round=reports.append,
    )
    return result, reports


def calibrating(**options):
    context = TaskContext("{}", LAYOUT, BASE, CLASSES, 0)
    return FedAvg(FedAvgConfig(name="fedavg", **options), context, Calibration(CalibrationConfig(name="ccvr")))


class TellingGrid(ShufflingGrid):
    """Tells of every kind of message, in order, and of the seconds it waits for the replies."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.told, self.timeouts = [], []

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.told.append(messages[0].metadata.message_type)
        self.timeouts.append(timeout)
        return super().send_and_receive(messages, timeout=timeout)


def test_a_round_trains_calibrates_evaluates_and_reports():
    grid = TellingGrid(scripted_app(Script()), NAMES)

    def evaluate(server_round, arrays):
        grid.told.append(f"central {server_round}")
        return MetricRecord({"accuracy": 0.5, "loss": 1.0})

    calibrating().start(
        grid,
        initial_arrays(),
        num_rounds=2,
        evaluate_fn=evaluate,
        on_round=lambda report: grid.told.append(f"report {report.server_round}"),
    )
    assert [word for word in grid.told if word != "evaluate"] == [
        *["query.identify", "central 0", "report 0"],
        *["train", "central 1", "report 1"],
        *["train", "query.measure", "central 2", "report 2"],
    ]
    before = [grid.told[:place] for place, word in enumerate(grid.told) if word == "evaluate"]
    counted = [[told.count(word) for word in ("train", "query.measure", "report 1", "report 2")] for told in before]
    assert counted == [[1, 0, 0, 0], [2, 1, 1, 0]]


def test_the_server_evaluates_while_the_clients_do_and_both_count():
    both = threading.Barrier(2, timeout=30)

    class MeetingGrid(TellingGrid):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            if messages[0].metadata.message_type == "evaluate":
                both.wait()
            return super().send_and_receive(messages, timeout=timeout)

    def evaluate(server_round, arrays):
        if server_round:
            both.wait()
        return MetricRecord({"accuracy": 0.5, "loss": 1.0})

    _, reports = start(rounds=2, grid=MeetingGrid(scripted_app(Script()), NAMES), evaluate_fn=evaluate)
    assert [(report.central["accuracy"], len(report.clients_accuracy)) for report in reports[1:]] == [(0.5, 3)] * 2


def test_an_evaluation_on_the_server_that_fails_ends_the_run():
    def evaluate(server_round, arrays):
        if server_round:
            raise ConfigError("No image could be read.")
        return None

    with pytest.raises(ConfigError, match="No image"):
        start(evaluate_fn=evaluate)


def test_the_time_limit_of_a_phase_is_that_of_the_run_and_of_a_question_no_more_than_some_minutes():
    for timeout, asked in ((5.0, 5.0), (1e5, loop.MAX_QUERY_SECONDS)):
        grid = TellingGrid(scripted_app(Script()), NAMES)
        start(grid=grid, timeout=timeout)
        assert dict(zip(grid.told, grid.timeouts, strict=True)) == {
            "query.identify": asked,
            "train": timeout,
            "evaluate": timeout,
        }


def test_the_server_evaluates_the_initial_model_and_every_merged_one():
    seen = []

    def evaluate(server_round, arrays):
        seen.append(array_to_flat(arrays[FLAT], LAYOUT.size)[0])
        return MetricRecord({"accuracy": server_round / 10, "loss": 1.0, "by-class": [0.25, 0.75]})

    result, reports = start(rounds=2, evaluate_fn=evaluate)
    step = np.array([10, 20, 30]) @ [1, 2, 3] / 60
    assert seen == pytest.approx([-1, -1 + step, -1 + 2 * step], rel=1e-5)
    assert [report.central for report in reports] == [{"accuracy": n / 10, "loss": 1.0} for n in range(3)]
    assert [result.evaluate_metrics_serverapp[n]["by-class"] for n in range(3)] == [[0.25, 0.75]] * 3


def test_an_evaluation_without_outcome_is_none():
    result, reports = start(evaluate_fn=lambda server_round, arrays: None)
    assert [report.central for report in reports] == [{}, {}]
    assert dict(result.evaluate_metrics_serverapp) == {}


def test_metrics_of_training_are_in_the_result():
    def edit(name, server_round, content):
        content[METRICS]["train-loss"] = float(name)
        return content

    result, reports = start(Script(edit=edit), rounds=2)
    expected = {"num-examples": 60, "train-loss": pytest.approx(80 / 60)}
    assert {n: dict(record) for n, record in result.train_metrics_clientapp.items()} == {1: expected, 2: expected}
    assert [report.train_loss for report in reports] == [None, expected["train-loss"], expected["train-loss"]]


def sleeping(kind):
    """Every client takes its time over one kind of message."""

    def edit(name, server_round, content):
        found = "train" if METRICS in content else "measure"
        time.sleep(SOME_SECONDS if found == kind else 0)
        return content

    return Script(edit=edit)


def test_the_seconds_of_every_step_are_told_apart():
    def evaluate(server_round, arrays):
        time.sleep(SOME_SECONDS)
        return MetricRecord({"accuracy": 0.5, "loss": 1.0})

    _, reports = start(sleeping("measure"), rounds=2, strategy=calibrating(), evaluate_fn=evaluate)
    first, second, third = (report.seconds for report in reports)
    assert set(first) == {"evaluate", "total"}
    assert set(second) == {"train", "wait", "steps", "aggregate", "evaluate", "total", "keep"}
    assert set(third) == set(second) | {"calibrate"}
    assert third["calibrate"] >= 3 * SOME_SECONDS
    for seconds in (first, second, third):
        assert seconds["evaluate"] >= SOME_SECONDS
        parts = sum(value for key, value in seconds.items() if key not in ("total", "wait", "steps", "keep"))
        assert parts <= seconds["total"] + 1e-3


def test_what_keeping_a_round_takes_is_told_with_the_next():
    reports = []

    def keep(report):
        time.sleep(SOME_SECONDS)
        reports.append(report)

    make_strategy("fedavg").start(
        ShufflingGrid(scripted_app(Script()), NAMES), initial_arrays(), num_rounds=2, on_round=keep
    )
    assert "keep" not in reports[0].seconds
    assert all(report.seconds["keep"] >= SOME_SECONDS for report in reports[1:])


def test_the_steps_are_those_of_the_busiest_worker():
    def edit(name, server_round, content):
        time.sleep(SOME_SECONDS)
        content[METRICS]["train-seconds"] = SOME_SECONDS / 2
        content[CONFIG]["worker"] = name
        return content

    assert start(Script(edit=edit))[1][1].seconds["steps"] == SOME_SECONDS / 2


def test_what_does_not_happen_takes_no_time():
    _, reports = start(evaluate_clients="off")
    assert set(reports[0].seconds) == {"total"}
    assert set(reports[1].seconds) == {"train", "wait", "steps", "aggregate", "total", "keep"}


def busy(seconds, worker=lambda name: name):
    def edit(name, server_round, content):
        time.sleep(SOME_SECONDS)
        content[METRICS]["seconds"] = seconds
        content[CONFIG]["worker"] = worker(name)
        return content

    return Script(edit=edit)


def test_what_the_busiest_worker_does_not_account_for_is_waiting():
    """The clients' turns of some seconds each, one after the other, are the train phase."""
    idle, each, all_of_it = (
        start(busy(*arguments))[1][1].seconds
        for arguments in ((0.0,), (SOME_SECONDS,), (SOME_SECONDS, lambda name: "the only one"))
    )
    assert idle["wait"] == idle["train"] >= 3 * SOME_SECONDS
    assert each["wait"] == pytest.approx(each["train"] - SOME_SECONDS, abs=1e-3)
    assert all_of_it["wait"] == pytest.approx(all_of_it["train"] - 3 * SOME_SECONDS, abs=1e-3)


@pytest.mark.parametrize("seconds", [1e6, float("inf"), float("nan"), [1.0, 2.0]])
def test_seconds_that_cannot_be_true_leave_a_wait_that_can(seconds):
    wait = start(busy(seconds))[1][1].seconds["wait"]
    assert 0.0 <= wait < 10.0


def test_signals_are_counted_in_the_bytes_and_belong_to_no_unit():
    (_, plain), (_, livar) = start(), start(strategy=make_strategy("livar"))
    request = SignalRequest(class_variance=True, update_scores=True)
    floats = signal_layout(request, LAYOUT).size
    more = livar[1].bytes_up - plain[1].bytes_up
    header = len(scripted_signals("0", Asked(request))[FLAT].data) - 4 * floats
    assert 0 < header < 200
    assert more == len(NAMES) * (4 * floats + header)
    assert livar[1].bytes_up_by_unit == plain[1].bytes_up_by_unit
    assert livar[1].bytes_down_by_unit == plain[1].bytes_down_by_unit


class Asked:
    """As much of an instruction as the scripted signals need."""

    server_round = 1

    def __init__(self, signals):
        self.signals = signals


def failing_in(*rounds):
    return Script(edit=lambda name, n, content: RecordDict() if n in rounds else content)


def test_a_failed_round_leaves_the_result_without_metrics_of_it():
    result, reports = start(failing_in(2), rounds=3)
    assert [report.merged for report in reports] == [False, True, False, True]
    assert sorted(result.train_metrics_clientapp) == [1, 3]
    expected, _ = start(rounds=2)
    np.testing.assert_array_equal(final_flat(result.arrays), final_flat(expected.arrays))


def test_failed_rounds_count_only_in_a_row():
    _, reports = start(failing_in(1, 2, 4, 5), rounds=6, max_failed_rounds=3)
    assert [report.merged for report in reports] == [False, False, False, True, False, False, True]
    reports = []
    with pytest.raises(TooFewClientsError, match=r"3 successive round\(s\) up to round 4 .*strategy.min_clients=2"):
        make_strategy("fedavg").start(
            ShufflingGrid(scripted_app(failing_in(2, 3, 4)), NAMES),
            initial_arrays(),
            num_rounds=6,
            on_round=reports.append,
        )
    assert [report.server_round for report in reports] == [0, 1, 2, 3, 4]


def test_a_run_that_never_merged_is_no_success_however_short():
    with pytest.raises(
        TooFewClientsError, match="Replies that did not count: 3 clients .0, 1, 2.: the reply has 0 array records"
    ):
        start(failing_in(1, 2), rounds=2)
    _, reports = start(failing_in(2), rounds=2)
    assert [report.merged for report in reports] == [False, True, False]


class JoiningGrid(ShufflingGrid):
    """One more node each time somebody looks; ``gone`` of them leave at a look."""

    def __init__(self, *arguments, gone_at=None):
        super().__init__(*arguments)
        self.looks, self.gone_at = 0, gone_at

    def get_node_ids(self):
        self.looks += 1
        nodes = list(self.contexts)[: self.looks]
        return nodes[1:] if self.gone_at is not None and self.looks >= self.gone_at else nodes


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(loop, "NODE_POLL_SECONDS", 0.001)


@pytest.mark.parametrize(("options", "names"), [({}, ["0", "1"]), ({"min_available_clients": 3}, NAMES)])
def test_a_run_waits_for_its_clients(impatient, options, names):
    grid = JoiningGrid(scripted_app(Script()), NAMES)
    strategy = make_strategy("fedavg", **options)
    there = []
    strategy.start(
        grid, initial_arrays(), num_rounds=1, on_round=lambda report: there.append(strategy.directory.identities)
    )
    assert there[0] == names
    assert there[1] == NAMES


def test_waiting_is_said_now_and_then(impatient, monkeypatch, caplog):
    caplog.set_level("INFO", logger="flwr")
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_NOTES", 0.0)
    start(grid=JoiningGrid(scripted_app(Script()), NAMES), min_available_clients=3)
    said = [line for line in caplog.messages if line.startswith("Waiting for clients")]
    assert said == ["Waiting for clients: 1 of 3 are here.", "Waiting for clients: 2 of 3 are here."]


def test_a_run_gives_up_waiting_and_says_what_it_needs(impatient):
    with pytest.raises(TooFewClientsError, match=r"^3 client\(s\) can take part, 4 are needed .*Refused: none"):
        start(min_available_clients=4, wait_for_clients=0.02)


def test_a_client_that_left_is_asked_no_more(impatient):
    grid = JoiningGrid(scripted_app(Script()), NAMES, gone_at=5)
    _, reports = start(grid=grid, rounds=3)
    assert [report.clients_used for report in reports[1:]] == [NAMES, NAMES, ["1", "2"]]
    assert reports[3].clients_dropped == {}


def test_the_strategy_knows_its_round_and_the_last_one():
    strategy, known = make_strategy("fedavg"), []
    strategy.start(
        ShufflingGrid(scripted_app(Script()), NAMES),
        initial_arrays(),
        num_rounds=2,
        on_round=lambda report: known.append((strategy.server_round, strategy.num_rounds, strategy.merged_rounds)),
    )
    assert known == [(0, 2, 0), (1, 2, 1), (2, 2, 2)]


def test_only_messages_with_the_model_are_counted_by_unit():
    _, reports = start()
    assert set(reports[0].bytes_down_by_unit.values()) <= {0}
    assert reports[0].bytes_down > 0 < reports[0].bytes_up

    def edit(name, server_round, content):
        if name == "1":
            del content[ARRAYS]
        return content

    _, reports = start(Script(edit=edit))
    assert sum(reports[1].bytes_up_by_unit.values()) == 2 * 4 * LAYOUT.size


class ArrivingGrid(ShufflingGrid):
    """Shows half of its nodes at the first look, and all from then on."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.looks = 0

    def get_node_ids(self):
        self.looks += 1
        nodes = list(super().get_node_ids())
        return nodes if self.looks > 1 else nodes[: len(nodes) // 2]


def test_every_client_s_partition_is_named_once_whenever_it_came(monkeypatch):
    monkeypatch.setattr(loop, "NODE_POLL_SECONDS", 0.01)
    script = Script(share=lambda name: f"partition {name} of 4")
    grid = ArrivingGrid(scripted_app(script), ["0", "1", "2", "3"])
    _, reports = start(rounds=2, grid=grid, min_available_clients=4)
    assert [set(report.clients_partition) for report in reports] == [{"0", "1", "2", "3"}, set(), set()]


def test_a_client_that_comes_back_with_other_images_is_refused_and_the_others_go_on():
    script, reports = Script(share=lambda name: f"partition {name} of 4"), []
    first, again = make_strategy("fedavg"), make_strategy("fedavg")
    start(script, rounds=1, strategy=first)
    script.share = lambda name: "partition 3 of 4" if name == "0" else f"partition {name} of 4"
    grid = ShufflingGrid(scripted_app(script), NAMES)
    again.start(grid, initial_arrays(), num_rounds=2, on_round=reports.append, state=first.state_dict())
    refused = "it has partition 3 of 4, but had partition 0 of 4 in this run's earlier rounds; start it as then"
    assert [report.clients_refused for report in reports] == [{"0": refused}]
    assert reports[0].clients_used == ["1", "2"]


def test_a_run_none_of_whose_clients_is_as_it_was_does_not_go_on_with_new_ones():
    script = Script(share=lambda name: f"partition {name} of 3")
    first, again = make_strategy("fedavg"), make_strategy("fedavg")
    start(script, rounds=1, strategy=first)
    script.share = lambda name: f"partition {name} of 6"
    grid = ShufflingGrid(scripted_app(script), [str(number) for number in range(6)])
    sentence = "3 clients .0, 1, 2.: the images are shared by 6 clients, but by 3 in this run's earlier rounds"
    with pytest.raises(TooFewClientsError, match=sentence):
        again.start(grid, initial_arrays(), num_rounds=2, state=first.state_dict())


def test_a_run_that_goes_on_names_those_who_came_meanwhile():
    script, reports = Script(share=lambda name: f"partition {name} of 4"), []
    first, again = make_strategy("fedavg"), make_strategy("fedavg")
    start(script, rounds=1, strategy=first)
    grid = ShufflingGrid(scripted_app(script), [*NAMES, "3"])
    again.start(grid, initial_arrays(), num_rounds=3, on_round=reports.append, state=first.state_dict())
    assert [set(report.clients_partition) for report in reports] == [{"3"}, set()]
