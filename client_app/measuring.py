"""Measures what a strategy asks for around a round's training, and packs it into one flat array."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from client_app.signals import ClassMoments, FeatureTap, UpdateScores, label_entropy, membership, update_norms
from task.config import TrainConfig
from task.data.batches import Normaliser, eval_batches
from task.data.images import ImageSet
from task.model import AdaptedModel
from task.signals import SignalRequest, signal_layout
from task.units import head_shape, lora_layers

BATCH_SIZE = 256


class GramTaps:
    """Accumulates X^T X of the inputs X of every adapted layer and of the head, by forward hooks.

    Of the head, X has a last column of ones for the bias. Where A is frozen, X is A's output. ``grams`` holds X^T X
    by layer, float32 [in, in].

    References
    ----------
    Jin, Ren, Preotiuc-Pietro, Cheng, "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023.
    """

    def __init__(self, model: AdaptedModel) -> None:
        self._modules: dict[str, nn.Module] = {"head": model.head}
        widths = {"head": head_shape(model.layout)[1] + 1}
        for layer in lora_layers(model.layout):
            path = layer.name if layer.a is not None else f"{layer.name}.lora_B.default"
            self._modules[layer.name], widths[layer.name] = model.submodule(path), layer.inputs
        self.grams = {name: torch.zeros(width, width, device=model.device) for name, width in widths.items()}
        self.active = False

    def __enter__(self) -> "GramTaps":
        self._handles = [
            module.register_forward_pre_hook(lambda _, arguments, name=name: self._add(name, arguments))
            for name, module in self._modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.active:
            x = arguments[0].detach().flatten(0, -2).float()
            x = F.pad(x, (0, 1), value=1.0) if name == "head" else x
            self.grams[name].addmm_(x.T, x)


class Recorder:
    """Measures along with training what a request asks for; a context manager around the training.

    Parameters
    ----------
    request : SignalRequest
        What to measure.
    model : AdaptedModel
        Holds the received values.
    optimizer : Optimizer
        Trains them.
    since_step : int
        First step of the last local epoch, from 0.
    """

    def __init__(
        self, request: SignalRequest, model: AdaptedModel, optimizer: torch.optim.Optimizer, since_step: int
    ) -> None:
        self._request, self._model, self._since = request, model, since_step
        self._layout = signal_layout(request, model.layout)
        self._received = model.flat.detach().clone() if request.update_norms else None
        layers = lora_layers(model.layout)
        self._pairs = [(layer.a, layer.b) for layer in layers]
        specs = [spec for layer in layers for spec in layer.specs]
        self._scores = UpdateScores(model, optimizer, specs) if request.update_scores and specs else None
        along = request.of_classes and request.taken == "training"
        self._tap = FeatureTap(model) if along else None
        self._moments = ClassMoments(*head_shape(model.layout), model.device) if along else None
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self._grams = GramTaps(model) if request.gram else None

    def __enter__(self) -> "Recorder":
        self._hooks = ExitStack()
        for hooked in (self._scores, self._tap, self._grams):
            if hooked is not None:
                self._hooks.enter_context(hooked)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def before_step(self, step: int) -> None:
        """Note that a forward pass begins."""
        if self._grams is not None:
            self._grams.active = step >= self._since

    def after_forward(self, step: int, logits: Tensor, labels: Tensor) -> None:
        """Take in the features of a training batch of the last local epoch; logits [b, classes], labels [b]."""
        if self._moments is not None and self._tap is not None and step >= self._since:
            correct = logits.detach().argmax(1) == labels
            chosen = correct if self._request.samples == "correct" else torch.ones_like(correct)
            self._batches.append((self._tap.features.clone(), labels, chosen))
            if len(self._batches) * len(labels) >= BATCH_SIZE:
                self._take_in(self._moments)

    def _take_in(self, moments: ClassMoments) -> None:
        """Add several batches to the moments at once: what that takes grows with the classes, not with the samples."""
        if self._batches:
            moments.add(*(torch.cat(parts) for parts in zip(*self._batches, strict=True)))
            self._batches.clear()

    def signals(self, data: ImageSet, normaliser: Normaliser, generator: torch.Generator) -> np.ndarray:
        """Return everything asked for, measuring what is taken after training.

        Parameters
        ----------
        data : ImageSet
            The client's training images.
        normaliser : Normaliser
            Maps uint8 batches to the model's input.
        generator : torch.Generator
            CPU generator of the images and labels drawn for the Fisher information.

        Returns
        -------
        ndarray, float32, flat
            In order of :func:`~task.signals.signal_layout`.
        """
        request, model = self._request, self._model
        found = self._scored() | self._classes(data, normaliser)
        if self._received is not None:
            found |= update_norms(model.layout, self._received, model.flat.detach())
            found["label-entropy"] = label_entropy(data.labels)[None]
        if self._grams is not None:
            upper = {name: torch.triu_indices(*gram.shape).to(gram.device) for name, gram in self._grams.grams.items()}
            found |= {f"gram:{name}": gram[tuple(upper[name])] for name, gram in self._grams.grams.items()}
        if request.fisher_samples:
            found["fisher"] = fisher_diagonal(model, data, normaliser, request.fisher_samples, generator)
        return packed(found, request, model)

    def _scored(self) -> dict[str, Tensor]:
        if not self._request.update_scores:
            return {}
        scores: Iterator[Tensor] = iter([] if self._scores is None else self._scores.scores)
        zero = torch.zeros((), dtype=torch.float64, device=self._model.device)
        pairs = [(next(scores) if a is not None else zero, next(scores)) for a, _ in self._pairs]
        return {
            "score-a": torch.stack([a for a, _ in pairs]),
            "score-b": torch.stack([b for _, b in pairs]),
            "refused-scores": zero[None] if self._scores is None else self._scores.refused,
        }

    def _classes(self, data: ImageSet, normaliser: Normaliser) -> dict[str, Tensor]:
        if self._moments is None:
            return class_signals(self._request, self._model, data, normaliser) if self._request.of_classes else {}
        moments = self._moments
        self._take_in(moments)
        found = {"class-count": moments.count, "class-variance": moments.variance()}
        if self._request.class_moments != "none":
            found |= {"class-mean": moments.mean, "class-variances": moments.variances()}
        return found


def packed(found: dict[str, Tensor], request: SignalRequest, model: AdaptedModel) -> np.ndarray:
    """Pack named tensors into the flat float32 array of a request, in one transfer."""
    layout = signal_layout(request, model.layout)
    values = [found[spec.name].reshape(-1).float() for spec in layout.tensors]
    return torch.cat(values).cpu().numpy()


def class_signals(
    request: SignalRequest, model: AdaptedModel, data: ImageSet, normaliser: Normaliser
) -> dict[str, Tensor]:
    """Measure the class signals in a pass of their own over the training images.

    Parameters
    ----------
    request : SignalRequest
        Says which samples, of which model, on which images.
    model : AdaptedModel
        Is put into evaluation mode.
    data : ImageSet
        The client's training images.
    normaliser : Normaliser
        The backbone's own normalisation.

    Returns
    -------
    dict[str, Tensor]
        ``class-count``, ``class-mean``, ``class-variance``, ``class-variances``, and ``class-covariance`` if asked for.
    """
    chosen_normaliser = normaliser if request.images == "normalised" else Normaliser.of([0.0], [1.0], model.device)
    features, logits = features_of(model, data, chosen_normaliser, frozen=request.model == "frozen")
    chosen = logits.argmax(1) == data.labels if request.samples == "correct" else torch.ones_like(data.labels).bool()
    classes = head_shape(model.layout)[0]
    return class_statistics(features[chosen], data.labels[chosen], classes, request.class_moments == "full")


@torch.inference_mode()
def features_of(
    model: AdaptedModel, data: ImageSet, normaliser: Normaliser, frozen: bool = False
) -> tuple[Tensor, Tensor]:
    """Features [n, d] and the head's logits [n, classes] of images, without augmentation.

    With ``frozen`` the features are those of the backbone without adapter; the head is the trained one all the same.
    """
    model.set_training(False)
    kept, constant = [], [parameter for parameter in model.module.parameters() if not parameter.requires_grad]
    with FeatureTap(model) as tap, model.module.disable_adapter() if frozen else nullcontext():
        for images, _ in eval_batches(data, BATCH_SIZE, normaliser):
            model(images)
            kept.append(tap.features)
    for parameter in constant:
        parameter.requires_grad = False  # with the adapter, peft makes a frozen A trainable
    features = torch.cat(kept)
    return features, model.head(features)


def class_statistics(features: Tensor, labels: Tensor, num_classes: int, full: bool) -> dict[str, Tensor]:
    """Count, mean and unbiased variance or covariance per class, in two passes in float64.

    Parameters
    ----------
    features : Tensor, float, [n, d]
        Features.
    labels : Tensor, int64, [n]
        Classes.
    num_classes : int
        Number of classes C.
    full : bool
        Also covariances.

    Returns
    -------
    dict[str, Tensor]
        ``class-count`` [C], ``class-mean`` [C, d], ``class-variances`` [C, d], ``class-variance`` [C], and with
        ``full`` ``class-covariance`` [C, d, d]; float64, 0 where a class has too few samples.
    """
    z = features.double()
    member = membership(labels, num_classes)
    count = member.sum(0)
    mean = member.T @ z / count.clamp_min(1.0)[:, None]
    centred = z - mean[labels]
    freedom = (count - 1).clamp_min(1.0)
    variances = member.T @ centred.square() / freedom[:, None]
    found = {
        "class-count": count,
        "class-mean": mean,
        "class-variances": variances,
        "class-variance": variances.mean(1),
    }
    if full:
        groups = centred[labels.argsort(stable=True)].split(count.long().tolist())
        found["class-covariance"] = torch.stack([g.T @ g / n for g, n in zip(groups, freedom, strict=True)])
    return found


def fisher_diagonal(
    model: AdaptedModel, data: ImageSet, normaliser: Normaliser, max_samples: int, generator: torch.Generator
) -> Tensor:
    """Diagonal of the Fisher information: mean over images of the squared gradient of log p(y|x), y drawn from p.

    Of more than ``max_samples`` images so many are drawn: those of a folder per class lie sorted by class.

    References
    ----------
    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, equation 3.

    Returns
    -------
    Tensor, float32, [n]
        One entry per element of the flat array.
    """
    model.set_training(False)
    gradient = model.flat.grad
    assert gradient is not None
    total, count = torch.zeros_like(gradient), min(max_samples, len(data))
    for index in torch.randperm(len(data), generator=generator)[:count].tolist():
        gradient.zero_()
        log_p = F.log_softmax(model(normaliser(data.images[index : index + 1])), dim=1)
        label = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
        torch.autograd.backward(-log_p.gather(1, label).sum())
        total.addcmul_(gradient, gradient)
    gradient.zero_()
    return total.div_(count)


def last_epoch_start(num_images: int, train: TrainConfig) -> int:
    """Step, from 0, with which a round's last epoch begins, whether or not ``max_steps`` lets it end."""
    epoch = math.ceil(num_images / train.batch_size)
    total = min(epoch * train.local_epochs, train.max_steps or epoch * train.local_epochs)
    return (total - 1) // epoch * epoch
