"""The phase of a round in which clients measure the merged model and its head is recalibrated."""

from collections.abc import Iterable
from dataclasses import replace
from logging import ERROR, INFO, WARNING
from typing import TYPE_CHECKING

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.common.logger import log

from strategies.ccvr.calibration import MIN_CLASSES
from strategies.exchanging import phase_messages
from strategies.replies import check_all, check_moments, replies_by_client
from task.messages import MEASURE
from task.seeding import generator_for

if TYPE_CHECKING:
    from strategies.base import LayerwiseStrategy


def calibration_messages(strategy: "LayerwiseStrategy", server_round: int, arrays: ArrayRecord) -> list[Message]:
    """Make the messages that ask every client to measure the merged model, in rounds where calibration is due.

    A round that did not change the model is not calibrated, unless it is the last and an earlier one did.
    """
    calibration = strategy.calibration
    if calibration is None or not calibration.due(server_round, strategy.num_rounds) or not strategy.schedule.complete:
        return []
    if not (strategy.report.merged or (server_round == strategy.num_rounds and strategy.merged_rounds)):
        return []
    instruction = replace(strategy.without_training(server_round), signals=calibration.request)
    clients = strategy.directory.identities
    return phase_messages(strategy, MEASURE, clients, arrays, ConfigRecord(), instruction)


def calibrate(strategy: "LayerwiseStrategy", server_round: int, replies: Iterable[Message]) -> ArrayRecord | None:
    """Check the measurements and recalibrate the strategy's head; None leaves the model as it was."""
    calibration = strategy.calibration
    assert calibration is not None
    answered, failed = replies_by_client(replies, strategy.directory, strategy.asked)
    measured = check_all(
        answered,
        failed,
        lambda reply, _: check_moments(reply, strategy.codec, strategy.context.base, calibration.request),
    )
    strategy.report.drop("calibration: ", measured.dropped)
    found, needed = len(measured.good), strategy.config.min_clients
    if found < needed:
        log(ERROR, "Round %d: %d of the %d measurements needed: no calibration.", server_round, found, needed)
        return None
    _note_classes(server_round, torch.stack([moments["class-count"] for moments in measured.good]))
    generator = generator_for(strategy.context.seed, "calibration", server_round)
    calibrated = calibration.calibrated(strategy.flat, strategy.codec.layout, measured.good, generator)
    if calibrated is None:
        return None
    if not bool(torch.isfinite(calibrated).all()):
        log(ERROR, "Round %d: the retrained head is not finite: no calibration.", server_round)
        return None
    strategy.flat = calibrated
    return strategy.codec.encode(strategy.flat)


def _note_classes(server_round: int, count: torch.Tensor) -> None:
    """Log how many classes no client has a sample of, from the counts [clients, classes]."""
    seen, classes = int((count.sum(0) > 0).sum()), count.shape[1]
    if seen < MIN_CLASSES:
        reason = f"clients have samples of {seen} of {classes} classes and {MIN_CLASSES} are needed: no calibration"
        log(WARNING, "Round %d: %s.", server_round, reason)
    elif seen < classes:
        reason = f"no client has a sample of {classes - seen} of {classes} classes; their rows stay"
        log(INFO, "Round %d: %s.", server_round, reason)
