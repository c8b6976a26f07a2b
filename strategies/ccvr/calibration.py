"""CCVR: the head is retrained on virtual features drawn from Gaussians of the clients' features."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from strategies.ccvr.gaussians import Gaussian, draw, gaussians
from task.config import bounded
from task.signals import SignalRequest
from task.units import Layout, head_specs

MIN_CLASSES = 2
"""Fewest classes with samples: over a single one the softmax is 1 whatever the head."""


@dataclass
class CalibrationConfig:
    """Recalibration of the head, which any strategy can carry."""

    name: str = bounded("none", choices=("none", "ccvr"))
    """No calibration, or CCVR."""
    every_round: bool = False
    """After every round, the calibrated head being sent on; or once, after the last."""
    mixture: bool = False
    """One Gaussian per class and client, or one per class, pooled over clients."""
    covariance: str = bounded("full", choices=("full", "diagonal"))
    """Full covariances, or variances alone."""
    draws_per_class: int = bounded(256, at_least=1, at_most=100_000)
    """Virtual features per class and epoch, on average."""
    epochs: int = bounded(5, at_least=1)
    """Epochs of retraining, each on fresh draws."""
    batch_size: int = bounded(256, at_least=1)
    """Virtual features per step."""
    lr: float = bounded(0.01, above=0.0)
    """Learning rate of SGD at the start; a cosine lowers it epoch by epoch."""
    momentum: float = bounded(0.9, at_least=0.0, at_most=0.999)
    """Momentum of SGD."""
    temperature: float = bounded(0.0, at_least=0.0)
    """Divide the logits z by ||z|| and by this before the cross-entropy; 0: take them as they are."""


class Calibration:
    """Asks clients for the moments of the merged model's features and retrains the head on draws from them.

    Parameters
    ----------
    config : CalibrationConfig
        The form; ``name=ccvr``.

    References
    ----------
    Luo et al., NeurIPS 2021, arXiv 2106.05001 (pooled, full covariance, after the last round); the mixture of diagonal
    Gaussians after every round is the form in the code of LIVAR (arXiv 2507.06813).
    """

    def __init__(self, config: CalibrationConfig) -> None:
        self.config = config
        self.request = SignalRequest(class_moments=config.covariance, samples="all", taken="after")

    def due(self, server_round: int, num_rounds: int) -> bool:
        """Tell whether the head is calibrated after a round."""
        return self.config.every_round or server_round == num_rounds

    def calibrated(
        self, flat: Tensor, layout: Layout, moments: Sequence[dict[str, Tensor]], generator: torch.Generator
    ) -> Tensor | None:
        """Return the model with its head retrained.

        Parameters
        ----------
        flat : Tensor, float32, [n]
            The merged model; only read.
        layout : Layout
            Its index.
        moments : Sequence[dict[str, Tensor]]
            What each client measured: ``class-count``, ``class-mean``, ``class-variances`` or ``class-covariance``.
        generator : torch.Generator
            CPU generator of the draws.

        Returns
        -------
        Tensor or None, float32, [n]
            A copy, in which rows of classes that no client has a sample of stay; None if clients have samples of fewer
            than two classes, since there is nothing to tell apart.
        """
        spread = "class-covariance" if self.config.covariance == "full" else "class-variances"
        count, mean = (torch.stack([client[key] for client in moments]) for key in ("class-count", "class-mean"))
        components = gaussians(count, mean, [client[spread] for client in moments], self.config.mixture)
        if len({component.label for component in components}) < MIN_CLASSES:
            return None
        result, (weight, bias) = flat.clone(), head_specs(layout)
        views = layout.views(result)
        retrain_head(views[weight.name], views[bias.name] if bias else None, components, self.config, generator)
        return result


def retrain_head(
    weight: Tensor,
    bias: Tensor | None,
    components: Sequence[Gaussian],
    config: CalibrationConfig,
    generator: torch.Generator,
) -> None:
    """Retrain a linear head in place on virtual features, by SGD and cross-entropy over the covered classes.

    Parameters
    ----------
    weight : Tensor, float32, [classes, d]
        Starts from what is there; rows of classes without a component stay.
    bias : Tensor or None, float32, [classes]
        Likewise.
    components : Sequence[Gaussian]
        At least one.
    config : CalibrationConfig
        Epochs, draws, batches, step sizes, temperature.
    generator : torch.Generator
        CPU generator.
    """
    covered = torch.tensor(sorted({component.label for component in components}))
    w = weight[covered].clone().requires_grad_()
    b = (torch.zeros(len(covered)) if bias is None else bias[covered].clone()).requires_grad_(bias is not None)
    optimizer = torch.optim.SGD([w, b] if bias is not None else [w], lr=config.lr, momentum=config.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
    for _ in range(config.epochs):
        features, labels = draw(components, config.draws_per_class * len(covered), generator)
        targets = torch.searchsorted(covered, labels)
        for chosen in torch.randperm(len(labels), generator=generator).split(config.batch_size):
            optimizer.zero_grad()
            logits = F.linear(features[chosen], w, b)
            if config.temperature:
                logits = F.normalize(logits, dim=1) / config.temperature
            torch.autograd.backward(F.cross_entropy(logits, targets[chosen]))
            optimizer.step()
        schedule.step()
    weight[covered] = w.detach()
    if bias is not None:
        bias[covered] = b.detach()
