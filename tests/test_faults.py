"""Faults on real processes, as in the table of docs/faults.md: what goes wrong at one client ends no round."""

import json
import time

import pytest

from tests.conftest import REPOSITORY
from tests.test_deployment import ONE_THREAD
from tools.deployed import Site
from tools.deployment import deployment

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.faults]

MODEL = (
    "backbone.image_size=16 backbone.arguments.embed_dim=32 backbone.arguments.depth=2 backbone.arguments.num_heads=2 "
    "train.batch_size=8 train.max_steps=2 dataset.max_train_samples=300 dataset.max_test_samples=50"
)
TINY = f"{MODEL} strategy.evaluate_clients=off"
SITES = ["site-a", "site-b", "site-c"]
RUN_SECONDS = 1200.0


def reports_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def federation():
    """Three sites, of which each has a third of the digits."""
    sites = [Site(name, {"partition-id": i, "num-partitions": 3}) for i, name in enumerate(SITES)]
    with deployment(sites, settings=ONE_THREAD) as running:
        yield running


class Run:
    """A submitted run and what it has reported so far."""

    def __init__(self, federation, overrides="", rounds=3, **config):
        self.federation = federation
        self._before = set((federation.folder / "runs").glob("*"))
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        self.id = federation.submit(
            REPOSITORY,
            [
                f'backbone="vit_pico_random" partition="iid" num-server-rounds={rounds} {pairs}',
                f'overrides="{TINY} {overrides}"',
            ],
        )

    @property
    def folder(self):
        (folder,) = set((self.federation.folder / "runs").glob("*")) - self._before
        return folder

    def reports(self):
        return {report["server_round"]: report for report in reports_of(self.folder)}

    def wait_for_round(self, server_round):
        self.federation.wait_for(self.id, f"round {server_round}/", RUN_SECONDS)

    def finish(self):
        outcome = self.federation.finish(self.id, RUN_SECONDS)
        assert outcome.completed, f"{outcome.summary}\n{outcome.log[-3000:]}"
        assert (self.folder / "adapter" / "adapter_model.safetensors").is_file()
        return self.reports()


def wait_until(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def back_online(federation, name):
    """Start a node again; its key is refused until Flower has noticed that it was gone."""
    node = federation.nodes[name]
    wait_until(lambda: federation.online()[name] != "online", 180)
    node.start()
    wait_until(lambda: federation.online()[name] == "online")


def test_a_supernode_killed_while_training_is_dropped_and_may_come_back(federation):
    run = Run(federation, rounds=4)
    run.wait_for_round(0)
    lost = federation.nodes["site-c"]
    wait_until(lambda: lost.working)
    lost.kill()
    back_online(federation, "site-c")
    reports = run.finish()
    assert reports[1]["clients_used"] == ["site-a", "site-b"]
    assert "error" in reports[1]["clients_dropped"]["site-c"]
    assert all(report["merged"] for report in list(reports.values())[1:])
    assert reports[4]["clients_used"] == SITES


def test_a_supernode_slower_than_the_round_is_left_out_and_its_late_reply_too(federation):
    slow = federation.nodes["site-b"]
    run = Run(federation, "round_timeout=45", rounds=3)
    run.wait_for_round(0)
    wait_until(lambda: slow.working)
    slow.pause()
    try:
        run.wait_for_round(1)
    finally:
        slow.resume()
    reports = run.finish()
    assert reports[1]["clients_used"] == ["site-a", "site-c"]
    assert reports[1]["clients_dropped"] == {"site-b": "no reply within the timeout"}
    assert reports[3]["clients_used"] == SITES


@pytest.mark.parametrize("strategy", ["fedlama", "heur_pfedla"])
def test_a_supernode_that_was_away_goes_on_as_its_strategy_has_it(federation, strategy):
    """It leaves in round 2, in the middle of FedLAMA's window, and is there again some rounds later."""
    away = federation.nodes["site-a"]
    run = Run(federation, "schedule.factor=2" if strategy == "fedlama" else "strategy.retained=1", 8, strategy=strategy)
    run.wait_for_round(1)
    away.terminate()
    back_online(federation, "site-a")
    reports = run.finish()
    used = {number: report["clients_used"] for number, report in reports.items() if number}
    assert used[1] == SITES
    assert any("site-a" not in clients for clients in used.values())
    assert used[8] == SITES
    assert all(report["merged"] for number, report in reports.items() if number)
    if strategy == "fedlama":
        assert all(used[first] == used[first + 1] or "site-a" not in used[first + 1] for first in (1, 3, 5, 7))


def test_a_client_that_cannot_keep_its_state_is_dropped_with_the_reason(federation):
    """No folder can be made in /proc, whoever asks: as on a disk that is full or read-only."""
    federation.add_node(Site("site-d", {"partition-id": 3, "num-partitions": 4, "state": "/proc"})).start()
    try:
        reports = Run(federation, "strategy.min_available_clients=4", 2, strategy="fedlama").finish()
    finally:
        federation.nodes["site-d"].terminate()
    assert reports[1]["clients_used"] == SITES
    assert "cannot keep its state of round 1" in reports[1]["clients_dropped"]["site-d"]


@pytest.mark.parametrize("what", ["server app", "superlink"])
def test_after_a_kill_on_the_server_the_run_is_gone_on_with(federation, what):
    run = Run(federation, rounds=4)
    run.wait_for_round(2)
    if what == "server app":
        assert federation.link.kill_server_app() > 0
        outcome = federation.finish(run.id, RUN_SECONDS)
        assert not outcome.completed
    else:
        federation.link.kill()
        federation.link.start()
        wait_until(lambda: all(federation.online()[name] == "online" for name in SITES), 240)
    folder = run.folder
    again = federation.submit(REPOSITORY, [f'resume="{folder}"'])
    outcome = federation.finish(again, RUN_SECONDS)
    assert outcome.completed, f"{outcome.summary}\n{outcome.log[-3000:]}"
    assert [report["server_round"] for report in reports_of(folder)] == [0, 1, 2, 3, 4]
    assert "Going on after round" in outcome.log


def test_secure_aggregation_keeps_its_keys_between_the_processes_of_a_round(federation):
    """Each of the four messages of a round is handled by a process of its own."""
    run = Run(federation, "privacy=secagg strategy.evaluate_clients=off", rounds=2)
    reports = run.finish()
    assert [reports[n]["clients_used"] for n in (1, 2)] == [SITES, SITES]
    assert not reports[1]["clients_dropped"]
