"""Options that every strategy has."""

from dataclasses import dataclass

from task.config import bounded


@dataclass
class StrategyConfig:
    """Options that every strategy has."""

    name: str = ""
    """Name of the strategy in the registry."""
    fraction_train: float = bounded(1.0, above=0.0, at_most=1.0)
    """Share of the clients in a round's cohort."""
    min_clients: int = bounded(2, at_least=1)
    """Fewest clients in a cohort, and fewest good replies for a round to change the model."""
    min_available_clients: int = bounded(0, at_least=0)
    """Start once so many clients are there; 0: as many as ``min_clients``."""
    wait_for_clients: float = bounded(120.0, above=0.0)
    """Seconds to wait for them."""
    max_failed_rounds: int = bounded(3, at_least=1)
    """End the run after so many successive rounds with too few good replies."""
    evaluate_clients: str = bounded("phase", choices=("phase", "train", "off"))
    """Evaluate on the clients' own test images in a phase of its own, along with training (of the model a client
    receives, so one round late; in the last round by a phase after it instead), or not at all."""
    evaluate_every: int = bounded(1, at_least=1)
    """Evaluate every so many rounds, and after the last."""
    evaluate_tuned: bool = False
    """In a phase of evaluation, let clients also train for a round from what they received, evaluate that too, and
    forget it: what local fine-tuning brings."""
