"""Mistakes in a run of this app are told before Flower is started."""

import pytest

from server_app.compose import compose_run
from task.errors import ConfigError, DataError
from tools.check import APP, check_run
from tools.launch import main


@pytest.mark.parametrize(
    "run_config",
    [
        [],
        ['strategy="fedprox" seed=3', 'overrides="strategy.proximal_mu=0.1 lora.rank=16"'],
        ["missing.toml"],
    ],
)
def test_what_can_run_passes(run_config):
    check_run(APP, run_config, clients=2)


@pytest.mark.parametrize(
    ("run_config", "sentence"),
    [
        (["strategy=fedprox"], r"""strategy=fedprox is no TOML value: .* -c 'strategy="fedprox"'"""),
        (['stratgy="fedprox"'], r"no key 'stratgy'; it has: strategy, .* Did you mean 'strategy'\?"),
        (['strategy="fedproxx"'], r"strategy='fedproxx' is not one of: .* Did you mean 'fedprox'\?"),
        (['overrides="train.lrr=1"'], "train has no key 'lrr'"),
        (['overrides="seed=1"', 'overrides="train.lr=1"'], "gives 'overrides' twice"),
        (
            ['resume="runs/20200101-livar"'],
            r"resume='runs/20200101-livar': /.*/runs/20200101-livar is no run folder; give",
        ),
        (['overrides="strategy.min_clients=3"'], r"2 client\(s\) would be started, but the strategy waits for 3"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(run_config, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        check_run(APP, run_config, clients=2)
    assert len(str(caught.value).splitlines()) == 1


def test_data_and_backbones_in_folders_need_to_be_there(tmp_path, monkeypatch):
    monkeypatch.delenv("PETALWISE_DATA", raising=False)
    monkeypatch.delenv("PETALWISE_BACKBONES", raising=False)
    flowers = ["dataset='image_folder' overrides='dataset.test_split= dataset.classes=[\"rose, wild\",tulip]'"]
    with pytest.raises(ConfigError, match="'image_folder' lies in a folder: say where by --data /path"):
        check_run(APP, flowers, clients=2)
    with pytest.raises(ConfigError, match="--data .*/missing is no folder"):
        check_run(APP, flowers, clients=2, data=tmp_path / "missing")
    check_run(APP, flowers, clients=2, data=tmp_path)
    monkeypatch.setenv("PETALWISE_DATA", str(tmp_path))
    check_run(APP, flowers, clients=2)
    monkeypatch.setenv("PETALWISE_DATA", str(tmp_path / "missing"))
    check_run(APP, [], clients=2)
    with pytest.raises(ConfigError, match="PETALWISE_DATA .*/missing is no folder"):
        check_run(APP, flowers, clients=2)
    with pytest.raises(ConfigError, match="lies in a folder: say where by --backbones /path"):
        check_run(APP, ['backbone="dinov2_small_file"'], clients=2)


def test_a_folder_for_runs_has_to_be_writable(tmp_path, monkeypatch):
    check_run(APP, [], clients=2, runs_dir=tmp_path / "new" / "runs")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"runs_dir='.*/file/runs' cannot be written: .*/file is no folder\."):
        check_run(APP, [], clients=2, runs_dir=tmp_path / "file" / "runs")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"runs_dir='/elsewhere' cannot be written: / is not writable for this user"):
        check_run(APP, ['runs-dir="/elsewhere"'], clients=2)


def test_a_folder_of_images_needs_the_splits_that_the_config_names(tmp_path):
    (tmp_path / "rose").mkdir()
    images = ['dataset="image_folder"']
    with pytest.raises(DataError, match=r"has no folder 'test'; correct .* \(an empty test_split holds out"):
        check_run(APP, images, clients=2, data=tmp_path)
    check_run(APP, [*images, 'overrides="dataset.test_split="'], clients=2, data=tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / "rose").mkdir(parents=True)
    check_run(APP, images, clients=2, data=tmp_path)


def test_a_table_in_a_file_needs_to_be_there_by_its_whole_path(tmp_path):
    def told(table):
        with pytest.raises(ConfigError) as caught:
            check_run(APP, [f"strategy='livar' overrides='strategy.table={table}'"], clients=2)
        return str(caught.value)

    path = tmp_path / "mine.yaml"
    assert told(path).startswith(f"strategy.table='{path}' is neither one of ")
    path.write_text("weights: [[0.0]]\n")
    assert told(path).endswith("all weights must be positive and finite.")
    assert told("mine.yaml") == "strategy.table='mine.yaml': the server works in another folder; give a whole path."
    path.write_text("weights: [[1.0]]\n")
    check_run(APP, [f"strategy='livar' overrides='strategy.table={path}'"], clients=2)


def test_a_run_to_go_on_with_is_checked_by_its_own_config(tmp_path, monkeypatch):
    monkeypatch.delenv("PETALWISE_DATA", raising=False)
    folder = tmp_path / "20260101-120000-fedavg"
    folder.mkdir()
    overrides = [
        "dataset=image_folder",
        "dataset.test_split=",
        "dataset.classes=[rose,tulip]",
        "strategy.min_clients=6",
    ]
    (folder / "config.yaml").write_text(compose_run({}, overrides).yaml)
    resume = [f'resume="{folder.name}"']
    with pytest.raises(ConfigError, match=r"4 client\(s\) would be started, but the strategy waits for 6"):
        check_run(APP, resume, clients=4, runs_dir=tmp_path)
    with pytest.raises(ConfigError, match="'image_folder' lies in a folder"):
        check_run(APP, resume, clients=6, runs_dir=tmp_path)
    check_run(APP, resume, clients=6, runs_dir=tmp_path, data=tmp_path)
    with pytest.raises(ConfigError, match="is no run folder"):
        check_run(APP, resume, clients=6, data=tmp_path)


def test_a_file_is_checked_too(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('strategy = "fedproxx"\n')
    with pytest.raises(ConfigError, match="'fedproxx' is not one of"):
        check_run(APP, [str(file)], clients=2)


def test_an_app_of_another_make_is_left_to_flower(tmp_path):
    check_run(tmp_path, ['anything="goes"'], clients=1)


def test_the_launcher_starts_nothing_for_a_mistake(capsys):
    assert main([str(APP), "-c", 'strategy="livarr"']) == 2
    captured = capsys.readouterr()
    assert "'livarr' is not one of" in captured.err
    assert not captured.out
