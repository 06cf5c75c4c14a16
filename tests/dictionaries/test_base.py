"""What every kind of dictionary shares."""

from __future__ import annotations

import pytest
import torch

from dictlearn.dictionaries.base import forget_moments


@pytest.mark.parametrize(
    "make",
    [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), torch.optim.Adamax, torch.optim.Muon],
    ids=["adam", "momentum", "adamax", "muon"],
)
def test_forgotten_rows_have_no_past_and_the_others_keep_theirs(make):
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(6, 4, generator=generator))
    optimiser = make([parameter], lr=0.1)
    for _ in range(3):
        parameter.grad = torch.randn(6, 4, generator=generator)
        optimiser.step()
    rows, kept = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    before = {name: moment.clone() for name, moment in optimiser.state[parameter].items()}
    forget_moments(optimiser, parameter, rows)
    moments = {name: moment for name, moment in optimiser.state[parameter].items() if moment.shape == parameter.shape}
    assert moments
    for name, moment in moments.items():
        assert not moment[rows].any(), name
        assert torch.equal(moment[kept], before[name][kept]) and moment[kept].any(), name
    assert all(torch.equal(before[name], m) for name, m in optimiser.state[parameter].items() if name not in moments)


def test_an_optimiser_that_has_not_stepped_has_nothing_to_forget():
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    forget_moments(torch.optim.Adam([parameter]), parameter, torch.tensor([0]))
