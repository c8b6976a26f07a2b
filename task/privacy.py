"""Privacy of what clients send: options, and what a message says of them."""

from dataclasses import dataclass

from task.config import bounded

PRIVACY = "privacy"
"""Key of a train message's config under which the kind stands; with ``local`` also the three numbers below."""
CLIPPING_NORM, EPSILON, DELTA = "clipping_norm", "privacy-epsilon", "privacy-delta"
"""The first is Flower's own name for it, which its mods read."""
MASKED_RANGE = 8.0
"""Secure aggregation carries values from minus to plus this."""
NORM_BIT = "norm_bit"
"""Flower's name for whether an update was within the norm."""


@dataclass
class PrivacyConfig:
    """Differential privacy or secure aggregation, by Flower's own parts."""

    name: str = bounded("none", choices=("none", "central_fixed", "central_adaptive", "local", "secagg"))
    """None; clients clip and the server adds noise to the mean, with a fixed norm or one that adapts; every client
    clips and adds noise itself; or the server gets only the sum of the updates."""
    clipping_norm: float = bounded(1.0, above=0.0)
    """Largest Euclidean norm of a client's change of adapter and head; of ``central_adaptive`` the first one."""
    noise_multiplier: float = bounded(1.0, at_least=0.0)
    """Central: standard deviation of the noise in the sum of the clients' changes, in units of the norm."""
    target_quantile: float = bounded(0.5, at_least=0.0, at_most=1.0)
    """Adaptive: share of the clients that the norm is to leave unclipped."""
    clip_norm_lr: float = bounded(0.2, above=0.0)
    """Adaptive: how fast the norm follows."""
    epsilon: float = bounded(1.0, above=0.0, at_most=1.0)
    """Local: privacy budget of a round; the noise that Flower's mod adds is enough for it up to 1."""
    delta: float = bounded(1e-5, above=0.0, at_most=0.1)
    """Local: failure probability of a round."""

    @property
    def central(self) -> bool:
        """Whether the server adds the noise."""
        return self.name.startswith("central")

    @property
    def masked(self) -> bool:
        """Whether the server gets only the sum of the updates."""
        return self.name == "secagg"
