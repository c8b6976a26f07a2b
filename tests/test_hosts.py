"""Several hosts: SuperLink and SuperNodes in network namespaces, over slow links with TLS and keys."""

import time

import pytest

from tests.conftest import REPOSITORY
from tests.hosts import carried, cut, hosts, mend, slow_down, why_not
from tests.test_deployment import ONE_THREAD
from tests.test_faults import RUN_SECONDS, TINY, reports_of, wait_until
from tools.deployed import Site
from tools.deployment import deployment

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.faults]

SITES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def federation():
    if reason := why_not():
        pytest.skip(reason)
    with hosts(["link", *SITES]) as places:
        sites = [
            Site(name, {"partition-id": number, "num-partitions": 3}, places[name]) for number, name in enumerate(SITES)
        ]
        shaped = [slow_down(places[name], delay, rate) for name, delay, rate in zip(SITES, DELAYS, RATES, strict=True)]
        with deployment(sites, place=places["link"], settings=ONE_THREAD) as running:
            running.shaped, running.server_place = shaped, places["link"]
            yield running


DELAYS = ["5ms", "20ms", "50ms"]
RATES = ["100mbit", "20mbit", "10mbit"]


def submit(federation, strategy, rounds, overrides=""):
    config = f'backbone="vit_pico_random" partition="iid" strategy="{strategy}" num-server-rounds={rounds}'
    return federation.submit(REPOSITORY, [config, f'overrides="{TINY} {overrides}"'])


def newest(federation):
    return max((federation.folder / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime)


def test_livar_over_three_hosts(federation):
    began, before = time.monotonic(), carried(federation.server_place)
    outcome = federation.finish(submit(federation, "livar", 3), RUN_SECONDS)
    assert outcome.completed, f"{outcome.summary}\n{outcome.log[-3000:]}"
    rounds = reports_of(newest(federation))[1:]
    assert [report["clients_used"] for report in rounds] == [SITES] * 3
    seconds, after = time.monotonic() - began, carried(federation.server_place)
    down, up = (then - earlier for then, earlier in zip(after, before, strict=True))
    counted_down, counted_up = (
        sum(r[f"bytes_{way}"] for r in reports_of(newest(federation))) for way in ("down", "up")
    )
    assert down > counted_down
    assert up > counted_up
    print(f"3 rounds over 3 hosts in {seconds:.0f} s, links shaped: {federation.shaped}")
    print(f"bytes on the wire (the app's own count): down {down} ({counted_down}), up {up} ({counted_up})")


def test_pfedla_goes_on_while_a_link_is_cut(federation):
    place = federation.nodes["b"].place
    run_id = submit(federation, "pfedla", 8, "round_timeout=300")
    federation.wait_for(run_id, "round 1/", RUN_SECONDS)
    cut(place)
    try:
        federation.wait_for(run_id, "round 3/", RUN_SECONDS)
    finally:
        mend(place)
    wait_until(lambda: federation.online()["b"] == "online", 240)
    outcome = federation.finish(run_id, RUN_SECONDS)
    assert outcome.completed, f"{outcome.summary}\n{outcome.log[-3000:]}"
    used = [report["clients_used"] for report in reports_of(newest(federation))[1:]]
    assert used[0] == SITES
    assert ["a", "c"] in used
    assert used[-1] == SITES
