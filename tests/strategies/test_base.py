import re

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from strategies import FedAvg, FedAvgConfig
from task.arrays import FLAT, flat_to_array
from task.errors import MessageError, TooFewClientsError
from task.messages import ARRAYS, CONFIG, METRICS, content_bytes
from task.units import make_layout
from tests.strategies.scripted import (
    CLASSES,
    LAYOUT,
    Script,
    ShufflingGrid,
    final_flat,
    initial_arrays,
    make_strategy,
    scripted_app,
)
from tools.debug import InProcessGrid

NAMES = ["0", "1", "2", "3"]


def start(script=None, clients=NAMES, rounds=1, strategy=None, **options):
    strategy = strategy or make_strategy("fedavg", **options)
    reports = []
    grid = ShufflingGrid(scripted_app(script or Script()), clients)
    result = strategy.start(grid, initial_arrays(), num_rounds=rounds, on_round=reports.append)
    return result, reports


def test_fedavg_weighs_by_examples():
    result, _ = start()
    weights = np.array([10, 20, 30, 40]) / 100
    expected = final_flat(initial_arrays()) + (weights * [1, 2, 3, 4]).sum()
    np.testing.assert_allclose(final_flat(result.arrays), expected, rtol=1e-6)


def test_fedprox_asks_clients_for_the_proximal_term_and_fedavg_does_not():
    for name, options, mu in [("fedprox", {"proximal_mu": 0.5}, 0.5), ("fedavg", {}, 0.0)]:
        script = Script()
        start(script, strategy=make_strategy(name, **options))
        assert {instruction.proximal_mu for _, instruction, _ in script.heard} == {mu}


def spoil(client, change):
    def edit(name, server_round, content):
        if name == client:
            change(content)
        return content

    return Script(edit=edit)


def set_array(values):
    def change(content):
        content[ARRAYS] = ArrayRecord({FLAT: values})

    return change


def set_metric(key, value):
    def change(content):
        content[METRICS][key] = value

    return change


def drop(key):
    def change(content):
        del content[key]

    return change


BAD_REPLIES = {
    "shape": (set_array(flat_to_array(np.zeros(LAYOUT.size - 1, np.float32))), "shape"),
    "oversized": (set_array(flat_to_array(np.zeros(10 * LAYOUT.size, np.float32))), "shape"),
    "dtype": (set_array(Array(np.zeros(LAYOUT.size, np.float64))), "dtype float64"),
    "lying header": (
        set_array(Array("float32", (LAYOUT.size,), "numpy.ndarray", flat_to_array(np.zeros(2, np.float32)).data)),
        "shape",
    ),
    "garbage": (set_array(Array("float32", (LAYOUT.size,), "numpy.ndarray", b"garbage")), "header|format"),
    "no array": (drop(ARRAYS), "0 array records"),
    "no metrics": (drop(METRICS), "metric record"),
    "no config": (drop(CONFIG), "config"),
    "no examples": (set_metric("num-examples", 0), "num-examples"),
    "negative examples": (set_metric("num-examples", -4), "num-examples"),
    "absurd examples": (set_metric("num-examples", 10**15), "num-examples"),
    "nan examples": (set_metric("num-examples", float("nan")), "num-examples"),
}


@pytest.mark.parametrize("kind", BAD_REPLIES)
def test_a_bad_reply_is_dropped_by_name_and_the_round_goes_on(kind):
    change, reason = BAD_REPLIES[kind]
    result, reports = start(spoil("1", change))
    expected, _ = start(clients=["0", "2", "3"])
    assert list(reports[1].clients_dropped) == ["1"]
    assert re.search(reason, reports[1].clients_dropped["1"])
    np.testing.assert_array_equal(final_flat(result.arrays), final_flat(expected.arrays))


def test_an_exception_in_a_client_is_dropped_with_its_text():
    def values(name, server_round, received):
        if name == "3":
            raise RuntimeError("no disk left")
        return received

    _, reports = start(Script(values=values))
    assert "no disk left" in reports[1].clients_dropped["3"]
    assert reports[1].clients_used == ["0", "1", "2"]


def test_a_client_with_another_base_model_is_refused_by_name():
    strategy = make_strategy("fedavg")
    _, reports = start(Script(base=lambda name: "cd" * 32 if name == "2" else "ab" * 32), strategy=strategy)
    assert reports[1].clients_used == ["0", "1", "3"]
    assert list(reports[1].clients_refused) == ["2"]
    assert "same backbone" in reports[1].clients_refused["2"]


def test_a_base_model_that_changes_after_the_start_is_dropped():
    answers = iter(["ab" * 32] * len(NAMES))
    _, reports = start(Script(base=lambda name: next(answers, "cd" * 32 if name == "0" else "ab" * 32)))
    assert "hash cdcd" in reports[1].clients_dropped["0"]


def test_two_nodes_of_the_same_name_are_told_apart():
    strategy = make_strategy("fedavg")
    _, reports = start(clients=["0", "1", "1"], strategy=strategy)
    assert reports[1].clients_used == ["0", "1"]
    assert "has the name '1' already" in reports[1].clients_refused["1"]


def test_two_nodes_with_the_same_images_are_told_apart():
    script = Script(share=lambda name: "partition 1 of 4" if name in ("1", "3") else f"partition {name} of 4")
    _, reports = start(script)
    assert reports[1].clients_used == ["0", "1", "2"]
    assert "client 1 has partition 1 of 4 already" in reports[1].clients_refused["3"]
    assert reports[0].clients_partition == {name: f"partition {name} of 4" for name in ("0", "1", "2")}
    assert not reports[1].clients_partition, "what was said is not said again in every round"


def test_a_node_that_comes_back_as_another_is_welcome_once_the_old_one_has_left():
    strategy, reports = make_strategy("fedavg"), []

    class ReturningGrid(ShufflingGrid):
        def get_node_ids(self):
            number = strategy.server_round
            return {0: [1, 2, 3], 1: [1, 2, 3], 2: [1, 2, 3, 4], 3: [1, 2, 4]}[min(number, 3)]

    grid = ReturningGrid(scripted_app(Script()), ["0", "1", "2", "2"])
    strategy.start(grid, initial_arrays(), num_rounds=4, on_round=reports.append)
    assert [report.clients_used for report in reports[1:]] == [["0", "1", "2"]] * 4
    assert "has the name '2' already" in reports[2].clients_refused["2"]
    assert reports[4].clients_refused == {}
    assert strategy.directory.nodes["2"] == 4


def test_clients_also_evaluate_what_a_round_of_their_own_makes_of_the_model():
    _, reports = start(evaluate_tuned=True)
    assert reports[1].tuned_accuracy == {name: (int(name) + 1) / 50 for name in NAMES}
    assert reports[1].tuned_accuracy_mean == pytest.approx(0.05)
    assert reports[1].tuned_accuracy_worst == 0.02
    assert reports[1].tuned_accuracy_deviation == pytest.approx(np.std([0.02, 0.04, 0.06, 0.08]))
    assert reports[1].clients_accuracy_worst == 0.01
    assert reports[1].clients_accuracy_deviation == pytest.approx(np.std([0.01, 0.02, 0.03, 0.04]))
    _, without = start()
    assert without[1].tuned_accuracy == {}


@pytest.mark.parametrize("name", ["", "x" * 65, "line\nbreak"])
def test_a_name_that_is_none_is_refused(name):
    script = Script(num_examples=lambda name: 1, values=lambda name, server_round, received: received)
    strategy = make_strategy("fedavg")
    _, reports = start(script, clients=["0", "1", name], strategy=strategy)
    assert reports[1].clients_used == ["0", "1"]
    assert len(strategy.directory.refused) == 1


def test_a_loss_that_is_no_number_is_left_out_of_the_mean():
    _, reports = start(spoil("1", set_metric("train-loss", float("nan"))))
    assert reports[1].train_loss == 1.0
    assert reports[1].clients_used == NAMES


def test_too_few_clients_stop_the_run_at_once():
    script = Script(base=lambda name: "ab" * 32 if name == "0" else "cd" * 32)
    with pytest.raises(
        TooFewClientsError, match=r"1 client\(s\) can take part, 3 are needed.*3 clients \(1, 2, 3\): its"
    ):
        start(script, min_clients=3, wait_for_clients=0.1)


def test_all_clients_refused_stop_the_run_without_waiting():
    with pytest.raises(TooFewClientsError, match=r"4 clients \(0, 1, 2, 3\): its class names"):
        start(Script(classes=lambda name: "34" * 32))


def test_a_client_with_other_classes_or_another_layout_is_refused():
    _, reports = start(Script(classes=lambda name: "34" * 32 if name == "1" else CLASSES))
    assert "dataset.classes" in reports[1].clients_refused["1"]
    other = make_layout({"head.weight": (2, 4), "head.bias": (2,)})
    with pytest.raises(TooFewClientsError, match="another layout"):
        start(Script(layout=other))


def test_a_client_that_is_slow_to_start_is_asked_again():
    asked = []

    def silent(name):
        asked.append(name)
        return name == "2" and asked.count("2") < 3

    _, reports = start(Script(silent=silent), rounds=3)
    assert [report.clients_used for report in reports[1:]] == [["0", "1", "3"], NAMES, NAMES]
    assert asked.count("0") == 1


def test_a_client_that_never_says_who_it_is_is_refused_in_the_end():
    _, reports = start(Script(silent=lambda name: name == "2"), rounds=4)
    assert reports[1].clients_refused == {}
    assert "did not say who it is" in next(iter(reports[-1].clients_refused.values()))
    assert reports[-1].clients_used == ["0", "1", "3"]


class ChattyGrid(ShufflingGrid):
    """Every reply to a train message comes twice."""

    def pull_messages(self, message_ids):
        return [copy for reply in super().pull_messages(message_ids) for copy in [reply, reply]]


def test_a_second_reply_does_not_count():
    reports = []
    grid = ChattyGrid(scripted_app(Script()), NAMES)
    result = make_strategy("fedavg").start(grid, initial_arrays(), num_rounds=1, on_round=reports.append)
    expected, _ = start()
    np.testing.assert_array_equal(final_flat(result.arrays), final_flat(expected.arrays))
    assert reports[1].clients_used == NAMES


class SlowGrid(ShufflingGrid):
    """Client 2 never answers a train message in time."""

    def pull_messages(self, message_ids):
        slow = next(node for node, context in self.contexts.items() if context.node_config["name"] == "2")
        replies = list(super().pull_messages(message_ids))
        return [r for r in replies if r.metadata.message_type != "train" or r.metadata.src_node_id != slow]


def test_a_client_that_is_late_is_named():
    reports = []
    make_strategy("fedavg").start(
        SlowGrid(scripted_app(Script()), NAMES), initial_arrays(), num_rounds=1, on_round=reports.append
    )
    assert reports[1].clients_dropped == {"2": "no reply within the timeout"}


def test_bytes_are_those_of_the_messages():
    class CountingGrid(ShufflingGrid):
        down = up = 0

        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            replies = list(super().send_and_receive(messages, timeout=timeout))
            self.down += sum(content_bytes(m.content) for m in messages)
            self.up += sum(content_bytes(r.content) for r in replies)
            return replies

    grid, reports = CountingGrid(scripted_app(Script()), NAMES), []
    make_strategy("fedavg").start(grid, initial_arrays(), num_rounds=2, on_round=reports.append)
    assert sum(report.bytes_down for report in reports) == grid.down
    assert sum(report.bytes_up for report in reports) == grid.up
    assert reports[1].bytes_down > 2 * len(NAMES) * 4 * LAYOUT.size
    assert sum(reports[1].bytes_down_by_unit.values()) == 2 * len(NAMES) * 4 * LAYOUT.size
    assert sum(reports[1].bytes_up_by_unit.values()) == len(NAMES) * 4 * LAYOUT.size
    assert tuple(reports[1].bytes_up_by_unit) == LAYOUT.units


def test_the_shared_array_is_serialised_once():
    contents = []

    class SpyGrid(ShufflingGrid):
        def push_messages(self, messages):
            messages = list(messages)
            contents.extend(m.content for m in messages if m.metadata.message_type == "train")
            return super().push_messages(messages)

    make_strategy("fedavg").start(SpyGrid(scripted_app(Script()), NAMES), initial_arrays(), num_rounds=1)
    assert len({id(content[ARRAYS][FLAT]) for content in contents}) == 1


def test_each_client_can_be_sent_its_own_content():
    class Own(FedAvg):
        def models_for(self, clients):
            return (torch.full((LAYOUT.size,), float(client)) for client in clients)

    own, script = Own(FedAvgConfig(), make_strategy("fedavg").context), Script()
    start(script, strategy=own)
    assert {(name, float(received[0])) for name, _, received in script.heard} == {(n, float(n)) for n in NAMES}


@pytest.mark.parametrize(("mode", "rounds_evaluated"), [("phase", [None, 1, 2, 3]), ("off", [None] * 4)])
def test_clients_evaluate_as_configured(mode, rounds_evaluated):
    _, reports = start(rounds=3, evaluate_clients=mode)
    assert [report.clients_evaluated_round for report in reports] == rounds_evaluated
    if mode == "phase":
        assert reports[1].clients_accuracy == {"0": 0.01, "1": 0.02, "2": 0.03, "3": 0.04}
        assert reports[1].clients_accuracy_mean == pytest.approx(0.025)


def test_evaluation_that_comes_with_training_is_of_the_received_model():
    _, reports = start(rounds=3, evaluate_clients="train")
    assert [report.clients_evaluated_round for report in reports] == [None, 0, 1, 3]
    assert reports[1].clients_accuracy == dict.fromkeys(NAMES, 0.0)
    assert reports[2].clients_accuracy_mean == pytest.approx(0.3)


def test_a_bad_evaluation_that_comes_with_training_is_named_and_the_update_counts():
    script = spoil("1", set_metric("test-accuracy", float("nan")))
    _, reports = start(script, evaluate_clients="train", rounds=2)
    assert reports[1].clients_used == NAMES
    assert reports[1].clients_dropped["1"].startswith("evaluation: ")
    assert list(reports[1].clients_accuracy) == ["0", "2", "3"]


def test_evaluation_can_come_every_n_rounds_and_after_the_last():
    called = []

    def evaluate(server_round, arrays):
        called.append(server_round)
        return MetricRecord({"accuracy": 0.5, "loss": 1.0})

    grid = ShufflingGrid(scripted_app(Script()), NAMES)
    reports = []
    strategy = make_strategy("fedavg", evaluate_every=2)
    strategy.start(grid, initial_arrays(), num_rounds=5, evaluate_fn=evaluate, on_round=reports.append)
    assert called == [0, 2, 4, 5]
    assert [r.clients_evaluated_round for r in reports] == [None, None, 2, None, 4, 5]
    assert reports[1].central == {}
    assert reports[2].central == {"accuracy": 0.5, "loss": 1.0}


def ordinary_app() -> ClientApp:
    """An app of another make: named arrays, its own record names, no query handler."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        weights = next(iter(message.content.array_records.values()))
        changed = ArrayRecord({name: Array(array.numpy() + 1.0) for name, array in weights.items()})
        content = RecordDict({"arrays": changed, "metrics": MetricRecord({"num-examples": 3})})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(
            RecordDict({"m": MetricRecord({"num-examples": 3, "accuracy": 0.5, "loss": 1.0})}), reply_to=message
        )

    return app


def test_works_in_a_flower_app_of_another_make():
    arrays = ArrayRecord({"w": Array(np.zeros((2, 3), np.float32)), "b": Array(np.ones(3, np.float32))})
    result = FedAvg().start(InProcessGrid(ordinary_app(), [{}, {}]), arrays, num_rounds=2)
    np.testing.assert_allclose(result.arrays["w"].numpy(), np.full((2, 3), 2.0), rtol=1e-6)
    np.testing.assert_allclose(result.arrays["b"].numpy(), np.full(3, 3.0), rtol=1e-6)
    assert list(result.arrays) == ["w", "b"]
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == 0.5


def test_arrays_that_are_not_float32_are_refused_at_the_start():
    arrays = ArrayRecord({"steps": Array(np.zeros(3, np.int64))})
    with pytest.raises(MessageError, match="'steps': .* int64"):
        FedAvg().start(InProcessGrid(ordinary_app(), [{}, {}]), arrays)


def test_extra_train_config_reaches_the_clients():
    seen = []

    def edit(name, server_round, content):
        return content

    script = Script(edit=edit)
    app = scripted_app(script)

    class SpyGrid(ShufflingGrid):
        def push_messages(self, messages):
            messages = list(messages)
            seen.extend(m.content[CONFIG].get("flavour") for m in messages if m.metadata.message_type == "train")
            return super().push_messages(messages)

    config = ConfigRecord({"flavour": "rose"})
    make_strategy("fedavg").start(SpyGrid(app, NAMES), initial_arrays(), num_rounds=1, train_config=config)
    assert seen == ["rose"] * len(NAMES)


def test_a_merged_model_that_is_not_finite_leaves_the_model_as_it_was():
    class Overflowing(FedAvg):
        def merge(self, server_round, updates):
            return super().merge(server_round, updates) * (3e38 if server_round == 1 else 1)

    strategy = Overflowing(FedAvgConfig(), make_strategy("fedavg").context)
    _, reports = start(strategy=strategy, rounds=2)
    assert [report.merged for report in reports] == [False, False, True]
    np.testing.assert_allclose(strategy.flat, final_flat(initial_arrays()) + 3, rtol=1e-6)
