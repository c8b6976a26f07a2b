"""Weights as text: written, read, and refused if damaged."""

import json

import pytest
import torch

from task.errors import ConfigError
from task.packaged_weights import read_packaged_weights, write_packaged_weights


@pytest.fixture
def written(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {
        "weight": torch.randn(4, 6, generator=generator).t(),
        "bias": torch.zeros(3),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
    }
    write_packaged_weights(tmp_path / "w.json", state, {"data": "none", "accuracy": 0.5})
    return tmp_path / "w.json", state


def test_weights_come_back_as_float16(written):
    path, state = written
    read = read_packaged_weights(path)
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert read[name].dtype == torch.float16
        assert torch.equal(read[name], tensor.half())


def test_the_file_is_ascii_json_that_keeps_the_record(written):
    document = json.loads(written[0].read_bytes().decode("ascii"))
    assert document["data"] == "none"
    assert document["accuracy"] == 0.5
    assert len(document["sha256"]) == 64


def test_damaged_weights_are_refused(written):
    path, _ = written
    document = json.loads(path.read_text())
    payload = document["safetensors_base64"]
    document["safetensors_base64"] = payload[:-8] + ("AAAA" if payload[-8:-4] != "AAAA" else "BBBB") + payload[-4:]
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"w\.json are damaged"):
        read_packaged_weights(path)
