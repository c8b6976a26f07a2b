"""The arithmetic and the words of a sweep's table."""

from tools.sweep.jobs import JobResult
from tools.sweep.table import sweep_table


def result(strategy, seed, final, **values):
    overrides = [f"strategy={strategy}", f"seed={seed}", "train.lr=0.01"]
    fields = {"clients": 3, "config": {}, "status": "finished", "clients_mean": 0.4, "clients_worst": 0.2}
    fields |= {"rounds": 2, "round_seconds": 10.0, "bytes_down": 1_000_000, "bytes_up": 3_000_000}
    return JobResult(key="any", seed=seed, final=final, overrides=overrides, **{**fields, **values})


def test_rows_are_means_over_seeds():
    """By hand: 50, 52, 54 have mean 52 and deviation 2."""
    results = [result("fedavg", seed, final) for seed, final in enumerate([0.50, 0.52, 0.54])]
    results.append(result("livar", 0, 0.6, round_seconds=20.0))
    results.append(result("livar", 1, None, status="failed", reason="The link died.\nmore"))
    lines = sweep_table(results).splitlines()
    assert lines[2:4] == [
        "| strategy=fedavg | 52.0 ± 2.0 (3) | 40.0 ± 0.0 (3) | 20.0 ± 0.0 (3) | 10.0 | 2.0 |",
        "| strategy=livar | 60.0 (1) | 40.0 (1) | 20.0 (1) | 20.0 | 2.0 |",
    ]
    assert "- All with: train.lr=0.01." in lines
    assert lines[-1] == "- Missing, failed: strategy=livar seed=1 train.lr=0.01: The link died."


def test_a_sweep_over_seeds_alone_has_one_row():
    assert "| all | 55.0 ± 7.1 (2) |" in sweep_table([result("livar", 0, 0.5), result("livar", 1, 0.6)])
