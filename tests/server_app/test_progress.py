"""One line per round."""

from pathlib import Path

import pytest

from server_app.progress import Progress, closing
from strategies.report import RoundReport


def report(server_round, accuracy=None, seconds=10.0, **fields):
    central = {} if accuracy is None else {"accuracy": accuracy, "loss": 1.0}
    return RoundReport(server_round, central=central, seconds={"total": seconds}, **fields)


def test_round_0_tells_the_accuracy_alone():
    assert Progress(20).line(report(0, 0.1)) == "round  0/20  accuracy  10.0 %"


def test_a_round_tells_everything():
    progress = Progress(20, clients_evaluate=True)
    progress.line(report(0, 0.1))
    line = progress.line(
        report(
            1,
            0.3456,
            seconds=12.34,
            clients_accuracy_mean=0.5,
            train_loss=1.23456,
            clients_used=["a", "b"],
            clients_dropped={"b": "evaluation: late", "c": "late"},
            cohort=3,
            bytes_down=2_500_000,
            bytes_up=1_240_000,
        )
    )
    assert line == (
        "round  1/20  accuracy  34.6 % (+24.6)   clients' accuracy  50.0 %  train loss  1.2346  clients 2/3  "
        "2.5 MB down 1.2 MB up   12.3 s  ETA 3:54"
    )


def test_the_change_is_to_the_last_known_accuracy():
    progress = Progress(4)
    assert "(" not in progress.line(report(1, 0.5))
    assert "accuracy     - " in progress.line(report(2))
    assert "accuracy  40.0 % (-10.0)" in progress.line(report(3, 0.4))
    assert "accuracy  40.0 % ( +0.0)" in progress.line(report(4, 0.4))


def test_lines_are_aligned_whether_or_not_a_round_was_evaluated_or_merged():
    progress = Progress(10, clients_evaluate=True)
    lines = [
        progress.line(report(1, 0.05, train_loss=2.0, clients_accuracy_mean=0.1)),
        progress.line(report(2, 0.15, train_loss=2.0, clients_accuracy_mean=1.0)),
        progress.line(report(3, 1.0)),
        progress.line(report(4, complete=False)),
        progress.line(report(10)),
    ]
    for label in ("accuracy", "clients' accuracy", "train loss", "clients 0"):
        assert len({line.index(label) for line in lines}) == 1, label


def test_a_round_inside_a_window_says_that_this_is_why_it_has_no_accuracy():
    progress = Progress(4, clients_evaluate=True)
    progress.line(report(0, 0.1))
    line = progress.line(report(1, complete=False))
    assert line.startswith("round 1/4  accuracy  window           clients' accuracy  window  train loss")
    assert "accuracy  40.0 % (+30.0)" in progress.line(report(2, 0.4))


def test_a_server_without_images_has_no_accuracy_in_any_round():
    progress = Progress(4)
    progress.line(report(0))
    for complete in (True, False):
        assert "accuracy     - " in progress.line(report(1, complete=complete))


@pytest.mark.parametrize(
    ("seconds", "expected"), [([60.0], "4:00"), ([100.0, 1.0, 1.0, 1.0], "0:01"), ([0.0], "0:00"), ([900.0], "60:00")]
)
def test_time_left_is_the_mean_of_the_last_three_rounds(seconds, expected):
    progress = Progress(5)
    for server_round, spent in enumerate(seconds, start=1):
        line = progress.line(report(server_round, seconds=spent))
    assert line.endswith(f"ETA {expected}")


def test_nothing_is_left_after_the_last_round():
    assert Progress(1).line(report(1)).endswith("ETA 0:00")


def test_a_run_is_summed_up_in_a_table():
    accuracies = [0.1, 0.6, 0.5]
    reports = [
        RoundReport(
            number,
            merged=number > 0,
            central={"accuracy": accuracy},
            clients_used=["0", "1"] if number else [],
            clients_dropped={"2": "late"} if number == 2 else {},
            bytes_down=1_000_000,
            bytes_up=500_000,
            seconds={"total": 2.0},
        )
        for number, accuracy in enumerate(accuracies)
    ]
    assert closing(reports, Path("runs/a")).splitlines() == [
        "Finished after 2 rounds.",
        "  accuracy           10.0 % in round 0, 50.0 % in round 2 (best 60.0 % in round 1)",
        "  rounds             2 merged of 2",
        "  updates            4 merged, 1 dropped",
        "  traffic            3.0 MB down, 1.5 MB up",
        "  time               4.0 s in rounds",
        "  run folder         runs/a",
    ]
