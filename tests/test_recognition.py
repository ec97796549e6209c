"""Objects in maps of logits."""

from __future__ import annotations

import math

import pytest
import torch

from ddpmctl.nets.recognition import AN_OBJECT, COUNT_ERROR, ObjectCount, log_probability_of_number, none_or_one, none_or_some, seen_anywhere


def test_objects_are_peaks_and_each_is_there_or_not() -> None:
    """Against all outcomes of independent peaks, by hand: an object over several cells is one peak, two objects apart are two."""
    maps = torch.full((1, 4, 8, 8), -20.0)
    maps[0, 1, 2:4, 2:4] = torch.tensor([[1.0, 2.0], [1.5, 1.0]])  # one object
    maps[0, 2, 1, 1], maps[0, 2, 6, 5] = 2.0, 1.0  # two
    maps[0, 3, 4, 4], maps[0, 3, 4, 5] = 3.0, 3.0  # one, whose highest cells are equal, as they often are in bf16
    none, one = none_or_one(maps + AN_OBJECT)[0].exp()
    p, q, r = (1 / (1 + math.exp(-logit)) for logit in (2.0, 1.0, 3.0))
    assert none.tolist() == pytest.approx([1, 1 - p, (1 - p) * (1 - q), 1 - r], abs=1e-3)
    assert one.tolist() == pytest.approx([0, p, p * (1 - q) + q * (1 - p), r], abs=1e-3)


def test_a_class_is_seen_if_it_is_seen_anywhere() -> None:
    maps = torch.full((1, 2, 8, 8), -20.0)
    maps[0, 1, 3, 3] = maps[0, 1, 6, 1] = 9.0
    expected = math.log(2 / 64) + 9
    assert seen_anywhere(maps)[0].tolist() == pytest.approx([-20, expected], abs=1e-4)
    absent, present = none_or_some(maps)[0].exp()
    assert present.tolist() == pytest.approx([0, 1 / (1 + math.exp(-expected))], abs=1e-4)
    assert (absent + present).tolist() == pytest.approx([1, 1])


def test_the_probability_of_a_number_of_objects_is_that_of_a_normal_error() -> None:
    counted, number = torch.tensor([2.0, 2.5, 2.9, 0.1, 1.2]), torch.tensor([2.0, 2.0, 2.0, 0.0, 2.0])
    found = log_probability_of_number(counted, number).exp()
    for value, whole, probability in zip(counted.tolist(), number.tolist(), found.tolist(), strict=True):
        density = [math.exp(-((value - k) ** 2) / (2 * COUNT_ERROR**2)) for k in range(9)]
        assert probability == pytest.approx(density[int(whole)] / sum(density), rel=1e-3)
    assert found[1].item() == pytest.approx(0.5, abs=1e-3)
    together = sum(log_probability_of_number(counted[:1], torch.tensor([float(k)])).exp() for k in range(6))
    torch.testing.assert_close(together, torch.ones(1), rtol=1e-3, atol=0)


def test_a_count_is_a_sum_over_places_so_that_two_images_side_by_side_show_the_objects_of_both() -> None:
    count = ObjectCount(32, torch.nn.SiLU)
    left, right = torch.randn((2, 3, 32, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(count(left) > 0, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(count(torch.cat((left, right), 3)), count(left) + count(right))
