"""What is made of the notes of clients; a deployment itself is no matter of this test."""

import pytest

from benchmarks.speed.deployed import PARTS, SITES, round_parts, timed_app
from task.errors import PetalwiseError

NOTE = {
    "created": 100.0,
    "started": 101.0,
    "loaded": 103.0,
    "arrived": {"torch": 105.0, "timm": 105.5, "app": 106.5},
    "ended": 110.0,
    "taken": {"data": 0.5, "model": 0.75, "steps": 1.25},
    "failed": False,
}


def test_the_parts_add_up_to_the_phase():
    parts = round_parts([NOTE] * SITES, 12.0)
    assert parts.keys() == PARTS.keys()
    assert sum(parts.values()) == pytest.approx(12.0)
    assert (parts["polls"], parts["torch"], parts["other"], parts["back"]) == (1.0, 2.0, 1.0, 2.0)


def test_what_a_resident_had_imported_before_counts_nothing():
    parts = round_parts([{**NOTE, "arrived": {"torch": 5.0, "timm": 5.5, "app": 6.5}}] * SITES, 12.0)
    assert sum(parts.values()) == pytest.approx(12.0)
    assert (parts["torch"], parts["timm"], parts["app"], parts["other"]) == (0.0, 0.0, 0.0, 4.5)


@pytest.mark.parametrize("notes", [[NOTE], [NOTE, NOTE, {**NOTE, "failed": True}]])
def test_a_round_without_all_clients_is_not_measured(notes):
    with pytest.raises(PetalwiseError, match="clients took part in a round, or one of them failed"):
        round_parts(notes, 12.0)


def test_the_app_is_bundled_with_the_client_that_takes_notes(tmp_path):
    app = timed_app(tmp_path / "app")
    assert 'clientapp = "timed_entry:client"' in (app / "pyproject.toml").read_text()
    assert (app / "timed_entry.py").is_file()
    assert (app / "timed_client.py").is_file()
    own = (app / "client_app" / "app.py").read_text().splitlines()
    assert own[0] == "import timed_client"
    assert own[-1] == "app = timed_client.timed_app(app)"
