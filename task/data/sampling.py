"""Labels of a data set, and seeded samples that keep the balance of its classes."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasets import Dataset


ROW = "__row__"
"""Column with the rows of images in the table that they were read from, by which errors name them."""


def labels_of(dataset: "Dataset") -> NDArray[np.int64]:
    """Read the class of every image without decoding one.

    Parameters
    ----------
    dataset : datasets.Dataset
        Data set with a column ``label`` of class indices.

    Returns
    -------
    NDArray[np.int64]
        Class indices, shape [n].
    """
    return np.asarray(dataset.select_columns(["label"]).with_format("numpy")["label"][:], dtype=np.int64)


def stratified_sample(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Draw positions so that every class keeps its share, as nearly as whole images allow.

    Each class gets the whole part of its share; what is left goes to the classes with the largest
    remainders, equal remainders in random order. Works for any class sizes, classes of one image included.

    Parameters
    ----------
    labels : NDArray[np.int64]
        Class indices, shape [n].
    count : int
        Number of positions to draw, 0 to n.
    seed : int
        Seed of the draw.

    Returns
    -------
    NDArray[np.int64]
        Sorted distinct positions, shape [count].
    """
    rng = np.random.default_rng(seed)
    _, class_of, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    share, remainder = np.divmod(sizes * count, max(1, len(labels)))
    by_remainder = np.lexsort((rng.random(len(sizes)), -remainder))
    share[by_remainder[: count - share.sum()]] += 1
    shuffled = rng.permutation(len(labels))
    grouped = shuffled[np.argsort(class_of[shuffled], kind="stable")]
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(grouped[rank_in_class < np.repeat(share, sizes)]).astype(np.int64)
