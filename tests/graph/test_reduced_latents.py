"""Models that reduce or branch on whole latents are refused, whatever one plain run happens to draw."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em import ExactPosteriorEM, ModelError, UsageError

X = torch.tensor([0.3, -1.0, 0.8, 1.1, -0.2])


def _with_loc(loc: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(loc(z), 1.0), obs=x)

    return model


MU = torch.tensor([-1.0, 1.0])


WHOLE = {
    "max": lambda z: MU[z.max()],
    "sum": lambda z: MU[z.sum().clamp(max=1)],
    "any": lambda z: MU[1] if z.any() else MU[0],
    "all": lambda z: MU[1] if (z == 1).all() else MU[0],
    "numpy": lambda z: MU[int(np.max(z.numpy()))],
    "list": lambda z: MU[max(z.flatten().tolist())],
    "sorted": lambda z: MU[z.reshape(-1).sort().values[-1]],
    "unique": lambda z: MU[torch.unique(z)[-1]],
    "nonzero": lambda z: MU[min(1, len(z.nonzero()))],
    "where": lambda z: MU[z] if len(torch.where(z == 1)[0]) else -2 * MU[z],
    "equal": lambda z: MU[0 if torch.equal(z, torch.zeros_like(z)) else 1],
    "product": lambda z: MU[(z.reshape(-1).double() @ torch.ones(z.numel()).double() > 0).long()],
    "einsum": lambda z: MU[(torch.einsum("i->", z.reshape(-1)) > 0).long()],
}


@pytest.mark.parametrize("how", WHOLE)
def test_a_latent_outside_plates_whose_values_are_taken_together(how: str) -> None:
    """One of two seeds draws the value at which a plain run agrees by chance."""
    for seed in (0, 1):
        pyro.set_rng_seed(seed)
        with pytest.raises(ModelError, match="enumerated, its argument 'loc' is not what"):
            ExactPosteriorEM(_with_loc(WHOLE[how])).posterior(X)


def test_steps_of_a_loop_whose_values_are_taken_together() -> None:
    """Every step draws one: the largest of a step and the one before is that of all of their values."""

    def model(x: Tensor) -> None:
        before = torch.tensor(1)
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([1e-6, 1 - 1e-6])))
            pair = torch.stack(torch.broadcast_tensors(z, before))
            pyro.sample(f"x_{t}", dist.Normal(MU[pair.max()], 1.0), obs=x[t])
            before = z

    with pytest.raises(ModelError, match="enumerated, its argument 'loc' is not what"):
        ExactPosteriorEM(model).posterior(X)


def test_a_reduction_of_one_event_is_no_reduction_of_values() -> None:
    rows = torch.tensor([[0.5, 1.5], [-1.0, 0.0]])
    found = ExactPosteriorEM(_with_loc(lambda z: rows[z].sum(-1))).posterior(X)
    parts = [dist.Normal(r.sum(), 1.0).log_prob(X).sum() for r in rows]
    exact = torch.logsumexp(torch.stack(parts) + torch.tensor([0.3, 0.7]).log(), 0)
    assert found.log_evidence == pytest.approx(float(exact))


def _sites_come_and_go(z: Tensor, x: Tensor) -> None:
    if z.sum() > 0:
        pyro.sample("x", dist.Normal(MU[z], 1.0), obs=x)


def _masked(z: Tensor, x: Tensor) -> None:
    with pyro.poutine.mask(mask=bool(z.any())):
        pyro.sample("x", dist.Normal(MU[z], 1.0), obs=x)


def _scaled(z: Tensor, x: Tensor) -> None:
    with pyro.poutine.scale(scale=2.0 if z.any() else 1.0):
        pyro.sample("x", dist.Normal(MU[z], 1.0), obs=x)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (_sites_come_and_go, "its sites differ from run to run: 'x'"),
        (_masked, "site 'x': its mask reads latent 'z' of other elements"),
        (_scaled, "site 'x': its scale reads latent 'z' of other elements"),
    ],
)
def test_a_branch_on_all_elements_of_a_plate(
    body: Callable[[Tensor, Tensor], None], text: str
) -> None:
    """With all of z at zero there is no observation: that alone has more mass than all the rest."""

    def model(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            body(pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5]))), x)

    with pytest.raises(ModelError, match=text):
        ExactPosteriorEM(model).posterior(X)


def test_a_name_that_is_there_twice_is_shown_in_the_users_line() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("z", dist.Normal(MU[z], 1.0), obs=x)

    with pytest.raises(ModelError, match=r'line \d+: pyro.sample\("z", dist.Normal') as found:
        ExactPosteriorEM(model).posterior(X)
    assert "f'z_{t}'" in str(found.value)


def test_a_step_that_is_asked_for_without_its_number_is_told_of_the_glob() -> None:
    def model(x: Tensor) -> None:
        for t in pyro.markov(range(2)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample(f"x_{t}", dist.Normal(MU[z], 1.0), obs=x[t])

    with pytest.raises(UsageError, match=r"all steps together: 'z_\*'"):
        ExactPosteriorEM(model).posterior(X).probs("z")
