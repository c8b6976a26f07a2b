"""The rows that are explained: features, targets, groups and bins, by hand and by the strategy's own weights."""

import numpy as np
import pytest
import torch

from strategies.livar import PUBLISHED_TABLE, lora_merge_weights
from task.errors import ConfigError
from tests.tools.explain.recorded import record_run
from tools.explain.records import read_runs
from tools.explain.rows import check_signals, make_rows, pool_positions

LAYERS = [f"blocks.{depth}.{kind}" for depth in (0, 1) for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def random_targets(runs):
    generator = torch.Generator().manual_seed(9)
    records = [record for run in runs for record in run.records]
    return {r.digest: torch.rand(len(r.clients), 8, generator=generator).double().softmax(0) for r in records}


def rows_of(*folders, targets=random_targets):
    runs = read_runs(folders)
    found = targets(runs)
    return runs, found, make_rows(runs, found, PUBLISHED_TABLE)


def test_positions_in_a_pool_by_hand():
    signal = torch.tensor([[3.0, 1.0], [torch.nan, 3.0], [9.0, 7.0]])
    positions = pool_positions(signal, torch.isfinite(signal))
    np.testing.assert_allclose(positions, [0.4, 0.1, 0.4, 0.9, 0.7])


def test_a_row_per_record_client_and_layer(tmp_path):
    runs, targets, rows = rows_of(record_run(tmp_path, clients=3, rounds=2))
    [run] = runs
    assert rows.features.shape == (2 * 3 * 8, len(rows.names))
    pairs = [("0", name) for name in LAYERS] + [("1", LAYERS[0])]
    assert rows.origins[:9] == tuple((run.records[0].label, *pair) for pair in pairs)
    second = run.records[1]
    np.testing.assert_allclose(rows.target[24:], 3 * targets[second.digest].flatten())
    assert rows.target.mean() == pytest.approx(1)
    shares = np.array(second.num_examples) / np.mean(second.num_examples)
    np.testing.assert_allclose(rows.column("examples")[24:], np.repeat(shares, 8))
    np.testing.assert_allclose(rows.column("label_entropy")[24:], np.repeat(second.signals["label-entropy"].numpy(), 8))
    np.testing.assert_array_equal(rows.column("depth")[:8], [0, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(rows.column("kind")[:8], [0, 1, 2, 3, 0, 1, 2, 3])
    order = second.signals["score-b"].flatten().argsort().argsort()
    np.testing.assert_allclose(rows.column("s_B")[24:], (order + 0.5) / 24)


def test_features_that_are_constant_are_left_out_by_name(tmp_path):
    equal, other = record_run(tmp_path, clients=3), record_run(tmp_path, clients=4, seed=1)
    _, _, rows = rows_of(equal)
    assert rows.constant == ("clients",)
    _, _, mixed = rows_of(equal, other)
    assert not mixed.constant
    assert set(mixed.column("clients")) == {3, 4}


def test_rounds_are_left_out_of_one_federation_and_federations_of_several(tmp_path):
    first, second = record_run(tmp_path), record_run(tmp_path, seed=1)
    _, _, one = rows_of(first)
    assert one.grouped_by == "rounds"
    np.testing.assert_array_equal(one.groups, np.repeat([0, 1], 24))
    _, _, two = rows_of(first, second)
    assert two.grouped_by == "federations"
    np.testing.assert_array_equal(two.groups, np.repeat([0, 1], 48))


def test_bins_are_those_of_the_strategy(tmp_path):
    runs, _, rows = rows_of(record_run(tmp_path, clients=4))
    raw = PUBLISHED_TABLE.tensor[rows.bins[:, 0], rows.bins[:, 1]].view(2, 4, 8)
    for record, u in zip(runs[0].records, raw, strict=True):
        wanted = lora_merge_weights(record.signals["score-a"], record.signals["score-b"])
        torch.testing.assert_close(u / u.sum(0), wanted)


@pytest.mark.parametrize(("spoiled", "value"), [("norm-product", torch.nan), ("score-b", -1.0)])
def test_rows_whose_signals_do_not_count_are_left_out(tmp_path, spoiled, value):
    def spoil(server_round, name, signal):
        unknown = torch.cat([signal[:-1], torch.tensor([value])])
        return unknown if name == spoiled and server_round == 2 else signal

    runs, _, rows = rows_of(record_run(tmp_path, clients=3, edit=spoil))
    assert rows.not_finite == 3
    assert len(rows.target) == len(rows.origins) == 45
    assert np.isfinite(rows.features).all()
    assert [o for o in rows.origins if o[0] == runs[0].records[1].label and o[2] == LAYERS[-1]] == []


def test_too_few_records_with_finite_signals_are_refused(tmp_path):
    folder = record_run(tmp_path, edit=lambda r, name, s: s * torch.nan if name == "score-a" and r == 2 else s)
    told = "1 of 2 records have finite signals and 2 are needed: record more rounds or runs .*, at a lower train.lr"
    with pytest.raises(ConfigError, match=told):
        check_signals(read_runs([folder]))


@pytest.mark.parametrize("signal", ["score-a", "score-b"])
def test_a_constant_score_is_named(tmp_path, signal):
    folder = record_run(tmp_path, edit=lambda r, name, s: torch.ones_like(s) if name == signal and r == 2 else s)
    told = f"The signal {signal} is constant in {folder.name} round 2: .*; leave that run out, or record it anew"
    with pytest.raises(ConfigError, match=told):
        check_signals(read_runs([folder]))


def test_signals_that_vary_are_fine(tmp_path):
    check_signals(read_runs([record_run(tmp_path)]))


def test_a_constant_target_is_refused(tmp_path):
    def uniform(runs):
        return {r.digest: torch.full((3, 8), 1 / 3, dtype=torch.float64) for run in runs for r in run.records}

    with pytest.raises(ConfigError, match="The target is constant"):
        rows_of(record_run(tmp_path), targets=uniform)
