import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from task.config import PartitionConfig
from task.data.over_represented import over_represented
from task.data.partitions import partition_indices, partition_table
from tests.task.data.test_partitions import balanced, table


def counts(labels, parts):
    return partition_table(labels, parts, int(labels.max()) + 1)


def test_every_client_has_all_classes_and_two_of_them_more():
    labels = balanced(classes=10, each=100)
    parts = partition_indices(table(labels), PartitionConfig(kind="over_represented", share=0.5), 10, seed=3)
    found = counts(labels, parts)
    assert found.min() >= 5
    more = found > 20
    assert (more.sum(axis=1) == 2).all()
    assert (more.sum(axis=0) == 2).all()  # twenty draws over ten classes: each as often as the others
    np.testing.assert_array_equal(found[~more], 5)
    np.testing.assert_array_equal(found[more], 30)


def test_with_all_of_the_share_clients_have_no_other_classes_and_without_any_it_is_even():
    labels = balanced(classes=6, each=12)
    everything = counts(labels, over_represented(labels, 3, 2, share=1.0, seed=0))
    assert ((everything > 0).sum(axis=1) == 2).all()
    np.testing.assert_array_equal(counts(labels, over_represented(labels, 3, 2, share=0.0, seed=0)), 4)


def test_a_class_that_nobody_drew_is_shared_by_all():
    labels = balanced(classes=5, each=8)
    found = counts(labels, over_represented(labels, 2, 1, share=1.0, seed=0))
    assert sorted(map(tuple, found.T)) == [(0, 8), (4, 4), (4, 4), (4, 4), (8, 0)]


@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=80),
    clients=st.integers(1, 9),
    each=st.integers(1, 7),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
)
def test_all_rows_are_dealt_out_once_whatever_the_labels(labels, clients, each, share, seed):
    labels = np.array(labels)
    parts = over_represented(labels, clients, min(each, len(np.unique(labels))), share, seed)
    assert len(parts) == clients
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
