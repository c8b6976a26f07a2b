"""A client's side of the exchange with a real model: what it starts from, what it sends, what it keeps."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict

from client_app.exchanging import Exchanger, received_values
from client_app.kept import Keeper
from client_app.training import make_optimizer, train
from task.config import TrainConfig
from task.errors import MessageError
from task.exchange import EVERYTHING, Exchange
from task.messages import ARRAYS
from task.wire import EXACT, LARGEST, WireConfig, decode, encode

HALF, BY_TENSOR, BY_CHANNEL = WireConfig("float16"), WireConfig("int8", "tensor"), WireConfig("int8", "channel")
LOSSY = [HALF, BY_TENSOR, BY_CHANNEL]
HEAD = ("head",)
KEEP = Exchange(keep=True, moments=True, run="run")
GO_ON = Exchange(down=(), start=1, moments=True, run="run")


def named(wire):
    return f"{wire.dtype}-{wire.scale}"


@pytest.fixture
def keeper(tmp_path):
    return Keeper(tmp_path / "state", "run", "client")


@pytest.fixture
def optimizer(tiny_model):
    return make_optimizer(tiny_model, TrainConfig(lr=0.01))


def message(values, layout, exchange):
    """A stand-in with some of the values, as the server sends them."""
    units = exchange.down
    return SimpleNamespace(
        content=RecordDict({ARRAYS: encode(layout.take(values, units), layout.part(units), exchange.wire)})
    )


def batches(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(steps, 4, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 5, (steps, 4), generator=generator)
    return list(zip(images, labels, strict=True))


def values_of(model, seed):
    return torch.randn(model.layout.size, generator=torch.Generator().manual_seed(seed))


def flat_of(model):
    return model.flat.detach().clone()


def kept_rounds(keeper):
    return sorted(int(path.stem.removeprefix("round-")) for path in keeper.folder.glob("*.safetensors"))


class Client:
    """Goes through rounds as the ClientApp does; a given change of the values stands for training."""

    def __init__(self, model, optimizer, keeper):
        self.model, self.optimizer, self.keeper = model, optimizer, keeper

    def go(self, server_round, exchange, values, change=None, steps=()):
        exchanger = Exchanger(self.model, exchange, self.keeper, server_round)
        state = exchanger.receive(message(values, self.model.layout, exchange))
        self.state, self.began = state, flat_of(self.model)
        if steps:
            train(self.model, self.optimizer, steps, optimizer_state=state)
        if change is not None:
            self.model.flat.detach().add_(change)
        record = exchanger.send(self.optimizer)
        return decode(record, self.model.layout.part(exchange.up), exchange.wire)


@pytest.fixture
def client(tiny_model, optimizer, keeper):
    return Client(tiny_model, optimizer, keeper)


def test_by_default_everything_travels_and_nothing_is_kept(client, keeper):
    values = values_of(client.model, 1)
    sent = client.go(1, EVERYTHING, values, steps=batches(2))
    assert torch.equal(client.began, values)
    assert client.state == {}
    assert torch.equal(sent, client.model.flat.detach())
    assert not torch.equal(sent, values)
    assert not keeper.folder.exists()


def test_only_the_units_asked_for_are_sent(client):
    layout, values = client.model.layout, values_of(client.model, 1)
    sent = client.go(1, Exchange(up=HEAD), values, change=values)
    assert torch.equal(sent, 2 * values[layout.slices["head"]])
    assert client.go(2, Exchange(up=()), values).shape == (0,)


@pytest.mark.parametrize("wire", [EXACT, *LOSSY], ids=named)
@pytest.mark.parametrize("down", [("blocks.0",), ("blocks.1", "head"), ()], ids=str)
def test_units_that_are_not_sent_go_on_from_what_was_kept(client, wire, down):
    layout, first = client.model.layout, values_of(client.model, 1)
    client.go(1, replace(KEEP, wire=wire), first, change=0.1 * values_of(client.model, 2))
    kept = flat_of(client.model)
    client.model.load(np.zeros(layout.size, np.float32))  # another client's turn
    second = values_of(client.model, 3)
    exchange = replace(KEEP, down=down, start=1, wire=wire)
    client.go(2, exchange, second)
    arrived = received_values(message(second, layout, exchange), client.model, exchange)
    expected = kept.clone()
    layout.put(expected, down, arrived)
    assert torch.equal(client.began, expected)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_optimizers_state_comes_back(tiny_model, keeper, kind):
    optimizer = make_optimizer(tiny_model, TrainConfig(optimizer=kind, lr=0.01))
    client = Client(tiny_model, optimizer, keeper)
    client.go(1, KEEP, values_of(tiny_model, 1), steps=batches(3))
    moments = {name: value.clone() for name, value in optimizer.state[tiny_model.flat].items()}
    assert set(moments) == ({"step", "exp_avg", "exp_avg_sq"} if kind == "adamw" else {"momentum_buffer"})
    train(tiny_model, optimizer, batches(2, seed=9))  # another client's turn
    client.go(2, GO_ON, values_of(tiny_model, 2))
    assert set(client.state) == set(moments)
    for name, value in moments.items():
        assert torch.equal(client.state[name], value)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not-kept"])
def test_only_values_come_back_where_the_optimizers_state_is_not_asked_for(client, keeper, kept):
    values = values_of(client.model, 1)
    client.go(1, replace(KEEP, moments=kept), values, steps=batches(2))
    trained = flat_of(client.model)
    assert ("optimizer.exp_avg" in keeper.load(1, client.model.layout.size)) == kept
    client.go(2, replace(GO_ON, moments=not kept), values)
    assert client.state == {}
    assert torch.equal(client.began, trained)


def test_an_optimizer_without_state_is_kept_too(tiny_model, keeper):
    client = Client(tiny_model, make_optimizer(tiny_model, TrainConfig(optimizer="sgd", momentum=0.0)), keeper)
    client.go(1, KEEP, values_of(tiny_model, 1), steps=batches(1))
    client.go(2, GO_ON, values_of(tiny_model, 2), steps=batches(1))
    assert client.state == {}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("wire", [EXACT, BY_CHANNEL], ids=named)
def test_two_rounds_without_a_download_are_one_round_of_as_many_steps(tiny_model, keeper, kind, wire):
    client = Client(tiny_model, make_optimizer(tiny_model, TrainConfig(optimizer=kind, lr=0.01)), keeper)
    values, steps = values_of(tiny_model, 1), batches(4)
    client.go(1, replace(KEEP, wire=wire), values, steps=steps[:2])
    train(tiny_model, client.optimizer, batches(2, seed=9))  # another client's turn
    client.go(2, replace(GO_ON, wire=wire), values, steps=steps[2:])
    in_two = flat_of(tiny_model)
    client.go(1, replace(EVERYTHING, run="other", wire=wire), values, steps=steps)
    assert torch.equal(in_two, tiny_model.flat.detach())


def test_a_fresh_window_starts_from_what_is_received_with_a_fresh_optimizer(client):
    client.go(1, KEEP, values_of(client.model, 1), steps=batches(2))
    values = values_of(client.model, 2)
    client.go(2, KEEP, values, steps=batches(2))
    assert client.state == {}
    assert torch.equal(client.began, values)


def test_a_client_goes_on_from_the_round_it_is_told_not_from_its_last(client):
    first = values_of(client.model, 1)
    client.go(1, KEEP, first)
    client.go(2, KEEP, values_of(client.model, 2))
    client.go(3, replace(KEEP, down=(), start=1), first)
    assert torch.equal(client.began, first)


@pytest.mark.parametrize("wire", [EXACT, *LOSSY], ids=named)
def test_a_start_without_anything_kept_is_refused_with_what_there_is(client, keeper, wire):
    exchange = replace(GO_ON, wire=wire)
    with pytest.raises(MessageError, match="has not kept round 1; it has: none"):
        client.go(2, exchange, values_of(client.model, 1))
    client.go(3, replace(KEEP, wire=wire), values_of(client.model, 1))
    with pytest.raises(MessageError, match="has not kept round 1; it has: 3"):
        client.go(4, exchange, values_of(client.model, 1))
    assert kept_rounds(keeper) == [3]


def test_a_start_where_only_the_rounding_error_was_kept_is_refused(client):
    client.go(1, Exchange(run="run", wire=BY_CHANNEL), values_of(client.model, 1))
    with pytest.raises(MessageError):
        client.go(2, replace(GO_ON, wire=BY_CHANNEL), values_of(client.model, 1))


def test_units_that_the_model_does_not_have_are_refused_before_anything_is_read(client):
    with pytest.raises(MessageError, match="not those of the layout"):
        Exchanger(client.model, Exchange(up=("blocks.7",)), client.keeper, 1)


@pytest.mark.parametrize("wire", [EXACT, *LOSSY], ids=named)
def test_arrays_that_are_not_as_announced_are_refused(client, wire):
    layout, values = client.model.layout, values_of(client.model, 1)
    announced = Exchange(down=HEAD, start=1, run="run", wire=wire)
    client.go(1, replace(KEEP, wire=wire), values)
    exchanger = Exchanger(client.model, announced, client.keeper, 2)
    with pytest.raises(MessageError, match="has shape"):
        exchanger.receive(message(values, layout, replace(announced, down=("blocks.0",))))
    with pytest.raises(MessageError, match="no array record 'arrays'"):
        exchanger.receive(SimpleNamespace(content=RecordDict()))
    with pytest.raises(MessageError, match="Expected the array"):
        exchanger.receive(SimpleNamespace(content=RecordDict({ARRAYS: ArrayRecord()})))


@pytest.mark.parametrize("wire", LOSSY, ids=named)
def test_lossy_values_go_up_as_the_change_since_they_were_received(client, wire):
    values = 10 + values_of(client.model, 1)
    change = 1e-3 * values_of(client.model, 2)
    sent = client.go(1, Exchange(run="run", wire=wire), values, change=change)
    true = client.model.flat.detach() - client.began
    assert (sent - true).abs().max() <= 0.5 * true.abs().max() / LARGEST * 1.001


@pytest.mark.parametrize("wire", LOSSY, ids=named)
def test_a_unit_goes_up_as_the_change_since_it_was_last_received(client, wire):
    """The head is received in round 1 only, the other units also in round 2; all go up after round 2."""
    layout, change = client.model.layout, 1e-2 * values_of(client.model, 9)
    head, others = layout.slices["head"], layout.units[:-1]
    client.go(1, replace(KEEP, up=(), wire=wire), values_of(client.model, 1), change=change)
    first = client.began
    client.model.load(np.zeros(layout.size, np.float32))
    exchange = Exchange(down=others, start=1, run="run", wire=wire)
    sent = client.go(2, exchange, values_of(client.model, 2), change=change)
    since = client.began.clone()
    since[head] = first[head]
    true = client.model.flat.detach() - since
    assert (sent - true).abs().max() <= 0.5 * true.abs().max() / LARGEST * 1.001
    assert true[head].abs().max() > 1.5 * change[head].abs().max()


def largest_error(values, layout, wire):
    """Of every value half a step, about what rounding it may cost."""
    if wire.dtype == "float16":
        return torch.clamp(values.abs() * 2**-11, min=2**-25)
    return torch.cat([(view.abs().max() / LARGEST / 2).expand(view.numel()) for view in layout.views(values).values()])


@pytest.mark.parametrize("rounds", [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [2, 3, 9, 50, 51]], ids=["all", "some"])
@pytest.mark.parametrize("wire", LOSSY, ids=named)
def test_updates_add_up_to_the_true_changes_but_for_one_last_error(client, wire, rounds):
    layout = client.model.layout
    change = torch.full((layout.size,), 1e-4)
    for view in layout.views(change).values():
        view.view(-1)[0] = 1.0  # beside it, the others are less than half a step of int8
    model, sent, true = values_of(client.model, 1), torch.zeros(layout.size), torch.zeros(layout.size)
    for server_round in rounds:
        exchange = Exchange(run="run", wire=wire)
        update = client.go(server_round, exchange, model, change=change * (1 + server_round / 100))
        sent, true = sent + update, true + (client.model.flat.detach() - client.began)
        model = model + update
    last = client.keeper.load(rounds[-1], layout.size)["error"]
    torch.testing.assert_close(sent + last, true, rtol=0, atol=2e-6 * len(rounds))
    assert (last.abs() <= 1.01 * largest_error(update + last, layout, wire) + 1e-9).all()


@pytest.mark.parametrize("wire", LOSSY, ids=named)
def test_real_training_adds_up_to_its_changes_too(client, wire):
    layout, model = client.model.layout, torch.from_numpy(client.model.read())
    sent = true = torch.zeros(layout.size)
    for server_round in range(1, 5):
        update = client.go(server_round, Exchange(run="run", wire=wire), model, steps=batches(2, server_round))
        sent, true, model = sent + update, true + (client.model.flat.detach() - client.began), model + update
    last = client.keeper.load(4, layout.size)["error"]
    assert last.abs().max() > 0
    torch.testing.assert_close(sent + last, true, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wire", LOSSY, ids=named)
def test_errors_are_carried_through_a_window_and_into_the_next(client, wire):
    """Units go up at their own pace: the head every round, the others at the ends of windows of two rounds."""
    layout, change = client.model.layout, 1e-3 * values_of(client.model, 5)
    model, sent, true = values_of(client.model, 1), torch.zeros(layout.size), torch.zeros(layout.size)
    for server_round in range(1, 7):
        first = server_round % 2 == 1
        exchange = Exchange(
            down=None if first else HEAD,
            up=HEAD if first else None,
            start=0 if first else server_round - 1,
            keep=first,
            run="run",
            wire=wire,
        )
        update = torch.zeros(layout.size)
        layout.put(update, exchange.up, client.go(server_round, exchange, model, change=change))
        true += client.model.flat.detach() - client.began
        sent, model = sent + update, model + update
    last = client.keeper.load(6, layout.size)["error"]
    torch.testing.assert_close(sent + last, true, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wire", LOSSY, ids=named)
def test_the_error_of_units_that_do_not_go_up_stays(client, wire):
    layout, values = client.model.layout, values_of(client.model, 1)
    change, head = 1e-3 * values_of(client.model, 2), layout.slices["head"]
    client.go(1, Exchange(run="run", wire=wire), values, change=change)
    before = client.keeper.load(1, layout.size)["error"]
    client.go(2, Exchange(up=HEAD, run="run", wire=wire), values, change=change)
    after = client.keeper.load(2, layout.size)["error"]
    assert torch.equal(after[: head.start], before[: head.start])
    assert not torch.equal(after[head], before[head])


@pytest.mark.parametrize("wire", LOSSY, ids=named)
def test_a_round_that_is_asked_for_again_is_answered_alike(client, wire):
    values, change = values_of(client.model, 1), 1e-3 * values_of(client.model, 2)
    exchange = Exchange(run="run", wire=wire)
    client.go(1, exchange, values, change=change)
    assert torch.equal(client.go(2, exchange, values, change), client.go(2, exchange, values, change))


@pytest.mark.parametrize("wire", LOSSY, ids=named)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_change_that_cannot_be_sent_spoils_no_later_round(client, wire, value):
    values, change = values_of(client.model, 1), 1e-3 * values_of(client.model, 2)
    spoilt = change.clone()
    spoilt[7] = value
    client.go(1, Exchange(run="run", wire=wire), values, change=spoilt)
    assert torch.isfinite(client.go(2, Exchange(run="run", wire=wire), values, change=change)).all()


@pytest.mark.parametrize("wire", LOSSY, ids=named)
def test_another_run_begins_without_an_error(client, tmp_path, wire):
    values, change = values_of(client.model, 1), 1e-3 * values_of(client.model, 2)
    first = client.go(1, Exchange(run="run", wire=wire), values, change=change)
    client.keeper = Keeper(tmp_path / "state", "another", "client")
    assert torch.equal(client.go(2, Exchange(run="another", wire=wire), values, change=change), first)


def test_after_a_window_the_round_before_is_kept_since_it_may_be_asked_for_again(client, keeper):
    values = values_of(client.model, 1)
    client.go(1, KEEP, values)
    client.go(2, replace(KEEP, down=HEAD, start=1), values)
    assert kept_rounds(keeper) == [1, 2]
    last = Exchange(down=HEAD, start=2, run="run")
    sent = client.go(3, last, values)
    assert kept_rounds(keeper) == [2]
    assert torch.equal(client.go(3, last, values), sent)


def test_a_window_that_is_left_unfinished_is_dropped_after_two_rounds_that_keep(client, keeper):
    values = values_of(client.model, 1)
    for server_round in (1, 5, 6):
        client.go(server_round, KEEP, values)
    assert kept_rounds(keeper) == [5, 6]


@pytest.mark.parametrize("wire", LOSSY, ids=named)
def test_after_a_window_only_the_rounding_error_is_kept_of_shorter_numbers(client, keeper, wire):
    size, values = client.model.layout.size, values_of(client.model, 1)
    client.go(1, replace(KEEP, wire=wire), values, steps=batches(1))
    assert set(keeper.load(1, size)) == {
        "flat", "received", "error", "optimizer.step", "optimizer.exp_avg", "optimizer.exp_avg_sq"
    }  # fmt: skip
    client.go(2, Exchange(down=HEAD, start=1, run="run", wire=wire), values)
    assert list(keeper.load(2, size)) == ["error"]
    client.go(3, Exchange(run="run", wire=wire), values)
    assert [list(keeper.load(server_round, size)) for server_round in kept_rounds(keeper)] == [["error"], ["error"]]


def test_a_round_that_fails_leaves_what_is_kept(client, keeper):
    values = values_of(client.model, 1)
    client.go(1, KEEP, values, change=values)
    before = keeper.load(1, client.model.layout.size)
    exchange = GO_ON
    Exchanger(client.model, exchange, keeper, 2).receive(message(values, client.model.layout, exchange))
    train(client.model, client.optimizer, batches(2))  # and the process ends before it sends
    after = keeper.load(1, client.model.layout.size)
    assert all(torch.equal(after[name], value) for name, value in before.items())
