"""Flower's SecAgg+ workflow, which is made for its older strategies, as this app calls it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.common import FitIns, FitRes, Parameters, Scalar, parameters_to_ndarrays
from flwr.server.client_manager import ClientManager, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import WorkflowState
from flwr.serverapp import Grid


class Workflow(SecAggPlusWorkflow):
    """Flower's workflow, which goes on without a client that falls out before it trains.

    Flower's own counts such clients among those whose keys are to be recovered, which nobody has shares of.
    """

    def share_keys_stage(self, grid: Grid, context: LegacyContext, state: WorkflowState) -> bool:
        """Forget who gave no keys before Flower's stage."""
        _forget_lost(state)
        return bool(super().share_keys_stage(grid, context, state))

    def collect_masked_vectors_stage(self, grid: Grid, context: LegacyContext, state: WorkflowState) -> bool:
        """Forget who gave no shares before Flower's stage."""
        _forget_lost(state)
        return bool(super().collect_masked_vectors_stage(grid, context, state))


def _forget_lost(state: WorkflowState) -> None:
    state.sampled_node_ids = set(state.active_node_ids)
    for node, neighbours in state.nid_to_neighbours.items():
        state.nid_to_neighbours[node] = neighbours & state.active_node_ids


class Outcome(FedAvg):
    """What the workflow takes for a strategy: names the cohort, and keeps the mean that it is given.

    Parameters
    ----------
    nodes : Sequence[int]
        The cohort.
    """

    def __init__(self, nodes: Sequence[int]) -> None:
        super().__init__()
        self.nodes = nodes
        self.mean: np.ndarray | None = None

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Name the cohort; what it is sent, the relay knows."""
        return [(cast(ClientProxy, _Node(node)), FitIns(Parameters([], ""), {})) for node in self.nodes]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Keep the mean, which Flower has put into every result."""
        (mean,) = parameters_to_ndarrays(results[0][1].parameters)
        self.mean = mean.astype(np.float32)
        return None, {}


@dataclass
class _Node:
    """All that the workflow asks of a proxy."""

    node_id: int


class _Cohort(SimpleClientManager):
    """Says how many there are, for Flower's log."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def num_available(self) -> int:
        """Return the size of the cohort."""
        return self._size


def legacy_context(outcome: Outcome) -> LegacyContext:
    """Make the context that Flower's workflow wants: a round, and no model of its own."""
    state = RecordDict({MAIN_CONFIGS_RECORD: ConfigRecord({Key.CURRENT_ROUND: 1}), MAIN_PARAMS_RECORD: ArrayRecord()})
    manager = _Cohort(len(outcome.nodes))
    return LegacyContext(Context(0, 0, {}, state, {}), strategy=outcome, client_manager=manager)
