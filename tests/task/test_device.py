"""Where to compute, as far as a machine without a GPU can tell."""

import pytest
import torch

from task.device import choose_device, is_device
from task.errors import ConfigError


def test_devices_have_these_names():
    assert all(map(is_device, ["auto", "cpu", "cuda", "cuda:3"]))
    assert not any(map(is_device, ["", "gpu", "cuda:", "cuda:a", "cpu:1", "meta"]))


def test_the_processor_is_there_and_auto_takes_a_gpu_where_there_is_one():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("count", "wanted", "seen"),
    [
        (0, "cuda", "no GPU"),
        (0, "cuda:0", "no GPU"),
        (1, "cuda:1", "one GPU, cuda:0"),
        (4, "cuda:4", "4 GPUs, cuda:0 "),
    ],
)
def test_a_gpu_that_is_not_seen_is_refused_with_those_that_are(monkeypatch, count, wanted, seen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=rf"is to be {wanted} \(train.device, or device .* sees {seen}.*cpu or auto"):
        choose_device(wanted)


def test_one_of_several_gpus_is_chosen_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cuda") == torch.device("cuda")


@pytest.mark.gpu
def test_a_gpu_is_used():
    assert torch.zeros(1, device=choose_device("cuda:0")).is_cuda
