"""What a client keeps between rounds: its last rounds, for its own run, inside its own folder."""

import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client_app.kept import DAYS_UNTOUCHED, STATE_VARIABLE, Keeper, state_folder
from client_app.worker import Node
from task.errors import DataError, MessageError, StateError

SIZE = 6
ANY_TEXT = st.text(st.characters())  # lone surrogates too


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def keeper(folder):
    return Keeper(folder, "run", "client")


def tensors(value=1.0):
    return {
        "flat": torch.full((SIZE,), value),
        "optimizer.exp_avg": torch.randn(SIZE),
        "optimizer.step": torch.tensor(3.0),
    }


def kept_rounds(keeper):
    return sorted(int(path.stem.removeprefix("round-")) for path in keeper.folder.glob("*.safetensors"))


def all_files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def age(path, days):
    then = time.time() - days * 86400
    os.utime(path, (then, then))


def test_what_was_saved_is_loaded_bit_for_bit(keeper):
    saved = tensors()
    keeper.save(1, saved)
    loaded = keeper.load(1, SIZE)
    assert set(loaded) == set(saved)
    for name, value in saved.items():
        assert (loaded[name].shape, loaded[name].dtype) == (value.shape, value.dtype)
        assert loaded[name].numpy().tobytes() == value.numpy().tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_any_number_is_kept(keeper, value):
    keeper.save(1, tensors(value))
    assert keeper.load(1, SIZE)["flat"].numpy().tobytes() == torch.full((SIZE,), value).numpy().tobytes()


def test_what_was_loaded_can_be_written_to_without_changing_what_is_kept(keeper):
    keeper.save(1, tensors(1.0))
    keeper.load(1, SIZE)["flat"].fill_(5)
    assert keeper.load(1, SIZE)["flat"].tolist() == [1.0] * SIZE


def test_what_was_loaded_outlives_its_file(keeper):
    keeper.save(1, tensors(1.0))
    loaded = keeper.load(1, SIZE)
    keeper.clear()
    assert loaded["flat"].tolist() == [1.0] * SIZE


def test_a_round_is_replaced_when_saved_again(keeper):
    keeper.save(1, tensors(1.0))
    keeper.save(1, {"error": torch.zeros(SIZE)})
    assert list(keeper.load(1, SIZE)) == ["error"]


def test_only_the_last_two_rounds_stay(keeper):
    for server_round in (1, 2, 5, 1_000_000):
        keeper.save(server_round, tensors(server_round))
    assert kept_rounds(keeper) == [5, 1_000_000]
    assert len(all_files(keeper.folder)) == 2
    assert keeper.load(1_000_000, SIZE)["flat"][0] == 1_000_000


def test_a_round_that_is_run_again_is_kept(keeper):
    for server_round in (7, 8, 9):
        keeper.save(server_round, tensors(server_round))
    keeper.save(6, tensors(6.0))
    assert keeper.load(6, SIZE)["flat"][0] == 6


def test_the_last_round_before_one_is_found(keeper):
    assert keeper.last_before(5) == 0
    keeper.save(2, tensors())
    keeper.save(4, tensors())
    assert [keeper.last_before(server_round) for server_round in (1, 2, 3, 4, 5, 99)] == [0, 0, 2, 2, 4, 4]


@pytest.mark.parametrize(
    ("run", "client"), [("other", "client"), ("run", "other"), ("client", "run"), ("run ", "client")]
)
def test_another_run_or_client_is_not_seen(keeper, folder, run, client):
    keeper.save(1, tensors())
    other = Keeper(folder, run, client)
    assert other.last_before(2) == 0
    with pytest.raises(MessageError, match="has not kept round 1; it has: none"):
        other.load(1, SIZE)
    other.save(1, tensors(2.0))
    assert keeper.load(1, SIZE)["flat"][0] == 1


def test_the_same_run_and_client_are_found_by_another_process(keeper, folder):
    keeper.save(1, tensors())
    assert Keeper(folder, "run", "client").load(1, SIZE)["flat"][0] == 1


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 0, 1])
def test_values_of_another_size_are_refused(keeper, size):
    keeper.save(1, tensors())
    with pytest.raises(MessageError, match="of round 1 is of another model"):
        keeper.load(1, size)


@pytest.mark.parametrize("shape", [(SIZE, 1), (1, SIZE), (2, 3), (1,), (SIZE - 1,)], ids=str)
def test_one_tensor_of_another_shape_is_enough_to_refuse(keeper, shape):
    keeper.save(1, {**tensors(), "more": torch.zeros(shape)})
    with pytest.raises(MessageError, match="of another model"):
        keeper.load(1, SIZE)


@given(ANY_TEXT, ANY_TEXT)
def test_no_name_leads_out_of_the_folder(run, client):
    root = Path("/nodes/state")
    folder = Keeper(root, run, client).folder
    assert Path(os.path.normpath(folder)) == folder
    assert folder.parent.parent == root
    assert {len(part) for part in folder.relative_to(root).parts} == {32}


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", ".", "", "a/b", "\x00", "x" * 5000, "~", "ü\ud800"])
def test_such_a_name_is_kept_inside_the_folder_all_the_same(tmp_path, name):
    keeper = Keeper(tmp_path / "a" / "b" / "state", name, name)
    keeper.save(1, tensors())
    assert keeper.load(1, SIZE)["flat"][0] == 1
    (file,) = all_files(tmp_path)
    assert file.is_relative_to(tmp_path / "a" / "b" / "state")
    keeper.clear()
    assert all_files(tmp_path) == []
    assert (tmp_path / "a" / "b" / "state").is_dir()


@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=2, max_size=5, unique=True))
def test_every_run_and_client_has_a_folder_of_its_own(pairs):
    assert len({Keeper(Path("state"), *pair).folder for pair in pairs}) == len(pairs)


def test_a_missing_round_is_told_with_those_that_are_there(keeper):
    with pytest.raises(MessageError, match="has not kept round 3; it has: none"):
        keeper.load(3, SIZE)
    keeper.save(1, tensors())
    keeper.save(2, tensors())
    with pytest.raises(MessageError, match="has not kept round 3; it has: 1, 2"):
        keeper.load(3, SIZE)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused_and_the_round_before_it_is_not(keeper, share):
    keeper.save(1, tensors())
    keeper.save(2, tensors())
    (file,) = keeper.folder.glob("round-000002*")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(MessageError, match="kept of round 2 cannot be read"):
        keeper.load(2, SIZE)
    assert keeper.load(1, SIZE)["flat"][0] == 1


@given(st.binary(max_size=200))
def test_garbage_in_a_file_is_refused_with_the_one_error(tmp_path_factory, data):
    keeper = Keeper(tmp_path_factory.mktemp("state"), "run", "client")
    keeper.folder.mkdir(parents=True)
    (keeper.folder / "round-000001.safetensors").write_bytes(data)
    with pytest.raises(MessageError):
        keeper.load(1, SIZE)


def test_a_folder_in_place_of_a_file_is_refused(keeper):
    (keeper.folder / "round-000001.safetensors").mkdir(parents=True)
    with pytest.raises(MessageError, match="cannot be read"):
        keeper.load(1, SIZE)


def test_no_error_tells_where_the_folder_lies(keeper, folder):
    keeper.save(1, tensors())
    (keeper.folder / "round-000002.safetensors").write_bytes(b"x")
    for server_round, size in ((1, 1), (2, SIZE), (3, SIZE)):
        with pytest.raises(MessageError) as error:
            keeper.load(server_round, size)
        assert str(folder.parent) not in str(error.value)


@pytest.mark.parametrize("level", ["node", "run", "client"])
def test_a_file_in_place_of_a_folder_is_an_error_and_leaves_earlier_rounds_readable(keeper, folder, level):
    keeper.save(1, tensors())
    place = {"node": folder, "run": keeper.folder.parent, "client": keeper.folder}[level]
    aside = folder.parent / "aside"
    place.rename(aside)
    place.touch()
    with pytest.raises(StateError, match="cannot keep its state of round 2") as error:
        keeper.save(2, tensors())
    assert str(folder.parent) not in str(error.value)
    place.unlink()
    aside.rename(place)
    assert keeper.load(1, SIZE)["flat"][0] == 1


@pytest.mark.parametrize("level", ["node", "run", "client"])
def test_nothing_is_found_in_a_file_in_place_of_a_folder(keeper, folder, level):
    place = {"node": folder, "run": keeper.folder.parent, "client": keeper.folder}[level]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    assert keeper.last_before(5) == 0
    with pytest.raises(MessageError, match="it has: none"):
        keeper.load(1, SIZE)
    keeper.clear()


def test_a_round_that_cannot_be_put_in_place_is_an_error_and_leaves_earlier_rounds_readable(keeper, folder):
    keeper.save(1, tensors(1.0))
    keeper.save(2, tensors(2.0))
    (keeper.folder / "round-000003.safetensors").mkdir()
    with pytest.raises(StateError, match="cannot keep its state of round 3: ") as error:
        keeper.save(3, tensors(3.0))
    assert str(folder.parent) not in str(error.value)
    assert [keeper.load(server_round, SIZE)["flat"][0] for server_round in (1, 2)] == [1, 2]
    assert len(all_files(keeper.folder)) == 2


def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(keeper, monkeypatch):
    def half_written(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    keeper.save(1, tensors())
    monkeypatch.setattr("client_app.kept.save_file", half_written)
    with pytest.raises(StateError, match="round 2: No space left on device"):
        keeper.save(2, tensors())
    assert [path.name for path in all_files(keeper.folder)] == ["round-000001.safetensors"]
    assert keeper.load(1, SIZE)["flat"][0] == 1


def test_clear_drops_only_this_clients_rounds(keeper, folder):
    others = [Keeper(folder, "run", "other"), Keeper(folder, "other", "client")]
    for one in (keeper, *others):
        one.save(1, tensors())
        one.save(2, tensors())
    keeper.clear()
    assert keeper.last_before(9) == 0
    assert not keeper.folder.exists()
    assert [kept_rounds(other) for other in others] == [[1, 2], [1, 2]]


def test_clear_leaves_no_empty_folders_of_runs_and_may_be_repeated(keeper, folder):
    keeper.clear()
    keeper.save(1, tensors())
    keeper.clear()
    keeper.clear()
    assert list(folder.iterdir()) == []
    keeper.save(2, tensors())
    assert kept_rounds(keeper) == [2]


def test_runs_untouched_for_days_are_dropped_when_a_new_one_begins(keeper, folder):
    runs = {days: Keeper(folder, f"run {days}", "client") for days in (0, DAYS_UNTOUCHED - 1, DAYS_UNTOUCHED + 1, 400)}
    for days, run in runs.items():
        run.save(1, tensors())
        age(run.folder.parent, days)
    keeper.save(1, tensors())
    assert [days for days, run in runs.items() if run.folder.exists()] == [0, DAYS_UNTOUCHED - 1]
    assert keeper.load(1, SIZE)["flat"][0] == 1


def test_nothing_is_dropped_while_a_run_goes_on(keeper, folder):
    old = Keeper(folder, "old", "client")
    keeper.save(1, tensors())
    old.save(1, tensors())
    age(old.folder.parent, DAYS_UNTOUCHED + 1)
    keeper.save(2, tensors())
    assert old.load(1, SIZE)["flat"][0] == 1


def test_saving_makes_a_run_young_again(keeper, folder):
    keeper.save(1, tensors())
    age(keeper.folder.parent, DAYS_UNTOUCHED + 1)
    keeper.save(2, tensors())
    Keeper(folder, "new", "client").save(1, tensors())
    assert kept_rounds(keeper) == [1, 2]


def test_what_others_put_into_the_folder_is_never_dropped(keeper, folder):
    (folder / "photos").mkdir(parents=True)
    (folder / "a-file-with-a-name-as-long-as-32").touch()
    for path in folder.iterdir():
        age(path, 400)
    keeper.save(1, tensors())
    assert {path.name for path in folder.iterdir()} >= {"photos", "a-file-with-a-name-as-long-as-32"}


def test_the_folder_is_the_node_configs_then_the_environments_then_the_caches(tmp_path, monkeypatch):
    for name in ("node", "environment", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "environment"))
    assert STATE_VARIABLE == "PETALWISE_STATE"
    assert state_folder({"state": str(tmp_path / "node")}) == tmp_path / "node"
    assert state_folder({}) == tmp_path / "environment"
    monkeypatch.setenv(STATE_VARIABLE, "")
    assert state_folder({}) == tmp_path / "cache" / "petalwise" / "state"
    monkeypatch.delenv(STATE_VARIABLE)
    assert state_folder({"other": "x"}) == tmp_path / "cache" / "petalwise" / "state"
    for unset in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        unset()
        assert state_folder({}) == tmp_path / ".cache" / "petalwise" / "state"


def test_looking_for_the_folder_makes_none(tmp_path, monkeypatch):
    monkeypatch.delenv(STATE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = state_folder({})
    Keeper(found, "run", "client").last_before(3)
    Keeper(found, "run", "client").clear()
    assert list(tmp_path.iterdir()) == []


def test_a_named_folder_that_does_not_exist_is_refused_by_where_it_is_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match='node config\'s key "state"'):
        state_folder({"state": str(tmp_path / "gone")})
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(DataError, match=STATE_VARIABLE):
        state_folder({})


def test_a_node_knows_its_folder(tmp_path):
    assert Node.from_config({"state": str(tmp_path)}, 1).state == tmp_path


def test_a_node_with_a_folder_needs_no_home(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert state_folder({"state": str(tmp_path)}) == tmp_path


def test_where_a_round_started_stays_until_another_counts(tmp_path):
    """Two rounds that the server could not use start both from the one that it last could."""
    keeper = Keeper(tmp_path, "run", "3")
    tensors = {"flat": torch.ones(4)}
    keeper.save(5, tensors)
    keeper.save(6, tensors, start=5)
    keeper.save(7, tensors, start=5)
    keeper.load(5, 4)
    keeper.save(8, tensors, start=7)
    with pytest.raises(MessageError, match="it has: 7, 8"):
        keeper.load(5, 4)
