"""Gaussians of features per class, from the moments that clients report; pure functions.

References
----------
Luo, Chen, Hu, Zhang, Liang, Feng, "No Fear of Heterogeneity: Classifier Calibration for Federated Learning with
Non-IID Data", NeurIPS 2021, arXiv 2106.05001.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DIAGONAL_FLOOR = 1e-8
"""Added to every variance of the diagonal form."""


@dataclass(frozen=True)
class Gaussian:
    """One component: features of one class, pooled over clients or of one client."""

    label: int
    """Class."""
    share: float
    """Share of the class's samples behind it; the shares of a class sum to one."""
    mean: Tensor
    """Mean, float32 [d]."""
    factor: Tensor
    """Deviations, float32 [d], or a factor F of the covariance F F^T, float32 [d, k]."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw features, float32 [count, d]."""
        if self.factor.dim() == 1:
            return self.mean + self.factor * torch.randn(count, len(self.factor), generator=generator)
        return self.mean + torch.randn(count, self.factor.shape[1], generator=generator) @ self.factor.T


def pooled(count: Tensor, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pool clients' moments: those of all samples of a class taken together.

    N_c = sum_m n_mc, mu_c = sum_m n_mc / N_c mu_mc, and
    Sigma_c = sum_m [(n_mc - 1) Sigma_mc + n_mc (mu_mc - mu_c)(mu_mc - mu_c)^T] / (N_c - 1), which is the paper's
    equation 4 without its cancellation.

    Parameters
    ----------
    count : Tensor, [clients, classes]
        n_mc.
    mean : Tensor, [clients, classes, d]
        mu_mc.
    spread : Tensor, [clients, classes, d] or [clients, classes, d, d]
        Unbiased variances or covariances Sigma_mc; of a single sample they play no part.

    Returns
    -------
    tuple[Tensor, Tensor, Tensor]
        N_c [classes], mu_c [classes, d] and Sigma_c [classes, d] or [classes, d, d], float64; 0 where there is nothing.
    """
    n, mu, sigma = count.double(), mean.double(), spread.double()
    total = n.sum(0)
    centre = (n[..., None] * mu).sum(0) / total.clamp_min(1.0)[:, None]
    apart = mu - centre
    between = apart[..., :, None] * apart[..., None, :] if sigma.dim() == 4 else apart.square()
    tail = (1,) * (sigma.dim() - 2)
    scatter = (n - 1).clamp_min(0.0).view(*n.shape, *tail) * sigma + n.view(*n.shape, *tail) * between
    return total, centre, scatter.sum(0) / (total - 1).clamp_min(1.0).view(-1, *tail)


def gaussians(count: Tensor, mean: Tensor, spread: Tensor, mixture: bool) -> list[Gaussian]:
    """Make one Gaussian per class, or with ``mixture`` one per class and client, of the classes that clients cover.

    Parameters
    ----------
    count, mean, spread : Tensor
        As in :func:`pooled`.
    mixture : bool
        Keep the clients apart, weighted by their samples.

    Returns
    -------
    list[Gaussian]
        By class, and by client within a class.
    """
    total = count.double().sum(0)
    if not mixture:
        _, centre, covariance = pooled(count, mean, spread)
        count, mean, spread = total[None], centre[None], covariance[None]
    found = []
    for label in range(count.shape[1]):
        for n, mu, sigma in zip(count[:, label].tolist(), mean[:, label], spread[:, label], strict=True):
            if n > 0:
                spread_known = sigma if n > 1 else torch.zeros_like(sigma)
                found.append(Gaussian(label, n / float(total[label]), mu.float(), _factor(spread_known)))
    return found


def draw(components: Sequence[Gaussian], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw virtual features: classes uniform over those covered, components by their shares within a class.

    Parameters
    ----------
    components : Sequence[Gaussian]
        At least one.
    count : int
        Number of draws in all.
    generator : torch.Generator
        CPU generator.

    Returns
    -------
    tuple[Tensor, Tensor]
        Features, float32 [count, d], and labels, int64 [count], grouped by component.
    """
    classes = len({component.label for component in components})
    odds = torch.tensor([component.share / classes for component in components], dtype=torch.float64)
    counts = torch.bincount(
        torch.multinomial(odds, count, replacement=True, generator=generator), minlength=len(components)
    ).tolist()
    drawn = [component.draw(n, generator) for component, n in zip(components, counts, strict=True)]
    labels = torch.tensor([component.label for component in components])
    return torch.cat(drawn), labels.repeat_interleave(torch.tensor(counts))


def _factor(sigma: Tensor) -> Tensor:
    """Deviations of variances [d], or a factor of a covariance [d, d] by its positive eigenvalues."""
    if sigma.dim() == 1:
        return (sigma.clamp_min(0.0) + DIAGONAL_FLOOR).sqrt().float()
    values, vectors = torch.linalg.eigh((sigma.double() + sigma.double().T) / 2)
    kept = values > values.amax().clamp_min(0.0) * 1e-10
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor.float()
