"""What follows from weights is computed once, and again when they change."""

import torch
from torch import nn

from eigenattn.models.memoised import memoised


def test_it_is_computed_again_only_when_something_changed():
    module, weight, calls = nn.Module(), nn.Parameter(torch.ones(3)), []

    def doubled(source, number=1):
        return memoised(module, "_doubled", [source, None, number], lambda: calls.append(1) or 2 * source.detach())

    assert torch.equal(doubled(weight), doubled(weight)) and len(calls) == 1
    with torch.no_grad():
        weight.mul_(3)
    assert torch.equal(doubled(weight), torch.full((3,), 6.0)) and len(calls) == 2
    doubled(weight, number=2)
    assert len(calls) == 3


def test_another_tensor_at_the_same_place_is_another():
    """As a parameter that takes the place of one just freed may well have its address, and its version."""
    module, weight = nn.Module(), nn.Parameter(torch.ones(3))
    first = memoised(module, "_sum", [weight], lambda: weight.detach().sum())
    other = nn.Parameter(weight.detach())
    assert other.data_ptr() == weight.data_ptr()
    assert memoised(module, "_sum", [other], lambda: "made anew") == "made anew" != first


def test_it_is_no_part_of_the_module():
    module = nn.Linear(2, 2)
    memoised(module, "_kept", [module.weight], lambda: torch.zeros(5))
    assert set(module.state_dict()) == {"weight", "bias"}
