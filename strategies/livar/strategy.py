"""The strategy LIVAR: signals of training weigh the clients, per class and per layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any, ClassVar

import torch
from flwr.app import Array, ArrayRecord
from flwr.common.logger import log
from torch import Tensor

from strategies.arithmetic import sample_weights
from strategies.base import LayerwiseStrategy
from strategies.livar.table import check_name, read_table
from strategies.livar.weights import (
    class_merge_weights,
    lora_merge_weights,
    per_layer_scores,
    scores_that_count,
    whole,
)
from strategies.merging import merge_head, merge_others
from strategies.options import StrategyConfig
from strategies.replies import Update
from task.config import bounded
from task.errors import MessageError
from task.messages import number_field
from task.signals import SignalRequest
from task.units import Layout, head_shape, lora_layers


@dataclass
class LivarConfig(StrategyConfig):
    """Options of :class:`Livar`; the defaults follow the paper's text."""

    head: str = bounded("variance", choices=("variance", "samples", "uniform"))
    """What weighs the clients per class of the head."""
    adapter: str = bounded("table", choices=("table", "samples", "uniform"))
    """What weighs the clients per adapted layer."""
    table: str = "published"
    """Table of merge weights: a file of conf/livar_table, or a YAML file on the server."""
    scores: str = bounded("round", choices=("round", "cumulative", "per_layer"))
    """Scores of this round; summed over all rounds; or, our own variant, per step in units of the layer's median."""
    variance_samples: str = bounded("correct", choices=("correct", "all"))
    """Training samples behind the variances: those predicted correctly, or all."""
    variance_taken: str = bounded("training", choices=("training", "after"))
    """Take variances from the last local epoch's own forward passes, or in a pass of their own after training."""
    variance_model: str = bounded("adapted", choices=("adapted", "frozen"))
    """Variances of the adapted model's features, or of the frozen backbone's (``variance_taken=after``)."""
    variance_images: str = bounded("normalised", choices=("normalised", "raw"))
    """Images as the backbone wants them, or merely scaled to [0, 1] (``variance_taken=after``)."""
    evaluated: str = bounded("merged", choices=("merged", "products"))
    """The server evaluates the merged model, or the merged head on W0 + sum_m n_m/n B_m A_m."""

    def __post_init__(self) -> None:
        """Refuse a table of no such name, and signals that cannot be measured, by a ConfigError."""
        check_name(self.table)
        self.request()

    def request(self) -> SignalRequest:
        """Ask for what the options need, and no more."""
        return SignalRequest(
            class_variance=self.head == "variance",
            update_scores=self.adapter == "table",
            samples=self.variance_samples,
            taken=self.variance_taken,
            model=self.variance_model,
            images=self.variance_images,
        )


class Livar(LayerwiseStrategy):
    """Layer Importance and VARiance-based merging.

    The row of a class in the head is merged by the variance of the clients' features of that class; the factors of an
    adapted layer by the bins of the clients' update scores in a table that a SHAP analysis gave. Sample counts play no
    part.

    References
    ----------
    Fiorini, Mosconi, Buzzega, Salami, Calderara, "Intrinsic Training Signals for Federated Learning Aggregation",
    arXiv 2507.06813 (ICIAP 2025); for ``livar_published_code`` the authors' code, ``_models/livar.py``.
    """

    Config: ClassVar[type[StrategyConfig]] = LivarConfig
    config: LivarConfig

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.table = read_table(self.config.table)
        self._request = self.config.request()
        self.score_sums: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self._noted: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def request(self) -> SignalRequest:
        """Ask for what the options need."""
        return self._request

    def check(self, update: Update) -> None:
        """Refuse an update without a number of steps where scores are taken per step."""
        per_step = self.config.adapter == "table" and self.config.scores == "per_layer"
        if per_step and number_field(update.metrics, "steps") < 1:
            raise MessageError("its number of steps is not positive.")

    def merge(self, server_round: int, updates: Sequence[Update]) -> Tensor:
        """Merge every class of the head and every adapted layer by weights of its own; anything else by samples."""
        vectors, layout = [update.flat for update in updates], self.codec.layout
        shares = sample_weights([update.num_examples for update in updates])
        samples = torch.tensor(shares, dtype=torch.float64)
        head, adapter = self._head_weights(updates, samples), self._adapter_weights(updates, samples)
        merged = self.flat.clone()
        merge_others(merged, vectors, shares, layout)
        self.merge_adapters(merged, vectors, adapter)
        merge_head(merged, vectors, head, self.flat, layout)
        layers = [layer.name for layer in lora_layers(layout)]
        found = {"head_weights": _rounded(head), "adapter_weights": _rounded(adapter), "layers": layers}
        self.report.details |= found
        if self.config.evaluated == "products":
            self._noted = (self._noted[0], stacked_products(vectors, shares, layout))
        return merged

    def accept(self) -> None:
        """Keep the sums of scores and the products of a round that counts."""
        sums, self.products = self._noted
        self.score_sums |= sums
        self._noted = ({}, {})

    def evaluation_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """Add the sample-weighted products where they are what is evaluated."""
        return ArrayRecord({**arrays, **{name: Array(factor.numpy()) for name, factor in self.products.items()}})

    @property
    def evaluated(self) -> str:
        """Name the products where they are what is evaluated."""
        return "W0 + sum_m n_m/n B_m A_m with this head" if self.config.evaluated == "products" else ""

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, the sums of scores by client, and the products that are evaluated."""
        sums = {client: total.clone() for client, total in self.score_sums.items()}
        products = {name: factor.clone() for name, factor in self.products.items()}
        return super().state_dict() | {"score_sums": sums, "products": products}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.score_sums = {client: total.clone() for client, total in state["score_sums"].items()}
        self.products = {name: factor.clone() for name, factor in state["products"].items()}

    def _head_weights(self, updates: Sequence[Update], samples: Tensor) -> Tensor:
        """Weights [clients, classes] of the head's rows."""
        classes = head_shape(self.codec.layout)[0]
        if self.config.head == "variance":
            variance = torch.stack([update.signals["class-variance"] for update in updates])
            count = torch.stack([update.signals["class-count"] for update in updates])
            weights = class_merge_weights(variance, count)
            self._note_classes(updates, variance, count, weights)
            return weights
        if self.config.head == "samples":
            return samples[:, None].expand(-1, classes)
        return torch.full((len(updates), classes), 1 / len(updates), dtype=torch.float64)

    def _adapter_weights(self, updates: Sequence[Update], samples: Tensor) -> Tensor:
        """Weights [clients, layers] of the adapted layers."""
        layers = len(lora_layers(self.codec.layout))
        if self.config.adapter == "table" and layers:
            score_a, score_b = self._scores(updates)
            self._note_scores(updates, score_a, score_b)
            return lora_merge_weights(score_a, score_b, self.table)
        if self.config.adapter == "samples":
            return samples[:, None].expand(-1, layers)
        return torch.full((len(updates), layers), 1 / len(updates), dtype=torch.float64)

    def _scores(self, updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
        """Scores of A and of B, float64 [clients, layers], of the round or as the options say; NaN where negative."""
        sent = [torch.stack([update.signals["score-a"], update.signals["score-b"]]).double() for update in updates]
        found = [torch.where(scores < 0, torch.nan, scores) for scores in sent]
        if self.config.scores == "cumulative":
            sums = {}
            for update, scores in zip(updates, found, strict=True):
                before = self.score_sums.get(update.client, torch.zeros_like(scores))
                scores += before
                sums[update.client] = torch.where(torch.isfinite(scores), scores, before)
            self._noted = (sums, self._noted[1])
        score_a, score_b = torch.stack(found, dim=1)
        if self.config.scores != "per_layer":
            return score_a, score_b
        steps = torch.tensor([number_field(update.metrics, "steps") for update in updates])
        return per_layer_scores(score_a, steps), per_layer_scores(score_b, steps)

    def _note_classes(self, updates: Sequence[Update], variance: Tensor, count: Tensor, weights: Tensor) -> None:
        """Log what keeps clients or classes out of the merge of the head."""
        number, rows = self.report.server_round, weights.sum(0)
        if bad := [u.client for u, v in zip(updates, variance, strict=True) if not bool(torch.isfinite(v).all())]:
            log(WARNING, "Round %d: client %s: variances that are not finite do not count.", number, ", ".join(bad))
        if odd := [u.client for u, n in zip(updates, count, strict=True) if not bool(whole(n).all())]:
            reason = "class counts that are not whole numbers from 0 on do not count"
            log(WARNING, "Round %d: client %s: %s.", number, ", ".join(odd), reason)
        each = zip(updates, count, variance, weights, strict=True)
        silent = {u.client: _silence(n, v) for u, n, v, w in each if not bool(w.any())}
        for reason in dict.fromkeys(silent.values()):
            clients = ", ".join(client for client, why in silent.items() if why == reason)
            log(INFO, "Round %d: client %s: %s; no say in the head.", number, clients, reason)
        if kept := int((rows == 0).sum()):
            log(INFO, "Round %d: no client covers %d of %d classes; their rows stay.", number, kept, len(rows))

    def _note_scores(self, updates: Sequence[Update], score_a: Tensor, score_b: Tensor) -> None:
        """Log scores that say nothing."""
        counting = scores_that_count(score_a, score_b)
        number = self.report.server_round
        if bad := [u.client for u, row in zip(updates, counting, strict=True) if not bool(row.all())]:
            reason = "update scores that are negative or not finite do not count"
            log(WARNING, "Round %d: client %s: %s.", number, ", ".join(bad), reason)
        if refused := {update.client: count for update in updates if (count := _refused_scores(update))}:
            self.report.details["refused_scores"] = refused
            log(WARNING, "Round %d: products of gradient and move overflowed and counted as 0: %s.", number, refused)
        if (
            len(updates) > 1
            and bool(counting.any())
            and all(bool((s[counting] == s[counting][:1]).all()) for s in (score_a, score_b))
        ):
            log(INFO, "Round %d: all update scores that count are equal; their clients have equal say.", number)


def _silence(count: Tensor, variance: Tensor) -> str:
    """Say why no variance of a client counts, from its counts and variances, each [classes]."""
    covered = whole(count) & (count >= 2)
    if not bool(covered.any()):
        return "no class with two samples to take a variance of"
    known = variance[covered]
    if bool((known == 0).all()):
        return "all variances of classes with two samples are 0"
    return "no variance of a class with two samples is positive and finite"


def _refused_scores(update: Update) -> int:
    """Read how many of a client's dot products were not finite; 0 where what it says is no such number."""
    count = update.signals["refused-scores"].item()
    return int(count) if math.isfinite(count) and count > 0 else 0


def stacked_products(vectors: Sequence[Tensor], weights: Sequence[float], layout: Layout) -> dict[str, Tensor]:
    """Stack the clients' factors so that their product is sum_m w_m B_m A_m, of rank clients x r, exactly.

    Parameters
    ----------
    vectors : Sequence[Tensor], float32, each [n]
        The clients' adapters and heads.
    weights : Sequence[float]
        w_m, applied to B.
    layout : Layout
        Index of the flat arrays.

    Returns
    -------
    dict[str, Tensor]
        Per layer ``<layer>.A`` [clients r, in] and ``<layer>.B`` [out, clients r], float32; where A is frozen only
        ``<layer>.B`` [out, r], the weighted sum.
    """
    found = {}
    views = [layout.views(vector) for vector in vectors]
    for layer in lora_layers(layout):
        scaled = [weight * view[layer.b.name] for weight, view in zip(weights, views, strict=True)]
        if layer.a is None:
            found[f"{layer.name}.B"] = torch.stack(scaled).sum(0)
        else:
            found[f"{layer.name}.A"] = torch.cat([view[layer.a.name] for view in views])
            found[f"{layer.name}.B"] = torch.cat(scaled, dim=1)
    return found


def _rounded(weights: Tensor) -> list[list[float]]:
    return [[round(weight, 6) for weight in row] for row in weights.tolist()]
