"""What a strategy may ask clients to measure, and how the answers lie in one flat array.

Client and server derive the same index from the request and the model's layout, as for adapter and head.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache

from task.config import bounded, typed
from task.errors import ConfigError
from task.units import Layout, head_shape, lora_layers, make_layout

MAX_REQUEST_BYTES = 4096


@dataclass(frozen=True)
class SignalRequest:
    """What clients shall measure along with training; by default nothing."""

    class_variance: bool = False
    """Per class: count, and mean over dimensions of the unbiased variance of the head's input."""
    class_moments: str = bounded("none", choices=("none", "diagonal", "full"))
    """Per class: count, mean and variance (``diagonal``) or covariance (``full``) of the head's input."""
    update_scores: bool = False
    """Per adapted layer: sum over steps of |<gradient, move>|, of A and of B; and how many of these were not finite."""
    update_norms: bool = False
    """Per adapted layer: Frobenius norms of the round's change of A, of B and of the product B A; and the entropy of
    the client's labels, nats."""
    gram: bool = False
    """Per adapted layer, and of the head: Gram matrix of the layer's inputs, as the upper triangle."""
    fisher_samples: int = bounded(0, at_least=0, at_most=1_000_000)
    """Estimate the diagonal Fisher information on up to so many training images; 0: not at all."""
    samples: str = bounded("correct", choices=("correct", "all"))
    """Which training samples the class signals count: those predicted correctly, or all."""
    taken: str = bounded("training", choices=("training", "after"))
    """Take class signals from the last local epoch's own forward passes, or in a pass of their own after training."""
    model: str = bounded("adapted", choices=("adapted", "frozen"))
    """Features of the adapted model, or of the frozen backbone without adapter (``taken=after`` only)."""
    images: str = bounded("normalised", choices=("normalised", "raw"))
    """Images as the backbone wants them, or merely scaled to [0, 1] (``taken=after`` only)."""

    @property
    def of_classes(self) -> bool:
        """Whether a class signal is asked for."""
        return self.class_variance or self.class_moments != "none"

    @property
    def anything(self) -> bool:
        """Whether anything is asked for."""
        return self.of_classes or self.update_scores or self.update_norms or self.gram or self.fisher_samples > 0

    @property
    def without_training(self) -> bool:
        """Whether all of it can be measured of a model as received."""
        others = self.update_scores or self.update_norms or self.gram or self.fisher_samples > 0
        return self.of_classes and self.taken == "after" and not others

    def __post_init__(self) -> None:
        """Refuse what cannot be measured along with training, by a ConfigError."""
        if self.taken == "training" and (self.model == "frozen" or self.images == "raw"):
            raise ConfigError(
                "Signals of the frozen model or of raw images are taken after training, not along with it (LIVAR: "
                "strategy.variance_taken=after)."
            )
        if self.taken == "training" and self.class_moments == "full":
            raise ConfigError("Full covariances are taken after training, not along with it.")

    def to_json(self) -> str:
        """Serialise the request: the options that are not the defaults."""
        default = SignalRequest()
        values = {key: value for key, value in dataclasses.asdict(self).items() if value != getattr(default, key)}
        return json.dumps(values, sort_keys=True)


NOTHING = SignalRequest()


@lru_cache(maxsize=16)
def request_from_json(text: str) -> SignalRequest:
    """Rebuild a request from received JSON.

    Raises
    ------
    ConfigError
        If it is too long, no JSON object, holds an interpolation, or does not fit the schema.
    """
    if len(text) > MAX_REQUEST_BYTES:
        raise ConfigError("The received request for signals is too long; it was not read.")
    try:
        values = json.loads(text)
        decoded = json.dumps(values, ensure_ascii=False)  # without escapes, which could hide an interpolation
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The received request for signals is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError("The received request for signals is not a JSON object.")
    if "${" in decoded:
        raise ConfigError("The received request for signals holds an interpolation; it was not read.")
    return typed(SignalRequest, values, "signals.")


@lru_cache(maxsize=16)
def signal_layout(request: SignalRequest, model: Layout) -> Layout:
    """Index the flat array of signals.

    Parameters
    ----------
    request : SignalRequest
        What is asked for.
    model : Layout
        Layout of adapter and head; gives the numbers of layers, classes and feature dimensions.

    Returns
    -------
    Layout
        ``class-count`` [C], ``class-variance`` [C], ``class-mean`` [C, d], ``class-variances`` [C, d],
        ``class-covariance`` [C, d, d], ``score-a``, ``score-b`` [L], ``refused-scores`` [1], ``norm-a``, ``norm-b``,
        ``norm-product`` [L],
        ``label-entropy`` [1], ``gram:<layer>`` [in (in + 1) / 2], ``fisher`` [n], as far as asked for.

    Raises
    ------
    ModelError
        If the model has no head for a signal that is of one.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if request.of_classes:
        classes, dimension = head_shape(model)
        shapes["class-count"] = (classes,)
        if request.class_variance:
            shapes["class-variance"] = (classes,)
        if request.class_moments != "none":
            shapes["class-mean"] = (classes, dimension)
        if request.class_moments == "diagonal":
            shapes["class-variances"] = (classes, dimension)
        if request.class_moments == "full":
            shapes["class-covariance"] = (classes, dimension, dimension)
    layers = lora_layers(model)
    if request.update_scores:
        shapes |= {"score-a": (len(layers),), "score-b": (len(layers),), "refused-scores": (1,)}
    if request.update_norms:
        shapes |= {f"norm-{what}": (len(layers),) for what in ("a", "b", "product")} | {"label-entropy": (1,)}
    if request.gram:
        inputs = {layer.name: layer.inputs for layer in layers} | {"head": head_shape(model)[1] + 1}
        shapes |= {f"gram:{name}": (width * (width + 1) // 2,) for name, width in inputs.items()}
    if request.fisher_samples:
        shapes["fisher"] = (model.size,)
    return make_layout(shapes)
