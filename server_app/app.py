"""The Flower ServerApp: composes the config, picks the strategy, runs the rounds, keeps the run folder."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from logging import ERROR, INFO, WARNING, LogRecord
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message
from flwr.common.logger import FLOWER_LOGGER, log
from flwr.serverapp import Grid, ServerApp

from server_app.central import central_evaluation
from server_app.checkpoints import Checkpoint
from server_app.compose import ComposedRun, compose_run
from server_app.gathering import GatheringGrid
from server_app.keeping import RoundKeeping
from server_app.progress import closing
from server_app.resuming import container, flat, open_past
from server_app.run_folder import RunFolder, State
from server_app.saving import save_adapter, save_personal
from server_app.trackers import Tracking
from strategies import SCHEDULES, STRATEGIES, Calibration, LayerwiseStrategy, TaskContext
from strategies.report import RoundReport
from task.arrays import FLAT, flat_to_array
from task.backbone import backbone_folder, build_backbone, resolved
from task.config import TaskConfig, task_to_json
from task.data.images import ImageSet, decode
from task.data.sources import DATA_VARIABLE, load_split, node_location
from task.delivery import packed_backbone
from task.device import choose_device
from task.errors import OtherClientsError, PetalwiseError, StateError
from task.messages import classes_digest
from task.model import AdaptedModel, build_model
from task.seeding import derive_seed

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation; an error ends the run as failed, with its sentence in the log.

    Flower's own line about it then comes without the sentence and the lines of code that it went through, unless
    ``FLWR_LOG_LEVEL=DEBUG``.
    """
    try:
        run_federation(grid, compose_run(context.run_config), str(context.run_config.get("resume", "")))
    except PetalwiseError as error:
        log(ERROR, "The run stops: %s", error)
        told = type(error)(str(error))
        if os.environ.get("FLWR_LOG_LEVEL", "").upper() != "DEBUG":
            FLOWER_LOGGER.addFilter(partial(_without, told))
        raise told from None


def _without(told: Exception, record: LogRecord) -> bool:
    """Let a line of the log pass, without the error under it if that is the one whose sentence has been told."""
    if record.exc_info and record.exc_info[1] is told:
        record.exc_info = None
    return True


def run_federation(grid: Grid, run: ComposedRun, resume: str = "") -> Path:
    """Run the rounds of a composed config, or those that a run still lacks.

    Parameters
    ----------
    grid : Grid
        Connection to the nodes.
    run : ComposedRun
        The checked config.
    resume : str
        Folder of a run to go on with; empty: a new run. See :func:`server_app.resuming.open_past`.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    PetalwiseError
        If config, data, model or clients do not allow the run.
    """
    past = open_past(resume, run) if resume else None
    run = past.run if past else run
    settings = run.settings
    tracking = Tracking(settings.tracker)
    settings.backbone = resolved(settings.backbone)
    names, test = _classes_and_test_images(settings)
    model = build_model(settings, len(names), backbone_folder({}))
    model.to(choose_device("cpu" if settings.train.device == "cpu" else "auto"))
    checkpoint = past.checkpoint if past else None
    strategy = _make_strategy(run, model, names, checkpoint.run if checkpoint else uuid.uuid4().hex)
    folder = past.folder if past else RunFolder.new(Path(settings.runs_dir), run.choice, run.yaml)
    log(INFO, "%s", _banner(run, model, len(names)))
    log(INFO, "Run folder: %s", folder.path)
    keeping = RoundKeeping(folder, run, strategy, past.reports if past else [], tracking)
    tracking.start(dict(flat(container(run.yaml))), folder.path)
    watched = GatheringGrid(grid, lambda messages, answered: folder.note(_state(strategy, messages, answered)))
    with past.kept_if_refused() if past else nullcontext(), _followed(folder, strategy, tracking):
        try:
            _run_rounds(watched, run, strategy, model, test, keeping, checkpoint)
        except (StateError, OtherClientsError):  # before any round: the adapter is still that of the past
            raise
        except BaseException:
            with suppress(Exception):  # why the rounds ended is what is to be told
                _save(folder, strategy, model, run, names, keeping.reports)
            raise
        _save(folder, strategy, model, run, names, keeping.reports)
    log(INFO, "%s", closing(keeping.reports, folder.path))
    return folder.path


@contextmanager
def _followed(folder: RunFolder, strategy: LayerwiseStrategy, tracking: Tracking) -> Iterator[None]:
    """Tell those who watch or track the run how it ends."""
    folder.note(State(phase="starting"))
    try:
        yield
    except BaseException as error:
        folder.note(State("failed", str(error), strategy.report.server_round))
        tracking.end(finished=False)
        raise
    folder.note(State("finished", server_round=strategy.report.server_round))
    tracking.end(finished=True)


def _state(strategy: LayerwiseStrategy, messages: list[Message], answered: int) -> State:
    """Say what the run is at while the replies to these messages come in."""
    server_round, phase = strategy.report.server_round, messages[0].metadata.message_type
    return State(server_round=server_round, phase=phase, asked=len(messages), answered=answered)


def _save(
    folder: RunFolder,
    strategy: LayerwiseStrategy,
    model: AdaptedModel,
    run: ComposedRun,
    names: list[str],
    reports: list[RoundReport],
) -> None:
    """Save the adapter, if any round has changed it; a StateError says that it cannot be."""
    if not strategy.merged_rounds or not reports:
        return
    model.load(strategy.flat.numpy())
    try:
        save_adapter(folder.adapter, model, run, names, reports, strategy.evaluated)
        save_personal(folder.adapter, strategy.personal_models())
    except OSError as error:
        raise StateError(
            f"All rounds are done, but the adapter cannot be saved ({error}). Make room and resume {folder.path}."
        ) from error
    log(INFO, "Adapter: %s", folder.adapter)


def _make_strategy(run: ComposedRun, model: AdaptedModel, names: list[str], lineage: str) -> LayerwiseStrategy:
    """Make the strategy; the lineage is the name under which clients keep things for the run."""
    settings = run.settings
    classes, sent, backbone = classes_digest(names), settings, None
    if settings.backbone.deliver:
        built = build_backbone(settings.backbone, len(names), backbone_folder({}), settings.seed)
        config, backbone = packed_backbone(settings.backbone, built)
        sent = replace(settings, backbone=config)
    context = TaskContext(
        task=task_to_json(sent),
        layout=model.layout,
        base=model.base,
        classes=classes,
        seed=settings.seed,
        lora_merge=settings.lora.merge,
        wire=settings.wire,
        backbone=backbone,
        backbone_name=sent.backbone.checkpoint,
        privacy=settings.privacy,
        run=lineage,
    )
    calibration = Calibration(settings.calibration) if settings.calibration.name == "ccvr" else None
    schedule = SCHEDULES[run.schedule.name](run.schedule)
    return STRATEGIES[run.strategy.name](run.strategy, context, calibration, schedule, settings.record_updates)


def _run_rounds(
    grid: Grid,
    run: ComposedRun,
    strategy: LayerwiseStrategy,
    model: AdaptedModel,
    test: ImageSet | None,
    keeping: RoundKeeping,
    checkpoint: Checkpoint | None,
) -> None:
    """Start the strategy, or go on with it; every round is shown and kept."""
    if checkpoint is not None:
        log(INFO, "Going on after round %d of %d.", checkpoint.server_round, run.settings.num_server_rounds)
    strategy.start(
        grid,
        ArrayRecord({FLAT: flat_to_array(model.read())}),
        num_rounds=run.settings.num_server_rounds,
        timeout=run.settings.round_timeout,
        evaluate_fn=None if test is None else central_evaluation(model, test, run.settings),
        on_round=keeping.note,
        state=None if checkpoint is None else checkpoint.state,
    )


def _classes_and_test_images(settings: TaskConfig) -> tuple[list[str], ImageSet | None]:
    """Read the server's test images; a server that has no data of its own takes the classes from the config."""
    location, stored = node_location({}), settings.dataset.source in ("parquet", "folder")
    if stored and location is None and settings.dataset.classes:
        log(WARNING, "No central evaluation: %s is not set for the server's process.", DATA_VARIABLE)
        return list(settings.dataset.classes), None
    split = load_split(settings.dataset, "test", location, derive_seed(settings.seed, "dataset"))
    return split.features["label"].names, decode(split, settings.backbone.image_size)


def _banner(run: ComposedRun, model: AdaptedModel, num_classes: int) -> str:
    settings = run.settings
    frozen = sum(p.numel() for p in model.module.parameters() if not p.requires_grad)
    share = model.layout.size / (frozen + model.layout.size)
    return (
        f"{settings.backbone.name} ({frozen / 1e6:.1f} M frozen) at {settings.backbone.image_size} px, "
        f"adapter and head {model.layout.size:,} parameters ({100 * share:.1f} %) in {len(model.layout.units)} units; "
        f"{settings.dataset.name} ({num_classes} classes), partition {settings.partition.kind}, seed {settings.seed}"
    )
