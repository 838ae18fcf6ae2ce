import math
import statistics

import pytest

from eigenattn.evaluation.paired import difference, exponential, mean


def test_mean_has_the_standard_error_of_independent_items():
    values = [0.1, 0.4, 0.35, 0.8]
    found = mean(values)
    assert found.value == pytest.approx(statistics.mean(values))
    assert found.error == pytest.approx(statistics.stdev(values) / 2)
    assert mean([3.0]) == (3.0, None)


def test_exponential_carries_the_error_over():
    found = exponential(mean([2.0, 2.2]))
    assert found.value == pytest.approx(math.exp(2.1))
    assert found.error == pytest.approx(math.exp(2.1) * 0.1)


def test_a_difference_is_paired():
    """What items have in common drops out of the error."""
    base = [0.0, 5.0, 10.0]
    assert difference([value + 0.5 for value in base], base) == (0.5, 0.0)
    with pytest.raises(ValueError):
        difference([1.0], base)
