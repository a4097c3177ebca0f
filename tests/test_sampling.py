from itertools import combinations, product

from sampling import pairwise


def test_any_two_values_meet_and_not_all_combinations_are_needed():
    factors = ["abcdefg", (1, 2, 3), (True, False), "xy"]
    chosen = pairwise(*factors)
    for i, j in combinations(range(4), 2):
        assert {(row[i], row[j]) for row in chosen} == set(product(factors[i], factors[j]))
    assert 21 <= len(chosen) <= 24 < 84
    assert chosen == pairwise(*factors)
