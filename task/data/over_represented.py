"""A partition in which every client has all classes, and of some of them more than the others."""

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def over_represented(
    labels: Indices, num_partitions: int, classes_per_client: int, share: float, seed: int
) -> list[Indices]:
    """Give each client more of some classes than the others have, and of the rest as much as they.

    Every client draws its classes among those that the fewest clients have drawn. Of a class, ``share`` of the images
    are dealt out evenly to the clients that drew it, and what is left, or all where nobody did, to all clients.

    Parameters
    ----------
    labels : NDArray[np.int64]
        Class of every row, shape [n].
    num_partitions : int
        Number of clients, at least 1.
    classes_per_client : int
        Number of classes of which a client has more, at most those in ``labels``.
    share : float
        From 0, which is IID, to 1, with which clients have no other classes but those that nobody drew.
    seed : int
        Seed of all draws.

    Returns
    -------
    list of NDArray[np.int64]
        Sorted row numbers per client; disjoint, together all rows.

    References
    ----------
    Ma et al., "Layer-wised Model Aggregation for Personalized Federated Learning", CVPR 2022: its second partition, of
    which it does not say how much more.
    """
    generator = np.random.default_rng(seed)
    classes = np.unique(labels)
    drawn = _drawn_classes(len(classes), num_partitions, classes_per_client, generator)
    parts: list[list[Indices]] = [[] for _ in range(num_partitions)]
    everybody = np.arange(num_partitions)
    for number, label in enumerate(classes):
        rows = generator.permutation(np.flatnonzero(labels == label))
        holders = np.flatnonzero(drawn[:, number])
        more = round(share * len(rows)) if len(holders) else 0
        for clients, dealt in ((holders, rows[:more]), (everybody, rows[more:])):
            _deal(dealt, generator.permutation(clients), parts)
    return [np.sort(np.concatenate(rows)).astype(np.int64) for rows in parts]


def _drawn_classes(classes: int, clients: int, each: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Draw ``each`` classes for every client, those first that the fewest have; bool [clients, classes]."""
    drawn = np.zeros((clients, classes), dtype=bool)
    for client in range(clients):
        order = np.lexsort((generator.random(classes), drawn.sum(axis=0)))
        drawn[client, order[:each]] = True
    return drawn


def _deal(rows: Indices, clients: Indices, parts: list[list[Indices]]) -> None:
    """Deal rows out one by one, so that the clients' numbers differ by one at most."""
    for position, client in enumerate(clients):
        parts[client].append(rows[position :: len(clients)])
