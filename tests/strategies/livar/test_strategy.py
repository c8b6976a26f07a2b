"""LIVAR in whole runs with scripted clients: what it merges, asks for, logs, keeps and lets the server evaluate."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord
from hypothesis import given
from hypothesis import strategies as st

from strategies import Livar, LivarConfig, TaskContext
from strategies.livar import lora_merge_weights, per_layer_scores
from strategies.livar.strategy import stacked_products
from task.arrays import FLAT, array_to_flat, flat_to_array
from task.errors import ModelError
from task.messages import METRICS, SIGNALS
from task.signals import NOTHING, SignalRequest, signal_layout
from task.units import head_specs, lora_layers, make_layout
from tests.strategies.livar.test_weights import GOLDEN, SCORE_A, SCORE_B
from tests.strategies.scripted import BASE, CLASSES, LAYOUT, Script, ShufflingGrid, final_flat, scripted_app

NAMES = ["0", "1", "2", "3"]
SHARES = np.array([0.1, 0.2, 0.3, 0.4])
FROZEN_A = make_layout(
    {
        "blocks.0.attn.qkv.lora_B.weight": (6, 2),
        "blocks.1.attn.qkv.lora_B.weight": (6, 2),
        "norm.weight": (4,),
        "head.weight": (3, 4),
        "head.bias": (3,),
    }
)
SIX_LAYERS = make_layout(
    {f"blocks.{i}.fc.lora_{which}.weight": shape for i in range(6) for which, shape in (("A", (1, 2)), ("B", (3, 1)))}
    | {"head.weight": (2, 4), "head.bias": (2,)}
)


def told(found, layout=LAYOUT):
    """Signals by name and client, or by name as a function of (client, round); all others are five, none, or one."""

    def signals(name, instruction):
        index = signal_layout(instruction.signals, layout)
        values, fixed = torch.ones(index.size), {"class-count": 5.0, "refused-scores": 0.0}
        for key, view in index.views(values).items():
            source = found.get(key, {})
            given = source(name, instruction.server_round) if callable(source) else source.get(name)
            if given is not None:
                view.copy_(torch.as_tensor(given))
            elif key in fixed:
                view.fill_(fixed[key])
        return ArrayRecord({FLAT: flat_to_array(values.numpy())})

    return signals


def update_of(name, server_round=1, layout=LAYOUT):
    """A client's model after a round, unlike all others."""
    return np.random.default_rng([server_round, int(name)]).normal(size=layout.size).astype(np.float32)


def initial(layout=LAYOUT):
    return ArrayRecord({FLAT: flat_to_array(np.linspace(-1, 1, layout.size, dtype=np.float32))})


def make_livar(layout=LAYOUT, lora_merge="factors", **options):
    return Livar(LivarConfig(name="livar", **options), TaskContext("{}", layout, BASE, CLASSES, 0, lora_merge))


def run(signals=None, clients=NAMES, rounds=1, layout=LAYOUT, strategy=None, evaluate_fn=None, **options):
    """Run LIVAR; the signals are as :func:`told` wants them. ``script`` keywords are named like the Script's fields."""
    fields = {key: options.pop(key) for key in ("values", "edit", "num_examples") if key in options}
    fields.setdefault("values", lambda name, server_round, received: update_of(name, server_round, layout))
    script = Script(layout=layout, signals=told(signals or {}, layout), **fields)
    strategy, reports = strategy or make_livar(layout, **options), []
    result = strategy.start(
        ShufflingGrid(scripted_app(script), clients),
        initial(layout),
        num_rounds=rounds,
        evaluate_fn=evaluate_fn,
        on_round=reports.append,
    )
    return SimpleNamespace(flat=final_flat(result.arrays), strategy=strategy, reports=reports, script=script)


def rows_of(flat, layout=LAYOUT):
    """The head as one matrix, the bias its last column: [classes, d + 1]."""
    weight, bias = head_specs(layout)
    views = layout.views(torch.tensor(flat))
    return torch.cat([views[weight.name], views[bias.name][:, None]], 1).numpy()


def factors_of(flat, layout=LAYOUT):
    """The exchanged factors of every layer, one row each."""
    views = layout.views(torch.tensor(flat))
    return [torch.cat([views[spec.name].flatten() for spec in layer.specs]).numpy() for layer in lora_layers(layout)]


def weighted_rows(weights, clients=NAMES, server_round=1):
    """Sum over clients of w[m, c] times row c."""
    return sum(w[:, None] * rows_of(update_of(name, server_round)) for name, w in zip(clients, weights, strict=True))


def weighted_factors(weights, clients=NAMES, server_round=1, layout=LAYOUT):
    """Sum over clients of W[m, l] times the factors of layer l."""
    found = [factors_of(update_of(name, server_round, layout), layout) for name in clients]
    return [
        sum(w * client[layer] for w, client in zip(column, found, strict=True))
        for layer, column in enumerate(np.array(weights).T)
    ]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, logger="flwr")
    return caplog


def lines(logged, level, start):
    return [r.getMessage() for r in logged.records if r.levelno == level and r.getMessage().startswith(start)]


def test_rows_follow_the_variance_and_sample_counts_play_no_part():
    variance = {"0": [1.0, 8.0, 2.0], "1": [1.0, 2.0, 2.0], "2": [2.0, 4.0, 2.0], "3": [4.0, 2.0, 4.0]}
    found = run({"class-variance": variance})
    weights = np.array([variance[name] for name in NAMES]) / [8, 16, 10]
    close(rows_of(found.flat), weighted_rows(weights))
    other = run({"class-variance": variance}, num_examples=lambda name: 1000 - int(name))
    np.testing.assert_array_equal(found.flat, other.flat)


def test_golden_case_in_a_run():
    signals = {
        "score-a": {name: SCORE_A[int(name)] for name in NAMES},
        "score-b": {name: SCORE_B[int(name)] for name in NAMES},
    }
    found = run(signals, layout=SIX_LAYERS)
    close(factors_of(found.flat, SIX_LAYERS), weighted_factors(GOLDEN.numpy(), layout=SIX_LAYERS))
    np.testing.assert_allclose(found.reports[1].details["adapter_weights"], GOLDEN.numpy(), atol=2e-6)
    assert found.reports[1].details["layers"] == [layer.name for layer in lora_layers(SIX_LAYERS)]


@pytest.mark.parametrize("count", [0, 1])
def test_a_class_that_no_client_covers_keeps_the_servers_row_and_bias(logged, count):
    found = run({"class-count": lambda name, server_round: [5, 5, count]}, rounds=2)
    np.testing.assert_array_equal(rows_of(found.flat)[2], rows_of(final_flat(initial()))[2])
    close(rows_of(found.flat)[:2], weighted_rows(np.full((4, 3), 0.25), server_round=2)[:2])
    assert lines(logged, logging.INFO, "Round 2: no client covers 1 of 3 classes; their rows stay.")


def test_a_row_that_is_kept_is_that_of_the_last_round_not_of_the_first():
    found = run({"class-count": lambda name, server_round: [5, 5, 0 if server_round == 2 else 5]}, rounds=2)
    close(rows_of(found.flat)[2], weighted_rows(np.full((4, 3), 0.25), server_round=1)[2])


def test_a_client_with_one_sample_of_a_class_has_no_say_in_its_row():
    found = run({"class-count": {"1": [5, 1, 5]}})
    weights = np.full((4, 3), 0.25)
    weights[:, 1] = [1 / 3, 0, 1 / 3, 1 / 3]
    close(rows_of(found.flat), weighted_rows(weights))


def test_a_client_without_a_correct_prediction_has_a_say_in_the_adapter_alone(logged):
    found = run({"class-count": {"2": [0, 0, 0]}, "class-variance": {"2": [0, 0, 0]}})
    weights = np.array([1, 1, 0, 1])[:, None] / 3 * np.ones(3)
    close(rows_of(found.flat), weighted_rows(weights))
    close(factors_of(found.flat), weighted_factors(np.full((4, 2), 0.25)))
    assert found.reports[1].clients_used == NAMES
    assert "no say in the head" in lines(logged, logging.INFO, "Round 1: client 2:")[0]


def test_equal_scores_merge_the_adapter_uniformly_and_say_so(logged):
    found = run({"score-a": lambda *_: [3.0, 3.0], "score-b": lambda *_: [0.0, 0.0]})
    close(factors_of(found.flat), weighted_factors(np.full((4, 2), 0.25)))
    assert lines(logged, logging.INFO, "Round 1: all update scores that count are equal; their clients have equal say.")


def test_scores_that_differ_are_not_called_equal(logged):
    run({"score-a": lambda *_: [3.0, 3.0], "score-b": {"1": [1.0, 2.0]}})
    assert not lines(logged, logging.INFO, "Round 1: all update scores that count are equal")


def test_dot_products_that_counted_as_zero_are_told_by_client(logged):
    """What is no number of them tells nothing, and costs nobody the round."""
    found = run({"refused-scores": {"0": [3.0], "1": [0.0], "2": [np.nan], "3": [-1.0]}})
    assert found.reports[1].details["refused_scores"] == {"0": 3}
    assert found.reports[1].clients_used == NAMES
    [line] = lines(logged, logging.WARNING, "Round 1: products of gradient and move overflowed and counted as 0")
    assert line.endswith("{'0': 3}.")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_a_client_with_a_bad_score_has_no_say_in_that_layer_and_is_named(logged, value):
    scores = np.arange(16.0).reshape(2, 4, 2)
    scores[0, 2, 1] = value
    signals = {key: {name: scores[i, int(name)] for name in NAMES} for i, key in enumerate(("score-a", "score-b"))}
    found = run(signals)
    # Without the bad one, s_A is 0 1 2 3 4 6 7, its bounds are 1.5 and 3; s_B is 8 9 10 11 12 14 15, its bounds 11.6
    # and 13.6.
    low = 0.03813978
    raw = np.array([[low, low], [low, low], [0.07813978, 0.0], [0.09313978, 0.09313978]])
    close(factors_of(found.flat), weighted_factors(raw / raw.sum(0)))
    assert found.reports[1].clients_used == NAMES
    assert found.reports[1].details["adapter_weights"][2][1] == 0
    assert lines(logged, logging.WARNING, "Round 1: client 2: update scores that are negative or not finite ")


def test_a_layer_without_any_finite_score_is_merged_uniformly():
    found = run({"score-b": lambda name, server_round: [float(name), np.nan]})
    close(factors_of(found.flat)[1], weighted_factors(np.full((4, 2), 0.25))[1])


def test_a_variance_that_is_not_finite_has_no_say_and_its_client_is_named(logged):
    found = run({"class-variance": {"1": [np.nan, 1.0, 1.0], "3": [np.inf, 1.0, 1.0]}})
    weights = np.full((4, 3), 0.25)
    weights[:, 0] = [0.5, 0, 0.5, 0]
    close(rows_of(found.flat), weighted_rows(weights))
    assert lines(logged, logging.WARNING, "Round 1: client 1, 3: variances that are not finite do not count.")


def test_a_negative_variance_has_no_say():
    found = run({"class-variance": {"1": [-1.0, 1.0, 1.0]}})
    weights = np.full((4, 3), 0.25)
    weights[:, 0] = [1 / 3, 0, 1 / 3, 1 / 3]
    close(rows_of(found.flat), weighted_rows(weights))


REASONS = {
    "one sample": ([1, 0, 1], [0, 0, 0], "no class with two samples to take a variance of"),
    "odd counts": ([2.5, -2, np.nan], [1, 1, 1], "no class with two samples to take a variance of"),
    "no variance": ([5, 5, 1], [0, 0, 1], "all variances of classes with two samples are 0"),
    "not finite": ([5, 5, 1], [np.nan, 0, 1], "no variance of a class with two samples is positive and finite"),
    "negative": ([5, 0, 1], [-1, 0, 1], "no variance of a class with two samples is positive and finite"),
}


@pytest.mark.parametrize("case", REASONS)
def test_the_log_says_why_a_client_has_no_say_in_the_head(logged, case):
    count, variance, reason = REASONS[case]
    run({"class-count": {"2": count}, "class-variance": {"2": variance}})
    found = lines(logged, logging.INFO, "Round 1: client")
    assert found == [f"Round 1: client 2: {reason}; no say in the head."]


def test_clients_of_one_reason_share_a_line(logged):
    run({"class-count": {"0": [1, 1, 1], "3": [0, 0, 0]}, "class-variance": {"1": [0, 0, 0]}})
    several, one = lines(logged, logging.INFO, "Round 1: client")
    assert several.startswith("Round 1: client 0, 3: no class with two samples ")
    assert one.startswith("Round 1: client 1: all variances ")


@pytest.mark.parametrize("count", [np.nan, np.inf, -3.0, 2.5])
def test_a_count_that_is_no_whole_number_has_no_say_in_its_class_and_its_client_is_named(logged, count):
    found = run({"class-count": {"1": [count, 5, 5]}})
    weights = np.full((4, 3), 0.25)
    weights[:, 0] = [1 / 3, 0, 1 / 3, 1 / 3]
    close(rows_of(found.flat), weighted_rows(weights))
    [line] = lines(logged, logging.WARNING, "Round 1: client 1: ")
    assert line == "Round 1: client 1: class counts that are not whole numbers from 0 on do not count."


def test_a_negative_score_has_no_part_in_the_median_of_its_layer():
    scores = {name: [float(name) + 1, 1.0] for name in NAMES}
    negative, missing = (run({"score-a": {**scores, "3": [s, 1.0]}}, scores="per_layer") for s in (-9.0, np.nan))
    np.testing.assert_array_equal(negative.flat, missing.flat)


def test_renaming_clients_changes_no_merged_value():
    """What a client is called decides where it stands in the sum, and nothing else."""
    generator = np.random.default_rng(3)
    signals = {
        "class-count": generator.integers(0, 4, (4, 3)),
        "class-variance": generator.random((4, 3)),
        "score-a": generator.random((4, 2)),
        "score-b": generator.random((4, 2)),
    }

    def merged(who):
        by_name = {key: {name: values[who[name]] for name in NAMES} for key, values in signals.items()}
        return run(
            by_name,
            values=lambda name, server_round, received: update_of(who[name]),
            num_examples=lambda name: 10 * (who[name] + 1),
        )

    plain, renamed = merged({name: int(name) for name in NAMES}), merged({"0": 2, "1": 0, "2": 3, "3": 1})
    close(renamed.flat, plain.flat)
    order = [2, 0, 3, 1]
    for key in ("head_weights", "adapter_weights"):
        weights = np.array(plain.reports[1].details[key])
        np.testing.assert_allclose(renamed.reports[1].details[key], weights[order], atol=1e-6)
        assert len({tuple(row) for row in weights}) > 1


@pytest.mark.parametrize("scores", ["round", "cumulative", "per_layer"])
def test_a_single_client_gives_back_its_own_factors_and_the_rows_it_covers(scores):
    found = run({"class-count": {"0": [2, 1, 9]}}, clients=["0"], min_clients=1, scores=scores)
    own, before = update_of("0"), final_flat(initial())
    np.testing.assert_array_equal(factors_of(found.flat), factors_of(own))
    np.testing.assert_array_equal(rows_of(found.flat)[[0, 2]], rows_of(own)[[0, 2]])
    np.testing.assert_array_equal(rows_of(found.flat)[1], rows_of(before)[1])


WEIGHTS = {"samples": SHARES, "uniform": np.full(4, 0.25)}


@pytest.mark.parametrize("adapter", WEIGHTS)
@pytest.mark.parametrize("head", WEIGHTS)
def test_ablations_weigh_by_samples_or_uniformly_and_ask_for_no_signals(head, adapter):
    found = run(head=head, adapter=adapter)
    close(rows_of(found.flat), weighted_rows(WEIGHTS[head][:, None] * np.ones(3)))
    close(factors_of(found.flat), weighted_factors(WEIGHTS[adapter][:, None] * np.ones(2)))
    assert {instruction.signals for _, instruction, _ in found.script.heard} == {NOTHING}


def test_each_half_asks_for_its_own_signals_alone():
    head = run(adapter="uniform").script.heard[0][1].signals
    adapter = run(head="uniform").script.heard[0][1].signals
    assert head == SignalRequest(class_variance=True)
    assert adapter == SignalRequest(update_scores=True)


def test_options_of_the_variance_reach_the_clients():
    options = {
        "variance_samples": "all",
        "variance_taken": "after",
        "variance_model": "frozen",
        "variance_images": "raw",
    }
    heard = run(**options).script.heard[0][1].signals
    expected = SignalRequest(
        class_variance=True, update_scores=True, samples="all", taken="after", model="frozen", images="raw"
    )
    assert heard == expected


def test_a_table_of_ones_own_weighs_the_layers(tmp_path):
    (tmp_path / "mine.yaml").write_text("quantiles_a: [0.5]\nweights: [[1.0, 3.0]]\n")
    signals = {"score-a": {name: [float(name), 3.0 - float(name)] for name in NAMES}}
    found = run(signals, table=str(tmp_path / "mine.yaml"))
    close(factors_of(found.flat), weighted_factors(np.array([[1, 3], [1, 3], [3, 1], [3, 1]]) / 8))


def scores_of(name, server_round):
    """Scores of A and of B of a client in a round, [2, layers]."""
    return np.random.default_rng([7, int(name), server_round]).random((2, 2)).astype(np.float32)


BY_ROUND = {"score-a": lambda name, n: scores_of(name, n)[0], "score-b": lambda name, n: scores_of(name, n)[1]}


def test_cumulative_scores_are_sums_over_the_rounds():
    found = run(BY_ROUND, rounds=3, scores="cumulative")
    total = {name: sum(scores_of(name, n).astype(float) for n in (1, 2, 3)) for name in NAMES}
    sums = found.strategy.state_dict()["score_sums"]
    assert list(sums) == NAMES
    for name in NAMES:
        np.testing.assert_allclose(sums[name].numpy(), total[name], rtol=1e-12)
    weights = lora_merge_weights(*torch.tensor(np.stack([total[name] for name in NAMES], 1)))
    close(factors_of(found.flat), weighted_factors(weights.numpy(), server_round=3))


def test_scores_of_the_round_are_kept_by_nobody():
    found = run(BY_ROUND, rounds=2)
    assert found.strategy.state_dict()["score_sums"] == {}
    weights = lora_merge_weights(*torch.tensor(np.stack([scores_of(name, 2) for name in NAMES], 1)))
    close(factors_of(found.flat), weighted_factors(weights.numpy(), server_round=2))


def test_sums_of_scores_go_on_from_a_restored_state():
    whole = run(BY_ROUND, rounds=2, scores="cumulative")
    first = run(BY_ROUND, rounds=1, scores="cumulative")
    resumed = make_livar(scores="cumulative")
    resumed.load_state_dict(first.strategy.state_dict())
    later = {key: lambda name, n, told=told_by: told(name, n + 1) for key, told_by in BY_ROUND.items()}
    run(later, strategy=resumed, values=lambda name, n, received: update_of(name, n + 1))
    np.testing.assert_array_equal(resumed.flat.numpy(), whole.flat)


@pytest.mark.parametrize("value", [np.nan, -0.01])
def test_a_bad_score_adds_nothing_to_the_sums_and_takes_nothing_away(value):
    def score_a(name, server_round):
        return [value, 1.0] if (name, server_round) == ("2", 2) else scores_of(name, server_round)[0]

    found = run({**BY_ROUND, "score-a": score_a}, rounds=3, scores="cumulative")
    sums = found.strategy.score_sums["2"][0].numpy()
    np.testing.assert_allclose(sums[0], sum(scores_of("2", n)[0, 0].astype(float) for n in (1, 3)), rtol=1e-12)
    assert [report.details["adapter_weights"][2][0] == 0 for report in found.reports[1:]] == [False, True, False]


def test_per_layer_scores_are_taken_per_step():
    def edit(name, server_round, content):
        content[METRICS]["steps"] = 10 ** int(name)
        return content

    found = run(BY_ROUND, edit=edit, scores="per_layer")
    steps = torch.tensor([1, 10, 100, 1000])
    score_a, score_b = torch.tensor(np.stack([scores_of(name, 1) for name in NAMES], 1))
    weights = lora_merge_weights(per_layer_scores(score_a, steps), per_layer_scores(score_b, steps))
    close(factors_of(found.flat), weighted_factors(weights.numpy()))
    assert not torch.allclose(weights, lora_merge_weights(score_a, score_b))


@pytest.mark.parametrize("steps", [None, 0, -5, float("nan")])
def test_an_update_without_its_steps_is_dropped_where_they_are_needed(steps):
    def edit(name, server_round, content):
        if name == "1":
            del content[METRICS]["steps"]
            content[METRICS].update({} if steps is None else {"steps": steps})
        return content

    found = run(edit=edit, scores="per_layer")
    assert list(found.reports[1].clients_dropped) == ["1"]
    assert "steps" in found.reports[1].clients_dropped["1"]
    assert run(edit=edit).reports[1].clients_used == NAMES


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_stacked_factors_multiply_to_the_weighted_sum_of_products(clients, rank, inputs, outputs, seed):
    layout = make_layout({"blocks.0.fc.lora_A.weight": (rank, inputs), "blocks.0.fc.lora_B.weight": (outputs, rank)})
    generator = torch.Generator().manual_seed(seed)
    vectors = list(torch.randn(clients, layout.size, generator=generator))
    weights = torch.rand(clients, generator=generator).tolist()
    dense = torch.zeros(outputs, inputs, dtype=torch.float64)
    for weight, vector in zip(weights, vectors, strict=True):
        a, b = layout.views(vector.double()).values()
        dense += weight * b @ a
    found = stacked_products(vectors, weights, layout)
    assert found["blocks.0.fc.A"].shape == (clients * rank, inputs)
    product = found["blocks.0.fc.B"].double() @ found["blocks.0.fc.A"].double()
    torch.testing.assert_close(product, dense, rtol=0, atol=1e-5)


def test_of_a_frozen_factor_only_the_weighted_sum_of_the_other_is_sent():
    vectors = [torch.tensor(update_of(name, layout=FROZEN_A)) for name in NAMES]
    found = stacked_products(vectors, SHARES.tolist(), FROZEN_A)
    assert list(found) == ["blocks.0.attn.qkv.B", "blocks.1.attn.qkv.B"]
    expected = weighted_factors(SHARES[:, None] * np.ones(2), layout=FROZEN_A)
    close([factor.flatten().numpy() for factor in found.values()], expected)


def evaluations(into):
    def evaluate(server_round, arrays):
        into.append(ArrayRecord(dict(arrays)))
        return MetricRecord({"accuracy": 0.5, "loss": 1.0})

    return evaluate


def test_products_are_evaluated_and_the_merged_model_is_sent_on():
    seen = []
    found = run(BY_ROUND, rounds=2, evaluated="products", evaluate_fn=evaluations(seen))
    plain = run(BY_ROUND, rounds=2)
    np.testing.assert_array_equal(found.flat, plain.flat)
    for (_, _, received), (_, _, expected) in zip(found.script.heard, plain.script.heard, strict=True):
        np.testing.assert_array_equal(received, expected)

    assert list(seen[0]) == [FLAT]
    for server_round, arrays in enumerate(seen[1:], start=1):
        for layer in lora_layers(LAYOUT):
            product = 0.0
            for share, name in zip(SHARES, NAMES, strict=True):
                views = LAYOUT.views(torch.tensor(update_of(name, server_round)))
                product = product + share * (views[layer.b.name] @ views[layer.a.name]).numpy()
            close(arrays[f"{layer.name}.B"].numpy() @ arrays[f"{layer.name}.A"].numpy(), product)
    np.testing.assert_array_equal(array_to_flat(seen[2][FLAT], LAYOUT.size), found.flat)


def test_by_default_the_merged_model_is_what_is_evaluated():
    seen = []
    run(BY_ROUND, evaluate_fn=evaluations(seen))
    assert [list(arrays) for arrays in seen] == [[FLAT], [FLAT]]


def test_the_report_tells_the_weights_of_the_clients_used():
    variance = {"0": [1.0, 1.0, 1.0], "2": [1.0, 1.0, 1.0], "3": [2.0, 2.0, 2.0]}

    def edit(name, server_round, content):
        if name == "1":
            del content[SIGNALS]
        return content

    details = run({"class-variance": variance}, edit=edit).reports[1].details
    assert details["head_weights"] == [[0.25] * 3, [0.25] * 3, [0.5] * 3]
    assert details["adapter_weights"] == [[pytest.approx(1 / 3, abs=1e-6)] * 2] * 3


@pytest.mark.parametrize("lora_merge", ["factors", "product_svd"])
def test_what_is_neither_adapter_nor_head_is_merged_by_samples_and_a_frozen_factor_stays_away(lora_merge):
    signals = {"score-a": lambda *_: [0.0, 0.0], "score-b": {"0": [1.0, 2.0], "3": [3.0, 4.0]}}
    found = run(signals, layout=FROZEN_A, lora_merge=lora_merge)
    weights = np.array(found.reports[1].details["adapter_weights"])
    assert weights.std() > 0.01
    close(factors_of(found.flat, FROZEN_A), weighted_factors(weights, layout=FROZEN_A))
    norms = [FROZEN_A.views(torch.tensor(update_of(name, layout=FROZEN_A)))["norm.weight"].numpy() for name in NAMES]
    close(FROZEN_A.views(torch.tensor(found.flat))["norm.weight"].numpy(), SHARES @ norms)


def test_the_products_of_weighted_clients_are_merged_where_asked_for():
    found = run(BY_ROUND, lora_merge="product_svd")
    weights = np.array(found.reports[1].details["adapter_weights"])
    for index, layer in enumerate(lora_layers(LAYOUT)):
        dense = np.zeros((6, 4))
        for name, weight in zip(NAMES, weights[:, index], strict=True):
            views = LAYOUT.views(torch.tensor(update_of(name)).double())
            dense += weight * (views[layer.b.name] @ views[layer.a.name]).numpy()
        u, s, vh = np.linalg.svd(dense)
        views = LAYOUT.views(torch.tensor(found.flat))
        product = (views[layer.b.name] @ views[layer.a.name]).numpy()
        np.testing.assert_allclose(product, u[:, :2] * s[:2] @ vh[:2], atol=1e-4)


def test_a_model_without_adapter_is_merged_by_its_head():
    layout = make_layout({"head.weight": (3, 4), "head.bias": (3,)})
    found = run({"class-variance": {"0": [7.0, 7.0, 7.0]}}, layout=layout)
    expected = sum(w * update_of(name, layout=layout) for w, name in zip((0.7, 0.1, 0.1, 0.1), NAMES, strict=True))
    close(found.flat, expected)


def test_a_model_without_a_head_is_refused_at_the_start():
    layout = make_layout({"blocks.0.fc.lora_A.weight": (1, 2), "blocks.0.fc.lora_B.weight": (3, 1)})
    with pytest.raises(ModelError, match="no linear head"):
        run(layout=layout)
