"""What a job's overrides become: a run config, a name, a refusal."""

import logging
import math
import re

import pytest

from server_app.compose import compose_run
from task.errors import ConfigError
from tools.configs import composed_config
from tools.results import Store
from tools.running import Runner
from tools.sweep.jobs import JobResult, Sweep, job_key, run_config_of
from tools.sweep.multirun import multirun


def no_link():
    raise AssertionError("no run was to be started")


@pytest.fixture
def sweep(tmp_path):
    return Sweep(Runner(no_link), Store(tmp_path, JobResult), 3)


def jobs_of(overrides, folder):
    found = []
    multirun(lambda composed, choice, own: found.append((choice, composed.seed, own)) or 0.0, overrides, folder)
    return found


def test_hydras_sweeper_makes_the_jobs(tmp_path):
    overrides = ["strategy=fedavg,livar_ccvr", "seed=range(1,3)", 'dataset.classes=["rose, wild",tulip]']
    jobs = jobs_of(overrides, tmp_path)
    assert [job[:2] for job in jobs] == [("fedavg", 1), ("fedavg", 2), ("livar_ccvr", 1), ("livar_ccvr", 2)]
    assert (tmp_path / "multirun.yaml").exists()
    run = compose_run(run_config_of(jobs[2][2]))
    assert (run.choice, run.settings.seed) == ("livar_ccvr", 1)
    assert run.settings.dataset.classes == ["rose, wild", "tulip"]


def test_first_class_keys_go_by_name_into_the_run_config():
    overrides = ["strategy=fedprox", "num_server_rounds=2", "train.lr=0.001", "wire.dtype=int8"]
    assert run_config_of(overrides) == {
        "strategy": "fedprox",
        "num-server-rounds": 2,
        "overrides": "train.lr=0.001 wire.dtype=int8",
    }


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["strategy=fedavgg,livar"], r"strategy='fedavgg' is not one of: .* Did you mean 'fedavg'\?"),
        (["train.lrr=1,2"], "train has no key 'lrr'"),
        (["seed"], "The override 'seed' is not of the form key=value"),
    ],
)
def test_what_hydra_refuses_is_refused_before_the_first_job(tmp_path, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        jobs_of(overrides, tmp_path)


def test_a_combination_that_the_app_refuses_is_told_and_not_run(tmp_path, sweep, capsys):
    told = []
    multirun(lambda *job: told.append(sweep.job(*job)) or told[-1], ["privacy=local", "strategy=livar"], tmp_path)
    assert math.isnan(told[0]), "no number for an optimising sweeper"
    [result] = sweep.results
    assert result.status == "refused"
    assert result.reason.startswith("privacy=local does not go with strategy=livar")
    assert "[1] privacy=local strategy=livar: refused: privacy=local does not" in capsys.readouterr().out


def test_a_finished_run_is_taken_only_under_its_config_and_clients(tmp_path, sweep):
    overrides = ["strategy=fedavg", "seed=1"]
    config = {key: value for key, value in composed(overrides).items() if key != "runs_dir"}
    key = job_key(overrides, 3)
    kept = JobResult(key=key, seed=1, clients=3, config=config, status="finished", final=0.5, overrides=overrides)
    sweep._store.write(kept)
    multirun(sweep.job, overrides, tmp_path)
    assert sweep.results == [kept]
    sweep._store.write(JobResult(**{**vars(kept), "config": {**config, "seed": 7}}))
    with pytest.raises(AssertionError, match="no run was to be started"):
        multirun(sweep.job, overrides, tmp_path)


def test_a_name_is_of_the_overrides_in_any_order_and_of_the_clients():
    name = job_key(["strategy=fedavg", "data=/a/../b c"], 3)
    assert re.fullmatch(r"strategy=fedavg,data=-a-..-b-c-[0-9a-f]{10}", name)
    assert job_key(["data=/a/../b c", "strategy=fedavg"], 3)[-10:] == name[-10:] != job_key([], 3)[-10:]
    assert job_key(["strategy=fedavg", "data=/a/../b c"], 4) != name


def composed(overrides):
    return composed_config(run_config_of(overrides))


def test_hydra_leaves_this_process_logging_as_it_is(tmp_path):
    logger = logging.getLogger("flwr")
    before = (logger.disabled, logger.level, logging.getLogger().level)
    multirun(lambda composed, choice, overrides: 0.0, ["seed=1"], tmp_path)
    assert (logger.disabled, logger.level, logging.getLogger().level) == before
