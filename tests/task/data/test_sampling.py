import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from task.data.sampling import stratified_sample

label_arrays = st.lists(st.integers(0, 6), max_size=60).map(lambda values: np.asarray(values, dtype=np.int64))


@settings(deadline=None)
@given(label_arrays, st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_a_sample_has_the_asked_size_and_every_class_its_share(labels, fraction, seed):
    count = round(fraction * len(labels))
    chosen = stratified_sample(labels, count, seed)
    assert chosen.dtype == np.int64
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    for code in np.unique(labels):
        share = (labels == code).sum() * count / len(labels)
        assert abs((labels[chosen] == code).sum() - share) < 1
    np.testing.assert_array_equal(chosen, stratified_sample(labels, count, seed))


def test_every_position_of_a_class_is_as_likely():
    labels = np.asarray([0, 0, 0, 0, 1, 1])
    hits = np.zeros(6)
    for seed in range(600):
        hits[stratified_sample(labels, 3, seed)] += 1
    np.testing.assert_allclose(hits / 600, 0.5, atol=0.08)


def test_equal_remainders_are_drawn_not_given_to_the_first_class():
    labels = np.asarray([0, 1, 2, 3])
    assert {int(stratified_sample(labels, 1, seed)[0]) for seed in range(60)} == {0, 1, 2, 3}
