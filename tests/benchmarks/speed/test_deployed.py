"""What is made of the notes of clients; a deployment itself is no matter of this test."""

import pytest

from benchmarks.speed.deployed import PARTS, SITES, joined_notes, round_parts, timed_app
from benchmarks.speed.startup import start_parts
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


def test_notes_of_one_message_are_put_together(tmp_path):
    (tmp_path / "entry-1.jsonl").write_text('{"id": "a", "loaded": 1}\n{"id": "b", "loaded": 2}\n')
    (tmp_path / "7.jsonl").write_text('{"id": "b", "arrived": {}}\n')
    found = sorted(joined_notes(tmp_path), key=lambda note: note["id"])
    assert found == [{"id": "a", "loaded": 1}, {"id": "b", "loaded": 2, "arrived": {}}]


def test_the_start_is_split_up_to_the_first_step_of_any_client():
    later = {"loaded": 104.0, "arrived": {"torch": 105.0, "timm": 106.0, "app": 107.0, "steps": 110.0}}
    first = {"loaded": 103.0, "arrived": {"torch": 105.0, "timm": 106.0, "app": 107.0, "steps": 109.0}}
    asked = {"loaded": 102.0, "arrived": {"torch": 105.0, "timm": 106.0, "app": 107.0}}
    assert list(start_parts([later, asked, first], 100.0).values()) == [3.0, 2.0, 2.0, 2.0]


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
