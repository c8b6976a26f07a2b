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


def pooled(count: Tensor, mean: Tensor, spread: Sequence[Tensor]) -> tuple[float, Tensor, Tensor]:
    """Pool clients' moments of one class: those of all its samples taken together.

    N = sum_m n_m, mu = sum_m n_m / N mu_m, and
    Sigma = sum_m [(n_m - 1) Sigma_m + n_m (mu_m - mu)(mu_m - mu)^T] / (N - 1), which is the paper's equation 4 without
    its cancellation.

    Parameters
    ----------
    count : Tensor, [clients]
        n_m.
    mean : Tensor, [clients, d]
        mu_m.
    spread : Sequence[Tensor], each [d] or [d, d]
        Unbiased variances or covariances Sigma_m; of a single sample they play no part.

    Returns
    -------
    tuple[float, Tensor, Tensor]
        N, mu [d] and Sigma [d] or [d, d], float64; 0 where there is nothing.
    """
    n, mu = count.double(), mean.double()
    total = float(n.sum())
    centre = n @ mu / max(total, 1.0)
    apart = mu - centre
    scatter = n @ apart.square() if spread[0].dim() == 1 else (apart * n[:, None]).T @ apart
    for known, sigma in zip((n - 1).clamp_min(0.0).tolist(), spread, strict=True):
        scatter.add_(sigma, alpha=known)
    return total, centre, scatter / max(total - 1, 1.0)


def gaussians(count: Tensor, mean: Tensor, spread: Sequence[Tensor], mixture: bool) -> list[Gaussian]:
    """Make one Gaussian per class, or with ``mixture`` one per class and client, of the classes that clients cover.

    Parameters
    ----------
    count : Tensor, [clients, classes]
        Samples.
    mean : Tensor, [clients, classes, d]
        Means.
    spread : Sequence[Tensor], each [classes, d] or [classes, d, d]
        Unbiased variances or covariances of every client; read class by class, since covariances are large.
    mixture : bool
        Keep the clients apart, weighted by their samples.

    Returns
    -------
    list[Gaussian]
        By class, and by client within a class.
    """
    found = []
    for label in range(count.shape[1]):
        holders = torch.nonzero(count[:, label] > 0).flatten().tolist()
        if not holders:
            continue
        n, mu, sigma = count[holders, label], mean[holders, label], [spread[client][label] for client in holders]
        if mixture:
            for own, m, s in zip(n.tolist(), mu, sigma, strict=True):
                known = s if own > 1 else torch.zeros_like(s)
                found.append(Gaussian(label, own / float(n.sum()), m.float(), _factor(known)))
        else:
            _, centre, covariance = pooled(n, mu, sigma)
            found.append(Gaussian(label, 1.0, centre.float(), _factor(covariance)))
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
