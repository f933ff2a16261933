"""Parameters as runs read them: their values follow whoever writes them, in whatever way."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.distributions import constraints, transform_to

from pyro_em.tracing.parameters import TracedParameter

CONSTRAINTS = (constraints.real, constraints.positive, constraints.simplex)


def parameter(constraint: constraints.Constraint) -> TracedParameter:
    u = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    return TracedParameter("theta", u, constraint, u)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_values_follow_writes_that_no_counter_shows(constraint: constraints.Constraint) -> None:
    p = parameter(constraint)
    p.value()
    p.unconstrained.data.add_(1.0)
    assert torch.equal(p.value(), transform_to(constraint)(p.unconstrained).detach())
    p.unconstrained.detach().numpy()[1] = 3.0
    assert torch.equal(p.value(), transform_to(constraint)(p.unconstrained).detach())
    other = torch.zeros(3)
    assert torch.equal(p.value(other), transform_to(constraint)(other))
    p.unconstrained.data = p.unconstrained.data.double()
    assert p.value().dtype == torch.float64


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_values_are_tensors_of_their_own(constraint: constraints.Constraint) -> None:
    p = parameter(constraint)
    expected = p.value().clone()
    for _ in range(2):
        value = p.value()
        assert not value.requires_grad
        value.zero_()
        assert torch.equal(p.value(), expected)


def test_values_that_were_asked_for_in_inference_mode_are_plain_tensors_outside() -> None:
    p = parameter(constraints.positive)
    with torch.inference_mode():
        p.value()
    assert not p.value().is_inference()


def test_a_copy_of_a_parameter_computes_values_of_its_own() -> None:
    p = parameter(constraints.positive)
    p.value()
    for twin in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert torch.equal(twin.value(), p.value())
        assert "_latest" not in vars(copy.copy(p))
        twin.unconstrained.data.add_(1.0)
        assert not torch.equal(twin.value(), p.value())
