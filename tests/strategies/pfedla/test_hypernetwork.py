"""The bank of hypernetworks: weights, steps, growth."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from strategies.pfedla import HypernetworkBank
from strategies.pfedla.hypernetwork import relu_sum

FORMS = ["softmax", "relu_sum"]


def bank(clients=4, units=3, **options):
    return HypernetworkBank(clients, units, **options)


def reference(bank, client):
    """One client's hypernetwork as plain modules, its embedding among the parameters."""
    own = {name: value[client] for name, value in bank.parameters.items()}
    trunk = []
    for depth in range(3):
        layer = nn.Linear(100, 100)
        layer.weight.data, layer.bias.data = own[f"trunk.{depth}.weight"].clone(), own[f"trunk.{depth}.bias"].clone()
        trunk += [layer, nn.ReLU()]
    heads = nn.ModuleList(nn.Linear(100, bank.num_clients) for _ in range(bank.num_units))
    for unit, head in enumerate(heads):
        head.weight.data = own["output.weight"][unit].clone()
        head.bias.data = own["output.bias"][unit].clone()
    return nn.Parameter(own["embedding"].clone()), nn.Sequential(*trunk), heads


def reference_weights(modules, positivity, client, self_bias):
    embedding, trunk, heads = modules
    hidden, rows = trunk(embedding), []
    for head in heads:
        logits = head(hidden)
        logits = logits + self_bias * torch.nn.functional.one_hot(torch.tensor(client), len(logits))
        positive = logits.relu()
        rows.append(logits.softmax(0) if positivity == "softmax" else positive / positive.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("positivity", FORMS)
def test_weights_are_not_negative_and_sum_to_one(positivity):
    alpha = bank(positivity=positivity).weights([2, 0])
    assert alpha.shape == (2, 3, 4)
    assert bool((alpha >= 0).all())
    torch.testing.assert_close(alpha.sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("positivity", FORMS)
def test_the_bank_is_as_many_separate_modules(positivity):
    """Weights and a step by SGD with the loss -sum alpha G, client by client."""
    together = bank(positivity=positivity, self_bias=0.5, learning_rate=0.01)
    gain = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    before = {client: reference(together, client) for client in (1, 3)}
    for row, client in enumerate((1, 3)):
        embedding, trunk, heads = before[client]
        alpha = reference_weights(before[client], positivity, client, 0.5)
        torch.testing.assert_close(together.weights([client])[0], alpha.detach(), rtol=1e-4, atol=1e-5)
        optimizer = torch.optim.SGD([embedding, *trunk.parameters(), *heads.parameters()], lr=0.01)
        (-(alpha * gain[row]).sum()).backward()
        optimizer.step()
    together.step([1, 3], gain)
    for client, (embedding, trunk, heads) in before.items():
        torch.testing.assert_close(together.parameters["embedding"][client], embedding.detach(), rtol=1e-4, atol=1e-5)
        found = together.parameters["trunk.1.weight"][client]
        torch.testing.assert_close(found, trunk[2].weight.detach(), rtol=1e-4, atol=1e-5)
        found = together.parameters["output.weight"][client, 2]
        torch.testing.assert_close(found, heads[2].weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positivity", FORMS)
def test_a_small_step_climbs_and_leaves_the_others_alone(positivity):
    together, gain = bank(positivity=positivity, learning_rate=1e-3), torch.randn(1, 3, 4)
    before, others = together.weights([1]), together.weights([0, 2, 3])
    together.step([1], gain)
    assert (together.weights([1]) * gain).sum() > (before * gain).sum()
    assert torch.equal(together.weights([0, 2, 3]), others)


@pytest.mark.parametrize("positivity", FORMS)
def test_whoever_is_left_out_has_no_weight_and_no_gradient(positivity):
    together, gain = bank(positivity=positivity, learning_rate=0.1), torch.randn(2, 3, 4)
    among = torch.tensor([[True, False, True, False], [True, True, True, False]])
    rows = among[:, None, :].expand(2, 3, 4)
    alpha, whole = together.weights([0, 1], among), together.weights([0, 1]) * rows
    assert bool((alpha[~rows] == 0).all())
    torch.testing.assert_close(alpha, whole / whole.sum(-1, keepdim=True))
    before = together.parameters["output.weight"].clone()
    together.step([0, 1], gain, among)
    moved = (together.parameters["output.weight"] != before).any(-1)
    assert bool(moved[:2][rows].any())
    assert not bool(moved[:2][~rows].any())
    assert not bool(moved[2:].any())
    assert (together.weights([0, 1], among) * gain).sum() > (alpha * gain).sum()


def test_the_order_of_clients_changes_nothing():
    one, other, gain = bank(), bank(), torch.randn(3, 3, 4)
    one.step([0, 1, 3], gain)
    other.step([3, 0, 1], gain[[2, 0, 1]])
    for name, value in one.parameters.items():
        torch.testing.assert_close(value, other.parameters[name], rtol=0, atol=0)


def test_a_step_does_not_depend_on_who_else_steps():
    together, alone, gain = bank(), bank(), torch.randn(3, 3, 4)
    together.step([0, 1, 3], gain)
    for row, client in enumerate([0, 1, 3]):
        alone.step([client], gain[row : row + 1])
    for name, value in together.parameters.items():
        assert torch.equal(value, alone.parameters[name])


class Sizes(TorchDispatchMode):
    """Notes the sizes of all tensors that operations return in memory of their own."""

    def __init__(self, known):
        super().__init__()
        self.known, self.seen = {value.untyped_storage().data_ptr() for value in known}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        new = [one for one in tree_leaves(found) if isinstance(one, torch.Tensor)]
        self.seen += [one.nbytes for one in new if one.untyped_storage().data_ptr() not in self.known]
        return found


def test_a_step_of_many_clients_makes_no_tensor_larger_than_one_client_has():
    many = bank(clients=40)
    with Sizes(many.parameters.values()) as sizes:
        many.step(range(20), torch.randn(20, 3, 40))
    assert 0 < max(sizes.seen) == many.parameters["output.weight"][0].nbytes


def test_draws_follow_the_seed_and_the_client():
    assert torch.equal(bank(seed=1).weights([0, 1]), bank(seed=1).weights([0, 1]))
    assert not torch.equal(bank(seed=1).weights([0]), bank(seed=2).weights([0]))
    alpha = bank().weights([0, 1])
    assert not torch.equal(alpha[0], alpha[1])


def test_self_bias_draws_towards_the_client_itself():
    near = bank(self_bias=5.0).weights([2])[0]
    assert bool((near[:, 2] > 0.9).all())
    assert bool((bank().weights([2])[0] - 0.25).abs().max() < 0.1)


@pytest.mark.parametrize("positivity", FORMS)
def test_a_bank_grows_without_touching_what_it_has(positivity):
    grown = bank(3, positivity=positivity)
    grown.step([0], torch.randn(1, 3, 3))
    before = {name: value.clone() for name, value in grown.parameters.items()}
    grown.grow(5)
    assert grown.weights([0, 4]).shape == (2, 3, 5)
    for name, value in before.items():
        now = grown.parameters[name][:3]
        assert torch.equal(now[:, :, :3] if name.startswith("output") else now, value)
    grown.grow(5)
    assert grown.num_clients == 5


def test_a_row_without_a_positive_output_is_the_client_itself():
    logits = torch.tensor([[[-1.0, -2.0, 0.0], [1.0, 3.0, -1.0]]])
    itself = torch.tensor([[[0.0, 1.0, 0.0]]])
    assert relu_sum(logits, itself).tolist() == [[[0, 1, 0], [0.25, 0.75, 0]]]
