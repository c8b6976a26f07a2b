"""Checkpoints: what is written comes back, and anything else is refused in one sentence."""

import json
import os
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from server_app.checkpoints import Checkpoint, Checkpoints, _without_tensors, read_checkpoint, versions
from task.errors import StateError

STATE = {
    "flat": torch.arange(4.0),
    "empty": torch.empty(0),
    "store": {"head": torch.ones(2, 3, dtype=torch.float16)},
    "members": None,
    "clients": ["0", "site ü"],
    "complete": [True, 3, 0.1],
}
CHECKPOINT = Checkpoint(3, "ab12", "livar", "cd" * 32, 1234, {"torch": "2.0"}, STATE)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    Checkpoints(folder).save(CHECKPOINT)
    return (folder / "round-000003.safetensors").read_bytes()


def test_what_is_saved_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.latest() is None
    checkpoints.save(CHECKPOINT)
    found = checkpoints.latest()
    assert equal(found.state, STATE)
    assert replace(found, state={}) == replace(CHECKPOINT, state={})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text().filter(lambda key: key != "$tensor"), inner),
    max_leaves=8,
)


@settings(max_examples=200)
@given(json_values)
def test_any_nested_state_comes_back(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("any")
    state = {"value": value, "tensor": {"deep": [torch.tensor(1.5)]}}
    Checkpoints(folder).save(replace(CHECKPOINT, state=state))
    assert equal(Checkpoints(folder).latest().state, state)


@pytest.mark.parametrize("value", [{1: 2}, {"$tensor": "0"}, object(), {"set": {1}}])
def test_a_state_that_json_does_not_have_is_a_mistake_of_the_strategy(tmp_path, value):
    with pytest.raises(TypeError, match="A state"):
        Checkpoints(tmp_path).save(replace(CHECKPOINT, state={"value": value}))


def test_tensors_that_share_memory_come_back_each_as_it_was(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"row": whole[1], "whole": whole, "again": whole, "turned": whole.T, "wide": whole[0].expand(2, 4)}
    Checkpoints(tmp_path).save(replace(CHECKPOINT, state=state))
    assert equal(Checkpoints(tmp_path).latest().state, state)


def test_a_tensor_that_has_its_memory_alone_is_not_copied():
    tensors, store = {}, [torch.ones(3, 4), torch.zeros(5), torch.empty(0)]
    _without_tensors({"store": store, "part": store[0][:2]}, tensors)
    assert [tensors[str(number)].data_ptr() == one.data_ptr() for number, one in enumerate(store)] == [True] * 3
    assert tensors["3"].untyped_storage().nbytes() == 8 * 4


def test_the_last_two_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for server_round in range(1, 12):
        checkpoints.save(replace(CHECKPOINT, server_round=server_round))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000010.safetensors", "round-000011.safetensors"]
    checkpoints.forget_after(10)
    assert checkpoints.latest().server_round == 10


def test_where_all_are_damaged_each_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for server_round in (1, 2):
        checkpoints.save(replace(CHECKPOINT, server_round=server_round))
        (tmp_path / f"round-{server_round:06d}.safetensors").write_bytes(b"nothing")
    with pytest.raises(StateError, match=r"round-000002.*damaged.*round-000001.*damaged"):
        checkpoints.latest()


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(CHECKPOINT)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StateError, match=r"round 4 cannot be written: .*No space left"):
        checkpoints.save(replace(CHECKPOINT, server_round=4))
    assert [path.name for path in tmp_path.iterdir()] == ["round-000003.safetensors"]


def test_versions_are_those_of_what_may_decide_about_the_last_bit():
    assert {"flwr", "torch", "peft", "timm", "numpy"} <= versions().keys()


def refused_or_read(path):
    """Read a file; whatever is in it, a checkpoint comes of it or the one error."""
    try:
        found = read_checkpoint(path)
    except StateError:
        return
    assert found.server_round >= 1
    assert isinstance(found.state, dict)


positions = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8)


@pytest.mark.slow
@settings(max_examples=5000)
@given(changes=positions, cut=st.integers(0, 10_000))
def test_a_file_with_changed_bytes_is_refused_or_read(tmp_path_factory, written, changes, cut):
    data = bytearray(written)
    for position, value in changes:
        data[position % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(data[: len(data) - cut % len(data)] if cut % 3 == 0 else data)
    refused_or_read(path)


facts = st.dictionaries(
    st.sampled_from([*CHECKPOINT.__dataclass_fields__, "other"]), json_values | st.just({"$tensor": "0"}), min_size=5
)


@pytest.mark.slow
@settings(max_examples=3000)
@given(facts | json_values, st.booleans())
def test_a_file_of_other_facts_is_refused_or_read(tmp_path_factory, values, whole):
    path = tmp_path_factory.getbasetemp() / "other.safetensors"
    if whole and isinstance(values, dict):
        values = {**json.loads(json.dumps(blank())), **values}
    save_file({"0": torch.zeros(2)}, path, {"petalwise": json.dumps(values)})
    refused_or_read(path)


def blank():
    return {**{name: getattr(CHECKPOINT, name) for name in CHECKPOINT.__dataclass_fields__}, "state": {}}


@pytest.mark.slow
@settings(max_examples=3000)
@given(st.binary(max_size=300), st.integers(0, 2**64 - 1), st.booleans())
def test_arbitrary_bytes_are_refused(tmp_path_factory, data, size, header):
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    path.write_bytes(struct.pack("<Q", size) + data if header else data)
    with pytest.raises(StateError):
        read_checkpoint(path)


@pytest.mark.parametrize("depth", [10_000, 200_000])
def test_a_bottomless_state_is_refused(tmp_path, depth):
    text = json.dumps(blank()).replace('"state": {}', '"state": ' + "[" * depth + "]" * depth)
    path = tmp_path / "deep.safetensors"
    path.write_bytes(save({"0": torch.zeros(1)}, {"petalwise": text}))
    with pytest.raises(StateError):
        read_checkpoint(path)
