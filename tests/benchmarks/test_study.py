"""The study runner: what is run, kept, run again and shown; with a stand-in for Flower, and once with the real one."""

import json
import time
import tomllib
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml

from benchmarks.study.__main__ import main
from benchmarks.study.cells import Cell, compared_cells, config_of, run_config_of, tuning_cells
from benchmarks.study.ledger import Ledger
from benchmarks.study.results import CellResult
from benchmarks.study.runner import StudyRunner
from benchmarks.study.study import read_study
from benchmarks.study.table import accuracy_table, cost_table, study_tables
from server_app.compose import compose_run
from strategies.replies import Evaluation
from strategies.report import RoundReport
from task.errors import ConfigError, PetalwiseError
from tests.conftest import REPOSITORY
from tools.alone import alone
from tools.configs import same_config
from tools.results import Store
from tools.simulation import RunOutcome
from tools.tables import spread

STUDIES = sorted((REPOSITORY / "benchmarks" / "studies").glob("*.yaml"))
TINY = {
    "name": "tiny",
    "clients": 4,
    "base": {"config": {"num-server-rounds": 1}, "overrides": ["train.max_steps=2"]},
    "settings": [{"name": "beta0.3"}, {"name": "iid", "clients": 3, "config": {"partition": "iid"}}],
    "methods": [{"name": "fedavg", "strategy": "fedavg"}, {"name": "prox", "strategy": "fedprox", "tune": {}}],
    "seeds": [0, 1],
    "tuning": {
        "setting": "iid",
        "seed": 100,
        "overrides": ["dataset.central_test_fraction=0.3"],
        "grid": {"train.lr": [0.001, 0.002, 0.004]},
    },
}
UNTUNED = {**TINY, "tuning": {}}
KEYS = [f"{s}__{m}__seed{seed}" for seed in (0, 1) for s in ("beta0.3", "iid") for m in ("fedavg", "prox")]
TUNED = [f"tune__fedavg__train.lr={rate}" for rate in (0.001, 0.002, 0.004)]


def study_file(tmp_path, values=TINY):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def ledger_of(tmp_path, values=TINY):
    return Ledger(read_study(study_file(tmp_path, values)), Store(tmp_path / "results", CellResult))


@cache
def composed(run_config):
    return compose_run(json.loads(run_config))


class FakeLink:
    """Leaves a run folder as a run does; its accuracy is ten learning rates. ``fail`` maps parts of keys to how."""

    def __init__(self, fail=None):
        self.keys, self.clients, self.fail, self.opened, self.after = [], [], fail or {}, 0, lambda: None

    @contextmanager
    def __call__(self):
        self.opened += 1
        yield self

    def run(self, app, *, run_config, clients, runs_dir, timeout, output):
        key = runs_dir.name
        self.keys.append(key)
        self.clients.append(clients)
        self.after()
        trouble = next((trouble for part, trouble in self.fail.items() if part in key), None)
        if isinstance(trouble, BaseException):
            raise trouble
        if trouble:
            return RunOutcome(1, "finished:failed", "no details", 5.0, f"INFO : begins\n{trouble}\nERROR : more\n")
        (folder := runs_dir / "20260101-000000-any" / "adapter").mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_text("weights")
        self.leave(folder.parent, run_config)
        return RunOutcome(1, "finished:completed", "", 60.0, "")

    def leave(self, folder, run_config):
        run_config = tomllib.loads(Path(run_config[0]).read_text())
        assert Path(run_config.pop("runs-dir")) == folder.parent
        run = composed(json.dumps(run_config))
        (folder / "config.yaml").write_text(run.yaml)
        accuracy = 10 * run.settings.train.lr
        reports = [report(0, accuracy / 2), report(1, accuracy, bytes_up=3_000_000, bytes_down=1_000_000)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in reports))


def report(number, accuracy, **values):
    found = RoundReport(number, central={"accuracy": accuracy, "loss": 1.0}, seconds={"total": 12.0})
    found.evaluated([Evaluation("0", 4, 0.25, 1.0), Evaluation("1", 4, 0.75, 1.0)], number)
    found.clients_dropped = {"1": "late"} if number else {}
    return {**found.to_dict(), **values}


def run(ledger, link=None, **options):
    link = link or FakeLink()
    good = StudyRunner(ledger, link, **options).run()
    return link, good


def test_cells_come_by_seed_and_tuning_first(tmp_path):
    ledger = ledger_of(tmp_path)
    assert [cell.key for cell in tuning_cells(ledger.study)] == TUNED
    assert [cell.key for cell in compared_cells(ledger.study)] == KEYS
    link, good = run(ledger)
    assert good
    assert link.keys == TUNED + KEYS
    assert link.clients == [3] * 3 + [4, 4, 3, 3] * 2
    assert link.opened == 1


def test_a_run_config_goes_from_the_general_to_the_special(tmp_path):
    study = ledger_of(tmp_path).study
    study.settings[1].overrides, study.methods[0].overrides = ["partition.min_samples=2"], ["train.batch_size=8"]
    assert run_config_of(study, tuning_cells(study)[1]) == {
        "partition": "iid",
        "num-server-rounds": 1,
        "strategy": "fedavg",
        "seed": 100,
        "overrides": "train.max_steps=2 partition.min_samples=2 train.batch_size=8 "
        "dataset.central_test_fraction=0.3 train.lr=0.002",
    }
    compared = run_config_of(study, Cell("beta0.3", "prox", 1))
    assert compared == {"num-server-rounds": 1, "strategy": "fedprox", "seed": 1, "overrides": "train.max_steps=2"}


def test_what_is_kept_of_a_cell(tmp_path):
    ledger = ledger_of(tmp_path, UNTUNED)
    run(ledger, only="iid__fedavg__seed1")
    kept = json.loads((tmp_path / "results" / "cells" / "iid__fedavg__seed1.json").read_text())
    assert len(kept.pop("commit")) == 40
    assert kept.pop("dirty") in (True, False)
    assert kept == {
        "key": "iid__fedavg__seed1",
        "setting": "iid",
        "method": "fedavg",
        "seed": 1,
        "clients": 3,
        "values": {},
        "config": config_of(ledger.study, Cell("iid", "fedavg", 1)),
        "status": "finished",
        "reason": "",
        "accuracy": {"0": 0.015, "1": 0.03},
        "final": 0.03,
        "best": 0.03,
        "clients_accuracy": {"0": 0.25, "1": 0.75},
        "clients_mean": 0.5,
        "clients_worst": 0.25,
        "clients_deviation": 0.25,
        "tuned_accuracy": {},
        "tuned_mean": None,
        "tuned_worst": None,
        "tuned_deviation": None,
        "lengthened_share": None,
        "dropped": 1,
        "rounds": 1,
        "bytes_down": 1_000_000,
        "bytes_up": 3_000_000,
        "round_seconds": 12.0,
        "seconds": 60.0,
    }
    (folder,) = (tmp_path / "results" / "runs" / "iid__fedavg__seed1").glob("*-any")
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_finished_cells_are_not_run_again_and_an_interrupt_loses_only_the_cell_at_work(tmp_path, capsys):
    ledger = ledger_of(tmp_path)
    link = FakeLink({"iid__prox__seed0": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run(ledger, link)
    left = KEYS[KEYS.index("iid__prox__seed0") :]
    assert run(ledger)[0].keys == left
    assert "6 of 11 cells are finished already" in capsys.readouterr().out
    again, good = run(ledger)
    assert good
    assert (again.keys, again.opened) == ([], 0)


def test_a_changed_config_makes_its_cells_to_be_run(tmp_path):
    run(ledger_of(tmp_path, UNTUNED))
    changed = json.loads(json.dumps(UNTUNED))
    changed["methods"][1]["overrides"] = ["strategy.proximal_mu=0.5"]
    changed["settings"][1]["clients"] = 5
    ledger = ledger_of(tmp_path, changed)
    assert "its config has changed: beta0.3 prox seed 0, 1; iid fedavg seed 0, 1; " in study_tables(ledger)
    assert run(ledger)[0].keys == [key for key in KEYS if "prox" in key or "iid" in key]


def test_a_config_edited_while_a_cell_ran_is_found_out(tmp_path, monkeypatch):
    ledger = ledger_of(tmp_path, UNTUNED)
    cell = Cell("iid", "prox", 0)
    monkeypatch.setattr("benchmarks.study.running.config_of", lambda study, cell: {"as": "planned"})
    run(ledger, only=cell.key)
    assert ledger.done(cell)  # what is kept is the run's own config.yaml


def test_a_key_that_the_app_has_got_since_must_have_its_default():
    default = {"seed": 0, "train": {"lr": 1.0, "new": 5}, "wire": {"dtype": "float32"}}
    kept = {"seed": 1, "train": {"lr": 2.0}}
    assert same_config(kept, {"seed": 1, "train": {"lr": 2.0, "new": 5}, "wire": {"dtype": "float32"}}, default)
    assert not same_config(kept, {"seed": 1, "train": {"lr": 2.0, "new": 6}, "wire": {"dtype": "float32"}}, default)
    assert not same_config(kept, {"seed": 1, "train": {"lr": 2.0, "new": 5}, "wire": {"dtype": "int8"}}, default)
    assert not same_config(kept, {"seed": 2, "train": {"lr": 2.0}}, default)
    assert not same_config(kept, {"seed": 1, "train": {}}, default), "a key that is gone"


def test_the_rate_of_the_best_tuning_run_is_used_everywhere(tmp_path, capsys):
    ledger = ledger_of(tmp_path)
    assert ledger.choice("prox").values == ()
    assert ledger.choice("fedavg") is None
    link = FakeLink({"lr=0.004": "ERROR : The run stops: diverged."})
    assert not run(ledger, link)[1]
    choice = ledger.choice("fedavg")
    assert choice.values == (("train.lr", 0.002),)
    assert [final for _, final in choice.tried] == [0.01, 0.02, None]
    assert choice.edges == ()
    kept = [ledger.store.read(key) for key in KEYS]
    assert {(result.method, *result.values.items()) for result in kept} == {
        ("fedavg", ("train.lr", 0.002)),
        ("prox",),
    }
    run(ledger, FakeLink())  # the failed rate is tried again, wins, and the cells with the other are run again
    assert ledger.choice("fedavg").values == (("train.lr", 0.004),)
    assert {ledger.store.read(key).final for key in KEYS if "fedavg" in key} == {0.04}
    assert "fedavg: train.lr=0.004 of train.lr=0.001 1.0 %, train.lr=0.002 2.0 %, train.lr=0.004 4.0 %; " in (
        text := study_tables(ledger)
    )
    assert "train.lr is at the edge of the grid" in text
    assert "on setting iid with seed 100 and dataset.central_test_fraction=0.3" in text


def test_equal_rates_give_the_first(tmp_path):
    ledger = ledger_of(tmp_path)
    for cell in tuning_cells(ledger.study):
        result = kept(cell.setting, cell.method, cell.seed, 0.5)
        ledger.store.write(replace(result, key=cell.key, clients=3, config=config_of(ledger.study, cell)))
    assert ledger.choice("fedavg").values == (("train.lr", 0.001),)


def test_only_some_cells_and_the_tuning_they_need(tmp_path):
    ledger = ledger_of(tmp_path)
    assert run(ledger, only="*prox*seed0")[0].keys == ["beta0.3__prox__seed0", "iid__prox__seed0"]
    assert run(ledger, only="tune*0.001")[0].keys == TUNED[:1]
    assert run(ledger, only="iid__fedavg__seed1")[0].keys == [*TUNED[1:], "iid__fedavg__seed1"]
    with pytest.raises(ConfigError, match=r"--only 'nosuch' matches none .* named like beta0.3__fedavg__seed0"):
        run(ledger, only="nosuch")


def test_methods_whose_tuning_fails_are_not_run(tmp_path, capsys):
    ledger = ledger_of(tmp_path)
    link, good = run(ledger, FakeLink({"tune": "ERROR : The run stops: diverged."}))
    assert not good
    assert link.keys == TUNED + [key for key in KEYS if "prox" in key]
    assert "iid__fedavg__seed0: not run, since no tuning run of fedavg could finish" in capsys.readouterr().out
    assert "Not tuned yet: fedavg." in study_tables(ledger)


def test_failed_and_refused_cells_are_kept_shown_and_tried_again(tmp_path, capsys):
    ledger = ledger_of(tmp_path, UNTUNED)
    lost = PetalwiseError("The SuperLink has died.")
    reason = "0 client(s) can take part. Refused: all 4: too few images"
    link = FakeLink({"iid__prox__seed0": lost, "beta0.3__prox__seed0": f"ERROR :     The run stops: {reason}"})
    link.fail["beta0.3__fedavg__seed1"] = "MemoryError: all is full"
    _, good = run(ledger, link)
    assert not good
    assert len(link.keys) == len(KEYS)
    assert link.opened == 2
    found = {key: (ledger.store.read(key).status, ledger.store.read(key).reason) for key in KEYS}
    assert found["beta0.3__prox__seed0"] == ("refused", reason)
    assert found["iid__prox__seed0"] == ("failed", "The SuperLink has died.")
    status, why = found["beta0.3__fedavg__seed1"]
    assert status == "failed"
    assert why.startswith("Run 1 ended as finished:failed after 5 s: no details")
    assert (tmp_path / "results" / "runs" / "beta0.3__fedavg__seed1" / "log.txt").exists()
    assert f"[2/8] beta0.3__prox__seed0: refused after 5 s: {reason}; 6 more, about" in capsys.readouterr().out
    text = study_tables(ledger)
    assert f"Missing, refused: {reason}: beta0.3 prox seed 0." in text
    assert "Missing, failed: The SuperLink has died: iid prox seed 0." in text
    again, good = run(ledger)
    assert good
    assert again.keys == ["beta0.3__prox__seed0", "iid__prox__seed0", "beta0.3__fedavg__seed1"]


def test_a_run_without_a_final_evaluation_is_not_finished(tmp_path, monkeypatch):
    ledger, link = ledger_of(tmp_path, UNTUNED), FakeLink()
    monkeypatch.setitem(globals(), "report", lambda *a, f=report, **v: {**f(*a, **v), "central": {}})
    assert not run(ledger, link, only=KEYS[0])[1]
    assert ledger.store.read(KEYS[0]).reason == "The server evaluated nothing after the last round."


def test_no_cell_starts_after_the_time_limit(tmp_path, capsys, monkeypatch):
    ledger, link = ledger_of(tmp_path, UNTUNED), FakeLink()
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    link.after = lambda: now.__setitem__(0, now[0] + 60)
    assert run(ledger, link, minutes=1.5)[1]
    assert link.keys == KEYS[:2]
    out = capsys.readouterr().out
    assert "[1/8] beta0.3__fedavg__seed0: 3.0 % in 60 s, dropped replies: 1; 7 more, about 7 min" in out
    assert "the same command goes on with the 6 cells left" in out


def kept(setting, method, seed, final, **values):
    fields = {"key": f"{setting}__{method}__seed{seed}", "clients": 4, "values": {}, "config": {}}
    fields |= {"status": "finished", "final": final, **values}
    return CellResult(setting=setting, method=method, seed=seed, **fields)


def test_the_arithmetic_of_the_tables(tmp_path):
    """By hand: 50, 52, 54 have mean 52 and deviation 2; the differences 1, 3 have mean 2 and deviation sqrt(2)."""
    study = read_study(study_file(tmp_path, UNTUNED))
    cost = {"rounds": 2, "round_seconds": 10.0, "bytes_down": 1_000_000, "bytes_up": 3_000_000}
    results = [kept("iid", "fedavg", seed, accuracy, **cost) for seed, accuracy in enumerate([0.50, 0.52, 0.54])]
    results += [kept("iid", "prox", 0, 0.51, **cost), kept("iid", "prox", 2, 0.57, **{**cost, "round_seconds": 20.0})]
    results += [kept("beta0.3", "prox", 0, 0.4)]
    assert accuracy_table(study, results, lambda result: result.final).splitlines() == [
        "| method | beta0.3 | difference | iid | difference |",
        "| --- | --- | --- | --- | --- |",
        "| fedavg | - | - | 52.0 ± 2.0 (3) | - |",
        "| prox | 40.0 (1) | - | 54.0 ± 4.2 (2) | +2.0 ± 1.4 (2) |",
    ]
    assert cost_table(study, results[:-1]).splitlines()[2:] == [
        "| fedavg | - | - | 10.0 | 2.0 |",
        "| prox | - | - | 15.0 | 2.0 |",
    ]
    assert spread([-0.25], sign="+") == "-0.2 (1)"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"methods": []}, "methods is empty; a study needs at least one of them."),
        ({"setings": []}, "The config has no key 'setings'; it has: .* Did you mean 'settings'?"),
        ({"name": "a/b"}, "name has the name 'a/b'; use letters, digits, dots, dashes, single underscores."),
        ({"methods": [{"name": "m", "strategy": "fedavg"}] * 2}, "methods has the name 'm' twice."),
        ({"methods": [{"name": "m"}]}, "methods.*strategy.*"),
        ({"seeds": [0, 0]}, r"seeds=\[0, 0\] must hold at least one seed, and none twice."),
        ({"seeds": [-1]}, "seeds=-1 must be at least 0."),
        ({"seeds": [100]}, r"tuning.seed=100 is among the compared seeds \[100\]; .*"),
        ({"base": {"config": {"seed": 1}}}, "base.config has 'seed'; it may have: backbone, dataset, partition, .*"),
        ({"tuning": {"setting": "x", "grid": {"train.lr": [1]}}}, "tuning.setting='x' is not one of the settings: .*"),
        ({"tuning": {"grid": {"train.lr": []}}}, "The tuning grid of fedavg has no values for 'train.lr'."),
        ({"clients": "many"}, "clients: .*"),
    ],
)
def test_a_wrong_study_file_is_refused_in_one_sentence(tmp_path, capsys, change, sentence):
    path = study_file(tmp_path, {**TINY, **change})
    with pytest.raises(ConfigError, match=f"{path}: {sentence.removesuffix('?')}") as caught:
        read_study(path)
    assert len(str(caught.value).splitlines()) == 1
    assert main([str(path)]) == 2
    assert capsys.readouterr().err == f"{caught.value}\n"


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "a: [\n", ""])
def test_a_file_that_is_no_study_is_refused(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="odd.yaml"):
        read_study(path)
    with pytest.raises(ConfigError, match=r"nosuch.yaml cannot be read: .*No such file"):
        read_study(tmp_path / "nosuch.yaml")


def test_what_the_app_would_refuse_is_refused_before_the_first_cell(tmp_path):
    values = json.loads(json.dumps(UNTUNED))
    values["methods"][1]["overrides"] = ["train.lrr=1"]
    link = FakeLink()
    with pytest.raises(ConfigError, match=r"^beta0.3__prox__seed0: train has no key 'lrr'"):
        run(ledger_of(tmp_path, values), link)
    assert link.opened == 0


def test_the_command_refuses_folders_seeds_damage_and_company(tmp_path, capsys):
    command = [str(study_file(tmp_path)), "--folder", str(tmp_path / "results")]
    assert main([*command, "--data", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main([*command, "--seeds", "100"]) == 2
    assert "tuning.seed=100 is among the compared seeds" in capsys.readouterr().err
    with alone(tmp_path / "results" / "tiny", "The study"):
        assert main(command) == 2
    assert "is being run by another process" in capsys.readouterr().err
    (cells := tmp_path / "results" / "tiny" / "cells").mkdir()
    (cells / f"{KEYS[1]}.json").write_text("{}")
    assert main([*command, "--table"]) == 2
    assert "delete it to run that again" in capsys.readouterr().err


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_packaged_studies_compose(path):
    study = read_study(path)
    assert study.name == path.stem
    for cell in tuning_cells(study)[:1]:
        config_of(study, cell)
    for method in study.methods:
        config_of(study, Cell(study.settings[0].name, method.name, 0))
    for setting in study.settings:
        config_of(study, Cell(setting.name, study.methods[0].name, 0))


@pytest.mark.e2e
@pytest.mark.slow
def test_a_real_study_runs_and_resumes(tmp_path, capsys):
    """A cell finishes and one is refused for its partition; only that one would be run again."""
    values = {**UNTUNED, "settings": [{"name": "beta0.3"}], "seeds": [0]}
    values["base"] = {
        "config": {"num-server-rounds": 1},
        "overrides": ["train.max_steps=2", "dataset.max_train_samples=200", "dataset.max_test_samples=50"],
    }
    broken = {"name": "prox", "strategy": "fedprox", "overrides": ["partition.min_samples=190"]}
    path = study_file(tmp_path, {**values, "methods": [UNTUNED["methods"][0], broken]})
    assert main([str(path), "--folder", str(tmp_path / "results"), "--in-process"]) == 1
    out = capsys.readouterr().out
    assert "beta0.3__prox__seed0: refused after" in out
    assert "fewer than partition.min_samples=190; images per client:" in out

    ledger = Ledger(read_study(path), Store(tmp_path / "results" / "tiny", CellResult))
    result = ledger.result(Cell("beta0.3", "fedavg", 0))  # none if the run's config were not the planned one
    assert result.finished
    assert (result.rounds, result.dropped, set(result.accuracy)) == (1, 0, {"0", "1"})
    assert set(result.clients_accuracy) == {"0", "1", "2", "3"}
    assert f"| fedavg | {100 * result.final:.1f} (1) | - |" in out
    assert not list((tmp_path / "results").rglob("adapter*"))
    assert run(ledger)[0].keys == ["beta0.3__prox__seed0"]
