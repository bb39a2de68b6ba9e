"""The largest batch that fits: found in few trials, whatever memory looks like."""

import pytest

from dist_jax.plan.search import Trial, best, largest_fitting

LIMIT = 30.0


def search(needed, first, *, says=True, **options):
    def attempt(size):
        value = needed(size)
        return Trial(size, value <= LIMIT, value if says or value <= LIMIT else None)

    return largest_fitting(attempt, first, LIMIT, **options)


@pytest.mark.parametrize('first', [1, 8, 32, 150, 4000])
@pytest.mark.parametrize(
    ('needed', 'most'),
    [(lambda n: 1 + 0.17 * n, 170), (lambda n: 0.3 * n, 100), (lambda n: 2 + 0.1 * n**1.1, 167)],
    ids=['line', 'proportional', 'bent'],
)
def test_the_limit_is_found_in_few_trials(needed, most, first):
    trials = search(needed, first)
    assert 0.9 * most <= best(trials) <= most
    assert len(trials) <= 6
    assert all(trial.fits == (trial.size <= most) for trial in trials)


def test_sizes_that_do_not_say_what_they_need_are_bisected():
    trials = search(lambda n: 1 + 0.17 * n, 1000, says=False, most=12)
    assert 0.9 * 170 <= best(trials) <= 170


def test_sizes_are_whole_parts_of_an_accumulated_batch():
    trials = search(lambda n: 1 + 0.17 * n, 30, granule=4)
    assert all(trial.size % 4 == 0 for trial in trials)


def test_nothing_may_fit():
    trials = search(lambda n: 40 + n, 8)
    assert best(trials) is None
    assert min(trial.size for trial in trials) == 1
