"""Intervals, contrasts and selection: closed forms, and simulations with known truth."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest

from ddpmctl.comparison.verdict import Arm, Finding, verdict_sentence
from ddpmctl.statistics.contrasts import TRAINING_COST, Contrast, Spread, contrast, holm
from ddpmctl.statistics.distributions import incomplete_beta, t_cdf, t_quantile
from ddpmctl.statistics.intervals import Interval, accuracy_interval
from ddpmctl.statistics.ranking import Standing, best_index
from ddpmctl.statistics.tallies import Tally, concatenated


def part(tally: Tally, start: int, stop: int) -> Tally:
    """Return the tally of some of the images of each condition."""
    return Tally(tally.hits[:, start:stop], tally.labels)


# Distributions


@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.9995])
def test_t_quantiles_have_the_closed_forms_of_one_and_two_degrees_of_freedom(p: float) -> None:
    assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
    assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-9)
    assert t_quantile(1 - p, 2) == pytest.approx(-t_quantile(p, 2), rel=1e-9)


@pytest.mark.parametrize(("df", "value"), [(4, 2.7764451052), (31, 2.0395134464), (63, 1.9983405425), (math.inf, 1.9599639845)])
def test_t_quantiles_agree_with_tables(df: float, value: float) -> None:
    assert t_quantile(0.975, df) == pytest.approx(value, abs=1e-8)


def test_t_distribution_is_symmetric_around_zero() -> None:
    assert t_quantile(0.5, 7) == 0
    assert t_cdf(0.0, 7) == pytest.approx(0.5)
    assert t_cdf(-1.3, 7) + t_cdf(1.3, 7) == pytest.approx(1)


@pytest.mark.parametrize("x", [0.05, 0.5, 0.93])
def test_incomplete_beta_of_whole_numbers_is_a_binomial_tail(x: float) -> None:
    a, b = 3, 5
    tail = sum(math.comb(a + b - 1, k) * x**k * (1 - x) ** (a + b - 1 - k) for k in range(a, a + b))
    assert incomplete_beta(a, b, x) == pytest.approx(tail, rel=1e-12)


# Tallies


def test_accuracy_pools_labels_and_joins_files() -> None:
    one = Tally(np.array([[1, 0], [3, 2]]), np.array([1, 3]))
    other = Tally(np.array([[2, 2]]), np.array([2]))
    assert one.accuracy == 6 / 8
    assert concatenated([one, other]).accuracy == 10 / 12
    assert part(one, 0, 1).accuracy == 4 / 4


@pytest.mark.parametrize("hits", [[[2], [1]], [[-1], [1]], [[1, 1]], np.zeros((2, 0), dtype=int)])
def test_an_impossible_tally_is_refused(hits: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="hits"):
        Tally(np.array(hits), np.array([1, 1]))


# Intervals and tests against closed forms


def test_an_interval_is_deterministic_and_contains_its_estimate() -> None:
    tally = Simulation(seed=5).tallies(np.random.default_rng(0), arms=1, repeats=3)[0][0]
    first, again = accuracy_interval(tally), accuracy_interval(tally)
    assert first == again
    assert first.low < first.estimate < first.high


def test_one_condition_gives_an_infinite_interval() -> None:
    interval = accuracy_interval(Tally(np.array([[1, 2, 1]]), np.array([2])))
    assert (interval.low, interval.high) == (0, 1)


@pytest.mark.parametrize("value", [0, 1])
def test_at_accuracy_0_and_1_the_limit_is_the_exact_binomial_one(value: int) -> None:
    interval = accuracy_interval(Tally(np.full((20, 4), value), np.ones(20, dtype=int)))
    far = 0.025 ** (1 / 20)
    assert (interval.low, interval.high) == pytest.approx((far, 1) if value else (0, 1 - far))


def test_the_widened_bootstrap_agrees_with_the_t_interval() -> None:
    rng = np.random.default_rng(1)
    hits = rng.binomial(3, 0.5, size=(400, 2))
    interval, rates = accuracy_interval(Tally(hits, np.full(400, 3))), hits.mean(axis=1) / 3
    half = t_quantile(0.975, 399) * rates.std(ddof=1) / math.sqrt(400)
    assert interval.low == pytest.approx(rates.mean() - half, abs=half * 0.05)
    assert interval.high == pytest.approx(rates.mean() + half, abs=half * 0.05)


def test_the_p_value_is_that_of_all_sign_flips() -> None:
    gaps = np.array([2, 1, 2, 1, -1, 1, 2, 0, 1])
    labels = np.full(9, 2)
    first, second = Tally(np.maximum(gaps, 0)[:, None], labels), Tally(np.maximum(-gaps, 0)[:, None], labels)
    flips = [abs(sum(s * g for s, g in zip(signs, gaps, strict=True))) for signs in itertools.product((1, -1), repeat=9)]
    exact = np.mean([value >= abs(gaps.sum()) for value in flips])
    assert contrast([[first], [second]], [1, -1]).p == pytest.approx(exact, abs=0.008)  # 10,000 of the flips


def test_equal_arms_have_no_difference() -> None:
    tally = Simulation(seed=5).tallies(np.random.default_rng(0), arms=1, repeats=3)[0][0]
    same = contrast([[tally], [tally]], [1, -1])
    assert (same.estimate, same.interval.low, same.interval.high, same.p) == (0, 0, 0, 1)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_an_interaction_is_the_difference_of_differences() -> None:
    labels = np.full(50, 10)
    cells = [[Tally(np.full((50, 2), hits), labels)] for hits in (9, 5, 6, 4)]
    assert contrast(cells, [1, -1, -1, 1]).estimate == pytest.approx((0.9 - 0.5) - (0.6 - 0.4))


def test_arms_with_different_conditions_are_refused() -> None:
    labels = np.array([1, 2])
    one, more = Tally(np.array([[1], [2]]), labels), Tally(np.array([[1, 1], [2, 2]]), labels)
    with pytest.raises(ValueError, match="same conditions"):
        contrast([[one], [more]], [1, -1])
    with pytest.raises(ValueError, match="weight"):
        contrast([[one], [one]], [1, 1])


def test_variance_components_need_at_least_two_images_or_seeds() -> None:
    world, rng = Simulation(seed=7, seeds=0.05), np.random.default_rng(2)
    single = contrast(world.tallies(rng, arms=2, repeats=1), [1, -1]).spread
    assert math.isnan(single.images)
    assert single.repeats_for(0.1) is None
    assert (single.seeds, single.seeds_df) == (0, 0)
    several = contrast(world.tallies(rng, arms=2, repeats=4, replicates=3), [1, -1]).spread
    assert several.seeds_df == 4
    assert several.error(repeats=8) < several.error() < several.error(repeats=2)
    assert several.error() ** 2 == pytest.approx(several.conditions + several.images + several.seeds)


def test_smaller_differences_need_more_repeats_or_are_undetectable() -> None:
    spread = contrast(Simulation(seed=3).tallies(np.random.default_rng(4), arms=2, repeats=4), [1, -1]).spread
    large, small = spread.repeats_for(0.2), spread.repeats_for(0.12)
    assert large is not None
    assert small is not None
    assert large < small
    assert spread.detectable(small) <= 0.12 < spread.detectable(small - 1)
    assert spread.repeats_for(0.001) is None


def test_more_training_seeds_are_advised_if_their_variance_dominates() -> None:
    labels = np.full(60, 20)
    arms = [[Tally(np.full((60, 2), hits), labels) for hits in arm] for arm in ((12, 13, 14), (12,))]  # 0.60, 0.65, 0.70 against 0.60
    spread = contrast(arms, [1, -1]).spread
    assert spread.one_seed == pytest.approx(0.05**2)
    assert spread.seeds == pytest.approx(0.05**2 * (1 / 3 + 1))
    plan = spread.cheapest_for(0.05)
    assert plan is not None
    repeats, seeds = plan
    assert repeats == 2  # the images have no variance
    assert seeds is not None
    by_hand = [(t_quantile(0.975, 2 * (k - 1)) + t_quantile(0.8, 2 * (k - 1))) * 0.05 * math.sqrt(2 / k) for k in (seeds, seeds - 1)]
    assert by_hand[0] <= 0.05 < by_hand[1]
    assert spread.repeats_for(0.05) is None


@pytest.mark.parametrize(
    ("conditions", "images", "one_seed", "both"),
    [(1e-5, 4e-4, 4e-4, True), (1e-5, 9e-4, 2e-4, False), (1e-5, 9e-4, 1e-6, False), (1e-5, 1e-6, 4e-4, False), (1e-3, 4e-4, 4e-4, False)],
)
def test_the_advised_plan_is_the_cheapest_of_all_that_are_enough(conditions: float, images: float, one_seed: float, *, both: bool) -> None:
    now, weights = 2, (1.0, 1.0)
    spread = Spread(conditions, images, one_seed, repeats=4, df=63, seeds_df=2 * (now - 1), weights=weights, one_seed=one_seed)
    costs = {
        (repeats, seeds): seeds * repeats + TRAINING_COST * (seeds - now)
        for repeats in range(4, 301)
        for seeds in range(now, 31)
        if spread.detectable(repeats, seeds) <= 0.05
    }
    plan = spread.cheapest_for(0.05)
    if not costs:
        assert plan is None
        return
    assert plan is not None
    repeats, seeds = plan[0], plan[1] or now
    assert costs[repeats, seeds] == min(costs.values())
    assert (repeats > 4 and seeds > now) == both


@pytest.mark.parametrize(
    ("images", "one_seed", "words"),
    [
        (4e-4, 4e-4, r"5 points need --repeats \d+ and \d training seeds in each arm \(here 4; 2 and 2\)\.$"),
        (9e-4, 1e-6, r"5 points need --repeats \d+ \(here 4\)\.$"),
        (1e-6, 4e-4, r"5 points need \d training seeds in each arm \(here 2 and 2\)\.$"),
    ],
)
def test_the_advice_names_what_has_to_grow(images: float, one_seed: float, words: str) -> None:
    spread = Spread(1e-5, images, one_seed, repeats=4, df=63, seeds_df=2, weights=(1.0, 1.0), one_seed=one_seed)
    first, second = (Arm(name, (None, None)) for name in "AB")  # type: ignore[arg-type]
    sentence = verdict_sentence(first, second, Finding("A - B", Contrast(Interval(0.01, -0.05, 0.07), 0.6, spread), 0.6))
    assert re.search(words, sentence), sentence


# Simulations


@dataclass(frozen=True)
class Simulation:
    """Simulated conditions of different difficulty, with effects of arms, seeds and images.

    Attributes:
        effect: by which the logits of the first arm exceed the second's.
        seeds: standard deviation between training seeds, of their logits.
    """

    seed: int = 0
    conditions: int = 64
    ease: float = 0.9
    difficulty: float = 1.3
    taste: float = 0.5
    luck: float = 0.8
    effect: float = 0.0
    seeds: float = 0.0

    def chances(self, rng: np.random.Generator, arms: int, repeats: int, replicates: int, conditions: int) -> np.ndarray:
        """Return the hit probability of each label: (arms, replicates, conditions, repeats)."""
        logit = self.ease + self.difficulty * rng.normal(size=(1, 1, conditions, 1)) + self.taste * rng.normal(size=(arms, 1, conditions, 1))
        logit = logit + self.effect * (np.arange(arms) == 0).reshape(-1, 1, 1, 1) + self.seeds * rng.normal(size=(arms, replicates, 1, 1))
        return 1 / (1 + np.exp(-(logit + self.luck * rng.normal(size=(arms, replicates, conditions, repeats)))))

    def tallies(self, rng: np.random.Generator, *, arms: int, repeats: int, replicates: int = 1) -> list[list[Tally]]:
        labels = rng.integers(1, 4, size=self.conditions)
        hits = rng.binomial(labels[:, None], self.chances(rng, arms, repeats, replicates, self.conditions))
        return [[Tally(one, labels) for one in arm] for arm in hits]

    def truth(self) -> np.ndarray:
        """Return the accuracy of each of two arms over all conditions, images and seeds."""
        chances = self.chances(np.random.default_rng(99), 2, 1, 1, 400_000) if not self.seeds else np.concatenate(
            [self.chances(np.random.default_rng(s), 2, 1, 1, 2_000) for s in range(400)], axis=2)  # fmt: skip
        return chances.mean(axis=(1, 2, 3))


def with_difference(points: float, **settings: float) -> Simulation:
    """Return a simulation in which the first arm is better by ``points``."""
    low, high = 0.0, 3.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        better, worse = Simulation(**settings, effect=middle).truth()
        low, high = (middle, high) if better - worse < points else (low, middle)
    return Simulation(**settings, effect=high)


@pytest.mark.parametrize("replicates", [1, 3])
def test_the_false_positive_rate_is_at_most_6_percent(replicates: int) -> None:
    world, rng = Simulation(seeds=0.2 if replicates > 1 else 0.0), np.random.default_rng(10)
    called = [contrast(world.tallies(rng, arms=2, repeats=2, replicates=replicates), [1, -1]).p < 0.05 for _ in range(2000)]
    assert np.mean(called) <= 0.06


def test_the_familywise_error_rate_of_three_arms_is_at_most_6_percent() -> None:
    world, rng, called = Simulation(), np.random.default_rng(11), 0
    for _ in range(1000):
        arms = world.tallies(rng, arms=3, repeats=2)
        called += min(holm([contrast([arms[i], arms[j]], [1, -1]).p for i, j in ((0, 1), (0, 2), (1, 2))])) < 0.05
    assert called / 1000 <= 0.06


@pytest.mark.slow
def test_ten_points_are_detected_with_the_advised_repeats() -> None:
    """Start with three images per condition, then follow the advice."""
    world, rng, found, advised = with_difference(0.10, taste=0.3, luck=2.5, conditions=48), np.random.default_rng(12), [], []
    for _ in range(1000):
        labels = rng.integers(1, 4, size=world.conditions)
        hits = rng.binomial(labels[:, None], world.chances(rng, 2, 60, 1, world.conditions))
        first, second = (Tally(arm[0], labels) for arm in hits)
        pilot = contrast([[part(first, 0, 3)], [part(second, 0, 3)]], [1, -1])
        advised.append(pilot.spread.repeats_for(0.10) or 3)  # where no number is enough, nothing is added
        images = min(advised[-1], 60)
        found.append(contrast([[part(first, 0, images)], [part(second, 0, images)]], [1, -1]).p < 0.05)
    assert np.mean(found) >= 0.78
    assert np.median(advised) >= 5  # so that the advice was needed


def test_a_difference_is_detected_with_the_advised_repeats_and_seeds() -> None:
    """The advice of a large pilot, whose variance components are almost the true ones, gives the power that it promises."""
    points, rng = 0.08, np.random.default_rng(16)
    world = with_difference(points, taste=0.1, luck=2.5, seeds=0.2)
    pilots = [contrast(world.tallies(rng, arms=2, repeats=4, replicates=12), [1, -1]).spread for _ in range(20)]
    parts = [float(np.mean([getattr(pilot, part) for pilot in pilots])) for part in ("conditions", "images", "one_seed")]
    spread = Spread(parts[0], 12 * parts[1], parts[2], repeats=4, df=63, seeds_df=2, weights=(1.0, 1.0), one_seed=parts[2])  # as of two seeds an arm
    plan = spread.cheapest_for(points)
    assert plan is not None
    repeats, seeds = plan
    assert seeds is not None
    found = [contrast(world.tallies(rng, arms=2, repeats=repeats, replicates=seeds), [1, -1]).p < 0.05 for _ in range(500)]
    assert np.mean(found) >= 0.78


@pytest.mark.parametrize(("ease", "repeats"), [(0.9, 1), (0.9, 4), (2.5, 4)])
def test_intervals_of_an_accuracy_have_their_nominal_coverage(ease: float, repeats: int) -> None:
    world, rng = Simulation(ease=ease), np.random.default_rng(13)
    truth = float(world.truth()[0])
    covered = [truth in accuracy_interval(world.tallies(rng, arms=1, repeats=repeats)[0][0]) for _ in range(2000)]
    assert 0.93 <= np.mean(covered) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("replicates", [1, 3])
def test_intervals_of_a_difference_have_their_nominal_coverage(replicates: int) -> None:
    world, rng = Simulation(effect=0.6, seeds=0.25 if replicates > 1 else 0.0), np.random.default_rng(14)
    better, worse = world.truth()
    covered = [better - worse in contrast(world.tallies(rng, arms=2, repeats=2, replicates=replicates), [1, -1]).interval for _ in range(2000)]
    assert 0.93 <= np.mean(covered) <= 0.97


def test_the_confirmed_score_of_the_best_of_sixty_is_unbiased() -> None:
    world, rng = Simulation(taste=0.0), np.random.default_rng(15)
    truth, naive, reported = float(world.truth()[0]), [], []
    for _ in range(300):
        sweep = [arm[0] for arm in world.tallies(rng, arms=60, repeats=2)]
        best = best_index([Standing(part(tally, 0, 1).accuracy) for tally in sweep])
        naive.append(part(sweep[best], 0, 1).accuracy)
        reported.append(part(sweep[best], 1, 2).accuracy)
    assert abs(np.mean(reported) - truth) < 0.005
    assert np.mean(naive) - truth > 0.05
