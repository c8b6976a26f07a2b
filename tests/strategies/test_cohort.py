from hypothesis import given
from hypothesis import strategies as st

from strategies.cohort import draw_cohort, identity_order

names = st.lists(st.text(min_size=1, max_size=5), unique=True, max_size=30)


@given(names, st.floats(0.01, 1.0), st.integers(1, 5), st.integers(0, 10**9), st.integers(1, 1000), st.randoms())
def test_a_cohort_is_a_function_of_seed_round_and_identities(identities, fraction, minimum, seed, server_round, random):
    first = draw_cohort(identities, fraction, minimum, seed, server_round)
    shuffled = list(identities)
    random.shuffle(shuffled)
    assert draw_cohort(shuffled, fraction, minimum, seed, server_round) == first
    assert first == sorted(set(first), key=identity_order)
    assert set(first) <= set(identities)
    assert len(first) == min(len(identities), max(minimum, round(fraction * len(identities))))


def test_numbers_are_ordered_by_value_before_names():
    assert sorted(["site-b", "10", "9", "site-a", "²"], key=identity_order) == ["9", "10", "site-a", "site-b", "²"]


def test_every_client_is_drawn_sooner_or_later():
    pool = [str(i) for i in range(20)]
    drawn = {name for server_round in range(1, 60) for name in draw_cohort(pool, 0.1, 1, 0, server_round)}
    assert drawn == set(pool)
