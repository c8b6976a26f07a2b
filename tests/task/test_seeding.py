"""Seeds derived from a purpose."""

import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from task.seeding import derive_seed, generator_for, seed_device

purposes = st.lists(st.text(max_size=5) | st.integers(-5, 5), max_size=3).map(tuple)


@given(st.integers(0, 2**40), purposes)
def test_a_seed_fits_every_generator(seed, purpose):
    derived = derive_seed(seed, *purpose)
    assert 0 <= derived < 2**63
    assert derived == derive_seed(seed, *purpose)
    torch.Generator().manual_seed(derived)
    np.random.default_rng(derived)


@given(st.integers(0, 10), purposes, st.integers(0, 10), purposes)
def test_other_seed_or_purpose_gives_another_draw(seed, purpose, other_seed, other_purpose):
    assume((seed, *purpose) != (other_seed, *other_purpose))
    assert derive_seed(seed, *purpose) != derive_seed(other_seed, *other_purpose)


def test_values_are_the_same_on_every_machine_and_in_every_version():
    assert derive_seed(0, "adapter") == 8017487223640833015
    assert derive_seed(7, "train", 3, "client") == 2388677239185467534


def test_text_and_number_are_different_purposes():
    assert derive_seed(0, "1") != derive_seed(0, 1)
    assert derive_seed(0, "a", "b") != derive_seed(0, "ab")


def test_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    first = torch.rand(3, generator=generator_for(5, "cohort", 1))
    after = (torch.rand(1).item(), np.random.rand(), random.random())
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    assert after == (torch.rand(1).item(), np.random.rand(), random.random())
    assert torch.equal(first, torch.rand(3, generator=generator_for(5, "cohort", 1)))


def test_a_device_is_seeded_as_torch_seeds_it():
    seed_device(torch.device("cpu"), 5)
    found = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), found)


@pytest.mark.gpu
def test_every_gpu_is_seeded_not_the_current_one_alone():
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    draws = []
    for _ in range(2):
        seed_device(last, 5)
        draws.append(torch.rand(3, device=last))
    assert torch.equal(*draws)
