"""Real rounds under SecAgg+: the server sees the sum alone, and clients that fail in any stage end no round."""

import numpy as np
import pytest
import torch
from flwr.common import bytes_to_ndarray, ndarray_to_bytes
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage

from client_app.app import app as client_app
from task.errors import TooFewClientsError
from task.messages import IDENTIFY
from tests.server_app.test_app import DIGITS, reports, run
from tests.server_app.test_privacy import values
from tools.debug import InProcessGrid, simulated_nodes

ONE_ROUND = [
    *DIGITS,
    "num_server_rounds=1",
    "partition=dirichlet",
    "strategy.evaluate_clients=off",
    "round_timeout=0.2",
]
STAGES = [Stage.SETUP, Stage.SHARE_KEYS, Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK]
FAULTY = 2
"""Node id of the client that fails, whose name is 1."""


class Spoiling(InProcessGrid):
    """Spoils what one node says in a stage, and keeps every train reply as it left the client."""

    def __init__(self, clients, spoil=None, stage=None, nodes=(FAULTY,)):
        super().__init__(client_app, simulated_nodes(clients))
        self.spoil, self.stage, self.nodes, self.seen = spoil, stage, nodes, {}

    def _deliver(self, message):
        record = message.content.config_records.get(RECORD_KEY_CONFIGS, {})
        stage, node = record.get(Key.STAGE), message.metadata.dst_node_id
        message_id = super()._deliver(message)
        reply = self._replies[message_id]
        if stage == Stage.COLLECT_MASKED_VECTORS:
            self.seen[node] = reply.content
        if stage is not None and stage == self.stage and node in self.nodes:
            if self.spoil is None:
                del self._replies[message_id]
            else:
                self.spoil(reply.content)
        return message_id


class Leaving(InProcessGrid):
    """Lets clients train in the clear, but not those of the nodes named."""

    def __init__(self, clients, nodes):
        super().__init__(client_app, simulated_nodes(clients))
        self.nodes = nodes

    def _deliver(self, message):
        if message.metadata.dst_node_id in self.nodes and message.metadata.message_type == "train":
            return "lost"
        return super()._deliver(message)


@pytest.fixture(scope="module")
def without_faulty(tmp_path_factory):
    """The mean of four of five clients, as computed in the clear."""
    return values(run(tmp_path_factory.mktemp("clear"), ONE_ROUND, Leaving(5, {FAULTY})))


def test_the_outcome_is_the_mean_by_numbers_of_images(tmp_path):
    plain = values(run(tmp_path / "plain", ONE_ROUND))
    masked = values(run(tmp_path / "masked", [*ONE_ROUND, "privacy=secagg"]))
    torch.testing.assert_close(masked, plain, rtol=0, atol=2e-5)
    assert not torch.equal(masked, plain)


def test_what_a_client_sends_says_nothing_of_its_update_and_the_sum_of_all_does(tmp_path):
    grid = Spoiling(3)
    run(tmp_path, [*ONE_ROUND, "privacy=secagg"], grid)
    assert len(grid.seen) == 3
    for content in grid.seen.values():
        assert not any(content.array_records.values())
        weight, update = (bytes_to_ndarray(part) for part in content[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS])
        assert weight.shape == (1,)
        mean, deviation = update.mean() / 2**32, update.std() / 2**32
        assert mean == pytest.approx(0.5, abs=0.02)  # uniform over all 32 bits
        assert deviation == pytest.approx(12**-0.5, abs=0.02)


def test_bytes_of_all_four_stages_are_counted(tmp_path):
    grid = Spoiling(3)
    report = reports(run(tmp_path, [*ONE_ROUND, "privacy=secagg"], grid))[-1]
    masked = sum(len(part) for c in grid.seen.values() for part in c[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS])
    assert masked < report["bytes_up"] < 1.2 * masked + 20_000


@pytest.mark.parametrize("stage", STAGES[:3])
def test_a_client_that_falls_out_before_its_update_is_in_the_sum_is_left_out(tmp_path, stage, without_faulty):
    folder = run(tmp_path, [*ONE_ROUND, "privacy=secagg"], Spoiling(5, stage=stage))
    last = reports(folder)[-1]
    assert last["clients_used"] == ["0", "2", "3", "4"]
    assert "no reply within the timeout" in last["clients_dropped"]["1"]
    torch.testing.assert_close(values(folder), without_faulty, rtol=0, atol=2e-5)


def test_a_client_that_falls_out_while_unmasking_is_in_the_sum_all_the_same(tmp_path):
    plain = values(run(tmp_path / "plain", ONE_ROUND, InProcessGrid(client_app, simulated_nodes(5))))
    folder = run(tmp_path / "masked", [*ONE_ROUND, "privacy=secagg"], Spoiling(5, stage=Stage.UNMASK))
    assert reports(folder)[-1]["clients_used"] == ["0", "1", "2", "3", "4"]
    torch.testing.assert_close(values(folder), plain, rtol=0, atol=2e-5)


def no_key(content):
    content[RECORD_KEY_CONFIGS][Key.PUBLIC_KEY_2] = b"none"


def other_nodes(content):
    content[RECORD_KEY_CONFIGS][Key.DESTINATION_LIST] = [7, 8, 9, 10]


def other_shape(content):
    weight, _ = content[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]
    content[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS] = [weight, ndarray_to_bytes(np.zeros(3, np.int64))]


def too_long(content):
    content[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS] = [bytes(10**6), bytes(10**6)]


def nothing(content):
    del content[RECORD_KEY_CONFIGS]


def no_destinations(content):
    content[RECORD_KEY_CONFIGS][Key.DESTINATION_LIST] = []
    content[RECORD_KEY_CONFIGS][Key.CIPHERTEXT_LIST] = []


def archive(content):
    content[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS] = [b"PK\x05\x06" + bytes(18)] * 2


def garbage(content):
    shares = content[RECORD_KEY_CONFIGS][Key.SHARE_LIST]
    content[RECORD_KEY_CONFIGS][Key.SHARE_LIST] = [b"\x01\x00\x00\x00" + bytes(len(share) - 4) for share in shares]


def other_owners(content):
    content[RECORD_KEY_CONFIGS][Key.NODE_ID_LIST] = [91, 92, 93, 94, 95]


def no_shares(content):
    content[RECORD_KEY_CONFIGS][Key.SHARE_LIST] = []


@pytest.mark.parametrize(
    ("stage", "spoil", "reason"),
    [
        (Stage.SETUP, no_key, "is no key"),
        (Stage.SETUP, nothing, "answers nothing of secure aggregation"),
        (Stage.SHARE_KEYS, other_nodes, "names other nodes than it was asked for"),
        (Stage.COLLECT_MASKED_VECTORS, other_shape, r"not int64"),
        (Stage.COLLECT_MASKED_VECTORS, too_long, "1000000 bytes"),
        (Stage.SHARE_KEYS, no_destinations, "names other nodes than it was asked for"),
        (Stage.COLLECT_MASKED_VECTORS, nothing, "answers nothing"),
        (Stage.COLLECT_MASKED_VECTORS, archive, "no array"),
    ],
)
def test_a_client_that_answers_nonsense_is_left_out_with_the_reason(tmp_path, stage, spoil, reason, without_faulty):
    folder = run(tmp_path, [*ONE_ROUND, "privacy=secagg"], Spoiling(5, spoil, stage))
    last = reports(folder)[-1]
    assert last["clients_used"] == ["0", "2", "3", "4"]
    assert reason in last["clients_dropped"]["1"]
    torch.testing.assert_close(values(folder), without_faulty, rtol=0, atol=2e-5)


def test_too_few_to_unmask_costs_the_round_and_no_more(tmp_path):
    grid = Spoiling(5, no_shares, Stage.UNMASK, nodes=(1, 2))
    with pytest.raises(TooFewClientsError, match="the sum was not unmasked: it takes two thirds of the clients"):
        run(tmp_path, [*ONE_ROUND, "privacy=secagg"], grid)
    (folder,) = (tmp_path / "runs").iterdir()
    assert not reports(folder)[-1]["merged"]


def test_shares_of_other_nodes_do_not_count_and_the_sum_is_unmasked_without_them(tmp_path):
    folder = run(tmp_path, [*ONE_ROUND, "privacy=secagg"], Spoiling(5, other_owners, Stage.UNMASK))
    assert reports(folder)[-1]["clients_used"] == ["0", "1", "2", "3", "4"]


def test_a_client_that_lies_about_shares_costs_the_round_which_says_so(tmp_path):
    with pytest.raises(TooFewClientsError, match="a client's keys or shares are wrong"):
        run(tmp_path, [*ONE_ROUND, "privacy=secagg"], Spoiling(5, garbage, Stage.UNMASK))


class Claiming(InProcessGrid):
    """One node claims another number of training images than it has."""

    def __init__(self, clients, claim):
        super().__init__(client_app, simulated_nodes(clients))
        self.claim = claim

    def _deliver(self, message):
        message_id = super()._deliver(message)
        if message.metadata.message_type == IDENTIFY and message.metadata.dst_node_id == FAULTY:
            self._replies[message_id].content["config"]["examples"] = self.claim
        return message_id


@pytest.mark.parametrize("claim", [10**4, 10**9])
def test_a_client_that_claims_many_images_does_not_make_the_others_coarse(tmp_path, claim):
    plain = values(run(tmp_path / "plain", ONE_ROUND, InProcessGrid(client_app, simulated_nodes(5))))
    folder = run(tmp_path / "masked", [*ONE_ROUND, "privacy=secagg"], Claiming(5, claim))
    assert reports(folder)[-1]["clients_used"] == ["0", "1", "2", "3", "4"]
    torch.testing.assert_close(values(folder), plain, rtol=0, atol=3e-4)


def test_a_client_with_more_images_than_the_server_knows_of_sends_none(tmp_path):
    class Understating(Claiming):
        def _deliver(self, message):
            message_id = InProcessGrid._deliver(self, message)
            if message.metadata.message_type == IDENTIFY:
                self._replies[message_id].content["config"]["examples"] = self.claim
            return message_id

    with pytest.raises(TooFewClientsError, match="more than the 1 that secure aggregation carries"):
        run(tmp_path, [*ONE_ROUND, "privacy=secagg"], Understating(3, 1))


def test_two_clients_cannot_hide_in_a_sum(tmp_path):
    with pytest.raises(TooFewClientsError, match="secure aggregation takes 3 to 1024 clients; this round has 2"):
        run(tmp_path, [*ONE_ROUND, "privacy=secagg"], InProcessGrid(client_app, simulated_nodes(2)))


def test_a_server_that_asks_for_the_update_in_the_clear_gets_none(tmp_path):
    class Downgrading(InProcessGrid):
        def _deliver(self, message):
            record = message.content.config_records.get(RECORD_KEY_CONFIGS, {})
            if record.get(Key.STAGE) == Stage.COLLECT_MASKED_VECTORS:
                del message.content[RECORD_KEY_CONFIGS]
            return super()._deliver(message)

    with pytest.raises(TooFewClientsError, match="asks for an update in the clear, with privacy=secagg"):
        run(tmp_path, [*ONE_ROUND, "privacy=secagg"], Downgrading(client_app, simulated_nodes(3)))
