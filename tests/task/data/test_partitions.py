import os
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from task.config import DatasetConfig, PartitionConfig
from task.data.partitions import local_split, partition_indices, partition_table
from task.data.sampling import labels_of
from task.data.sources import load_split
from task.errors import ConfigError, DataError

DATA = os.environ.get("PETALWISE_TEST_DATA", "")
DOMAINS = ("sketch", "art", "photo")


def table(labels, domains=DOMAINS):
    """Rows whose images cannot be decoded: a partition that touched one would fail."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(num_classes=int(max(labels)) + 1),
            "domain": datasets.Value("string"),
            "row": datasets.Value("int64"),
        }
    )
    count = len(labels)
    columns = {
        "image": [b"no image"] * count,
        "label": list(labels),
        "domain": [domains[row % len(domains)] for row in range(count)],
        "row": [-1] * count,
    }
    return datasets.Dataset.from_dict(columns, features=features)


def balanced(classes=5, each=20):
    return np.tile(np.arange(classes), each)


def assert_disjoint_cover(partitions, count):
    np.testing.assert_array_equal(np.sort(np.concatenate(partitions)), np.arange(count))


def assert_same(first, second):
    assert len(first) == len(second)
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    "kind", ["iid", "dirichlet", "pathological", "over_represented", "natural", "natural_dirichlet"]
)
@settings(deadline=None, max_examples=15)
@given(clients=st.integers(1, 6), seed=st.integers(0, 2**63 - 1), alpha=st.floats(0.5, 5))
def test_partitions_are_disjoint_and_cover_and_follow_the_seed(kind, clients, seed, alpha):
    labels = balanced()
    dataset = table(labels, [f"d{number}" for number in range(clients)])
    config = PartitionConfig(kind=kind, alpha=alpha, classes_per_client=5, column="domain", min_samples=2)
    partitions = partition_indices(dataset, config, clients, seed)
    assert len(partitions) == clients
    assert all(indices.dtype == np.int64 and (np.diff(indices) > 0).all() for indices in partitions)
    assert_disjoint_cover(partitions, len(labels))
    assert_same(partitions, partition_indices(dataset, config, clients, seed))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "over_represented"])
def test_another_seed_gives_another_partition(kind):
    config = PartitionConfig(kind=kind, alpha=1.0)
    first, second = (partition_indices(table(balanced()), config, 4, seed) for seed in (1, 2))
    assert any(not np.array_equal(left, right) for left, right in zip(first, second, strict=True))


def test_iid_is_even_and_shuffled():
    partitions = partition_indices(table(balanced()), PartitionConfig(kind="iid"), 8, seed=0)
    assert sorted(map(len, partitions)) == [12] * 4 + [13] * 4
    assert all((np.diff(indices) > 1).any() for indices in partitions)


def test_smaller_alpha_is_more_skewed():
    labels = balanced(each=200)

    def largest_share(alpha):
        config = PartitionConfig(kind="dirichlet", alpha=alpha, min_samples=2)
        counts = partition_table(labels, partition_indices(table(labels), config, 5, seed=4), 5)
        return (counts.max(1) / counts.sum(1)).mean()

    assert largest_share(0.1) > largest_share(1.0) > largest_share(100.0)
    assert largest_share(100.0) < 0.3


def test_pathological_gives_each_client_its_number_of_classes():
    labels = balanced(classes=6)
    partitions = partition_indices(table(labels), PartitionConfig(kind="pathological"), 6, seed=0)
    assert ((partition_table(labels, partitions, 6) > 0).sum(1) == 2).all()
    assert_disjoint_cover(partitions, len(labels))


def test_pathological_says_which_classes_nobody_has():
    dataset = table(balanced(classes=10))
    with pytest.warns(
        UserWarning, match=r"No client has images of \d of the classes \(.*raise partition.classes_per"
    ) as caught:
        partitions = partition_indices(dataset, PartitionConfig(kind="pathological"), 2, seed=0)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(np.intersect1d(*partitions)) == 0


def test_natural_follows_the_sorted_values():
    dataset = table(balanced())
    partitions = partition_indices(dataset, PartitionConfig(kind="natural", column="domain"), 3, seed=0)
    assert [set(dataset.select(indices)["domain"]) for indices in partitions] == [{"art"}, {"photo"}, {"sketch"}]


def test_natural_says_how_many_clients_to_start():
    config = PartitionConfig(kind="natural", column="domain")
    with pytest.raises(ConfigError, match=r"'domain' has 3 distinct values .* but 10 were started; start 3 clients"):
        partition_indices(table(balanced()), config, 10, seed=0)


@pytest.mark.parametrize("column", ["", "colour", "image"])
def test_natural_by_a_column_that_cannot_separate_is_refused(column):
    with pytest.raises(ConfigError, match="is not a column of the data: label, domain, row"):
        partition_indices(table(balanced()), PartitionConfig(kind="natural", column=column), 3, seed=0)
    with pytest.raises(ConfigError, match=r"holds None; it needs text or whole numbers in all rows"):
        partition_indices(table(balanced(), ["a", None]), PartitionConfig(kind="natural", column="domain"), 2, seed=0)


def test_natural_dirichlet_shares_each_value_among_clients_of_its_own():
    dataset = table(balanced(each=60))
    config = PartitionConfig(kind="natural_dirichlet", column="domain", alpha=0.5)
    partitions = partition_indices(dataset, config, 7, seed=0)
    domains = [set(dataset.select(indices)["domain"]) for indices in partitions]
    assert domains == [{"art"}] * 3 + [{"photo"}] * 2 + [{"sketch"}] * 2
    assert_disjoint_cover(partitions, len(dataset))
    assert_same(partitions, partition_indices(dataset, config, 7, seed=0))
    other = partition_indices(dataset, config, 7, seed=1)
    assert any(not np.array_equal(left, right) for left, right in zip(partitions, other, strict=True))


def test_natural_dirichlet_with_a_client_per_value_is_natural():
    dataset = table(balanced())
    drawn, natural = (
        partition_indices(dataset, PartitionConfig(kind=kind, column="domain"), 3, seed=0)
        for kind in ("natural_dirichlet", "natural")
    )
    assert_same(drawn, natural)


def test_natural_dirichlet_draws_apart_for_each_value_and_more_skew_for_smaller_alpha():
    labels = np.repeat(balanced(each=200), 2)
    dataset = table(labels, ["art", "photo"])

    def counts(alpha):
        config = PartitionConfig(kind="natural_dirichlet", column="domain", alpha=alpha, min_samples=2)
        return partition_table(labels, partition_indices(dataset, config, 6, seed=3), 5)

    assert not np.array_equal(counts(1.0)[:3], counts(1.0)[3:])
    shares = [(found.max(1) / found.sum(1)).mean() for found in map(counts, (0.1, 1.0, 100.0))]
    assert shares == sorted(shares, reverse=True)


def test_natural_dirichlet_refuses_with_numbers():
    config = PartitionConfig(kind="natural_dirichlet", column="domain")
    with pytest.raises(ConfigError, match=r"'domain' has 3 distinct values, .* but 2 were started; start at least 3"):
        partition_indices(table(balanced()), config, 2, seed=0)
    with pytest.raises(ConfigError, match=r"33 images with domain='art' cannot be shared by 34 clients; start fewer"):
        partition_indices(table(balanced()), config, 100, seed=0)
    with pytest.raises(ConfigError, match=r"'colour' is not a column of the data: label, domain, row"):
        partition_indices(table(balanced()), PartitionConfig(kind="natural_dirichlet", column="colour"), 3, seed=0)
    hopeless = PartitionConfig(kind="natural_dirichlet", column="domain", alpha=0.01, min_samples=15)
    with pytest.raises(ConfigError, match=r"natural_dirichlet partition leaves a client \d+ .*: (\d+, ){5}\d+\. Start"):
        partition_indices(table(balanced()), hopeless, 6, seed=0)


def test_whole_leaves_every_client_everything():
    partitions = partition_indices(table(balanced()), PartitionConfig(kind="whole"), 3, seed=0)
    assert_same(partitions, [np.arange(100)] * 3)


@pytest.mark.parametrize(
    ("config", "labels", "clients", "sizes"),
    [
        (PartitionConfig(kind="iid"), balanced(2, 7), 4, "4, 4, 3, 3"),
        (PartitionConfig(kind="natural", column="domain", min_samples=4), balanced(2, 5), 3, "3, 3, 4"),
        (PartitionConfig(kind="pathological", classes_per_client=2, min_samples=12), balanced(2, 10), 2, "10, 10"),
    ],
)
def test_too_small_clients_are_refused_with_all_sizes(config, labels, clients, sizes):
    if config.kind == "natural":
        sizes = ", ".join(sorted(sizes.split(", ")))
    with pytest.raises(ConfigError) as caught:
        partition_indices(table(labels), config, clients, seed=0)
    message = str(caught.value)
    assert f"partition.min_samples={config.min_samples}" in message
    listed = message.split("images per client: ")[1].split(".")[0].split(", ")
    assert sorted(listed) == sorted(sizes.split(", "))


def test_a_node_with_too_few_images_of_its_own_is_refused():
    with pytest.raises(ConfigError, match=r"This node has 10 images, fewer than partition\.min_samples=11; add images"):
        partition_indices(table(balanced(2, 5)), PartitionConfig(kind="whole", min_samples=11), 2, seed=0)


def test_a_hopeless_dirichlet_is_refused_with_sizes_and_no_warnings():
    config = PartitionConfig(kind="dirichlet", alpha=0.01, min_samples=20)
    warnings.simplefilter("error")  # pytest restores the filters
    with pytest.raises(ConfigError, match="images per client: ") as caught:
        partition_indices(table(balanced()), config, 5, seed=0)
    sizes = [int(size) for size in str(caught.value).split("images per client: ")[1].split(".")[0].split(", ")]
    assert sum(sizes) == 100
    assert f"leaves a client {min(sizes)} images" in str(caught.value)


def test_dirichlet_lets_most_seeds_through_by_drawing_again():
    dataset = table(balanced(each=60))
    passed, at_once = 0, 0
    for seed in range(20):
        passed += min(map(len, partition_indices(dataset, PartitionConfig(alpha=0.3), 10, seed))) >= 5
        at_once += min(map(len, partition_indices(dataset, PartitionConfig(alpha=0.3, min_samples=0), 10, seed))) >= 5
    assert at_once < passed == 20


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
@pytest.mark.parametrize("clients", [0, 101])
def test_more_clients_than_images_are_refused(kind, clients):
    with pytest.raises(ConfigError, match=f"100 images cannot be shared by {clients} clients"):
        partition_indices(table(balanced()), PartitionConfig(kind=kind), clients, seed=0)


def test_impossible_numbers_of_classes_per_client_are_refused():
    config = PartitionConfig(kind="pathological", classes_per_client=6)
    with pytest.raises(ConfigError, match=r"classes_per_client=6, but the data has 5 classes"):
        partition_indices(table(balanced()), config, 3, seed=0)
    config = PartitionConfig(kind="pathological", classes_per_client=5)
    with pytest.raises(ConfigError, match=r"pathological partition of 100 images over 30 clients failed: Label: 0"):
        partition_indices(table(balanced()), config, 30, seed=0)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=50),
    st.floats(0.001, 0.9),
    st.integers(0, 2**63 - 1),
)
def test_local_split_shares_the_images_and_leaves_both_sides_one(classes, fraction, seed):
    labels = np.asarray([9, *classes, 9])
    indices = np.arange(1, len(classes) + 1)[::-1]
    train, test = local_split(indices, labels, fraction, seed)
    assert min(len(train), len(test)) >= 1
    assert_disjoint_cover([np.r_[train, test] - 1], len(indices))
    assert abs(len(test) - fraction * len(indices)) <= 1
    assert_same((train, test), local_split(indices, labels, fraction, seed))


def test_local_split_is_stratified_and_refuses_one_image():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    train, test = local_split(np.arange(100), labels, 0.2, seed=1)
    assert partition_table(labels, [train, test], 3).tolist() == [[40, 24, 16], [10, 6, 4]]
    with pytest.raises(DataError, match=r"this one has 1 image"):
        local_split(np.asarray([3]), labels, 0.2, seed=1)


def test_partition_table_counts():
    counts = partition_table(np.asarray([0, 2, 2, 1]), [np.asarray([0, 1, 2]), np.asarray([3]), np.arange(0)], 4)
    assert counts.dtype == np.int64
    assert counts.tolist() == [[1, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="needs PETALWISE_TEST_DATA")
def test_real_partitions():
    cifar = DatasetConfig(source="parquet", image_column="img", label_column="fine_label")
    dataset = load_split(cifar, "train", Path(DATA) / "cifar100", seed=0)
    assert_disjoint_cover(partition_indices(dataset, PartitionConfig(alpha=0.3), 20, seed=0), len(dataset))
    dataset = load_split(DatasetConfig(source="parquet"), "train", Path(DATA) / "pacs", seed=0)
    partitions = partition_indices(dataset, PartitionConfig(kind="natural", column="domain"), 4, seed=0)
    assert_disjoint_cover(partitions, len(dataset))
    assert (partition_table(labels_of(dataset), partitions, 7) > 0).all()
