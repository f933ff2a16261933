"""More kinds of random programs against brute force, with the oracle of `random_models`.

Zeros in tables, masks of a distribution below and above its events, one per entry, chains of second
order and with gaps, joints of pairs, modes, draws, and parameters that are latents with priors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from torch import Tensor

from pyro_em import DegenerateError, ExactPosteriorEM
from tests.posteriors.random_models import (
    RANK,
    Builder,
    Latent,
    RandomModel,
    Values,
    collapsed,
    evidence_and_posterior,
    m_step_maximises,
    monotone_and_compiled_as_generic,
    seeds,
    short_gradients,
)
from tests.posteriors.test_sampling import DRAWS, agree

PRIORS: dict[str, Callable[[Tensor], Any]] = {
    "real": lambda start: dist.Normal(torch.zeros_like(start), 2.0),
    "positive": lambda start: dist.Gamma(torch.full_like(start, 2.5), 1.5),
    "unit": lambda start: dist.Beta(torch.full_like(start, 2.0), 3.0),
    "simplex": lambda start: dist.Dirichlet(torch.full_like(start, 1.7)),
}


@dataclass(eq=False, repr=False)
class Program(RandomModel):
    """A random model with further ways to write it."""

    masks_of_distributions: set[str] = field(default_factory=set)
    entry_masks: dict[str, str] = field(default_factory=dict)

    def __call__(self) -> None:
        self.estimated: Values = {}
        if self.guide:
            for name, (domain, start) in self.parameters.items():
                if domain in PRIORS:
                    prior = PRIORS[domain](start)
                    self.estimated[name] = pyro.sample(name, prior.to_event(len(prior.batch_shape)))
        super().__call__()

    def param(self, name: str) -> Tensor:
        return self.estimated[name] if name in self.estimated else super().param(name)

    def priors(self) -> dict[str, tuple[Tensor, float, bool]]:
        """Value, log density and whether it is estimated; else nothing observed depends on it."""
        store, out = pyro.get_param_store(), {}
        for name, (domain, start) in self.parameters.items():
            if self.guide and domain in PRIORS:
                known = f"AutoDelta.{name}" in store
                value = store[f"AutoDelta.{name}"].detach().clone() if known else start
                out[name] = (value, float(PRIORS[domain](start).log_prob(value).sum()), known)
        return out

    def log_prior(self) -> float:
        """Of the point estimates, in nats."""
        return sum(log_p for _, log_p, known in self.priors().values() if known)

    def log_joint(self, assignments: Values) -> Tensor:
        """log p(x, z, point estimates); latents on which nothing depends integrate to one."""
        priors = self.priors()
        values = {name: value for name, (value, _, _) in priors.items()}
        apart = sum(log_p for _, log_p, known in priors.values() if not known)
        return super().log_joint({**assignments, **values}) - apart

    def sample(self, name: str, plates: str, fn: Any, obs: bool = True) -> Tensor:
        if name not in self.masks_of_distributions:
            return super().sample(name, plates, fn, obs)
        mask = self.get(f"{name} mask")
        with self.inside(plates):
            return pyro.sample(name, fn.mask(mask), obs=self.get(name) if obs else None)

    def entries(self, name: str) -> Tensor:
        """A mask per entry of an event: the plates that its site needs, then the event."""
        plates, x = self.data[self.entry_masks[name]]
        rank = max((-self.dims[p] for p in plates), default=0)
        return x.reshape(x.shape[RANK - rank :])


class ProgramBuilder(Builder):
    """Draws one program from a seed."""

    model: Program
    weighted = 0.2

    def __init__(self, seed: int, with_priors: bool = False) -> None:
        super().__init__(seed)
        self.model = Program(
            self.model.sizes, self.model.dims, guide="map" if with_priors else None
        )
        self.zeros = self.chance(0.4)

    def draw(self, domain: str, shape: tuple[int, ...]) -> Tensor:
        out = super().draw(domain, shape)
        if domain != "simplex" or not self.zeros or self.model.guide:
            return out
        keep = torch.as_tensor(self.rng.random(out.shape) > 0.3)
        out = torch.where(keep | (out == out.amax(-1, keepdim=True)), out, 0.0)
        return out / out.sum(-1, keepdim=True)

    def emission(
        self, name: str, plates: str, parents: dict[str, int]
    ) -> tuple[Callable[[RandomModel, Values], Any], Callable[[], Tensor]]:
        fn, data = super().emission(name, plates, parents)
        entry = f"{name} entries"
        mask = torch.as_tensor(self.rng.random((*self.model.shape(plates), 2)) < 0.7)
        if not self.model.text[-1].startswith(f"{name} ~"):  # after the arguments' lines
            event = next(t for t in reversed(self.model.text) if t.startswith(f"{name} ~"))
            if event.endswith("event (2,)") and self.chance(0.6):
                self.model.entry_masks[name] = entry
                self.model.data[entry] = (plates, mask)
                self.model.text.append(f"  entries {mask.tolist()}")
                return (lambda m, v: _per_entry(fn(m, v), m.entries(name)), data)
        return fn, data

    def add_observed(self, name: str) -> None:
        super().add_observed(name)
        if f"{name} mask" in self.model.data and self.chance(0.5):
            self.model.masks_of_distributions.add(name)
            self.model.text.append("  mask of the distribution")

    def add_second_order(self) -> None:
        """A chain in which each step depends on two before, some steps without data."""
        model, size, length = self.model, 2, self.pick((2, 3, 4))
        plates = self.pick(self.sets[:2])
        model.text.append(f"second order in '{plates}', {length} steps")
        table = self.argument("s.probs", plates, "simplex", (size,), {"s2": size, "s1": size})
        fn, data = self.emission("w", plates, {"s": size})
        gaps = self.rng.random(length) < 0.3
        for t in range(length):
            free = torch.ones(model.shape(plates), dtype=torch.bool)
            self.bits += float(free.sum()) * math.log2(size)
            model.latents[f"hs{t}"] = Latent(plates, size, free, f"hs{t}")
            if gaps[t]:
                continue
            model.data[f"w{t}"] = (plates, data())
            if self.chance(0.4):
                what = self.pick(("known", "mask"))
                if what == "known":
                    model.holes[f"w{t}"] = self.family
                model.data[f"w{t} {what}"] = (plates, self.random_mask(plates))

        def statement(model: RandomModel, values: Values) -> None:
            values["s1"] = values["s2"] = torch.tensor(0)
            for t in pyro.markov(range(length), history=2):
                values["s"] = model.sample(
                    f"hs{t}", plates, dist.Categorical(table(model, values)), obs=False
                )
                if not gaps[t]:
                    model.sample(f"w{t}", plates, fn(model, values))
                values["s2"], values["s1"] = values["s1"], values["s"]

        model.statements.append(statement)

    def add_chains(self) -> None:
        if self.chance(0.35):
            self.add_second_order()
        super().add_chains()


def _per_entry(fn: Any, mask: Tensor) -> Any:
    """The mask between a distribution and its events."""
    return fn.base_dist.mask(mask).to_event(fn.reinterpreted_batch_ndims)


def random_program(seed: int, with_priors: bool = False) -> tuple[Program, RandomModel, Values]:
    """A program that the oracle can sum, its replicated form and the assignments of that."""
    for attempt in range(100):
        builder = ProgramBuilder(seed * 100 + attempt, with_priors)
        model = builder.build()
        long = model.replicated()
        assignments = long.assignments()
        if assignments is None or not model.parameters:
            continue
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        # Pyro's log density of a forbidden value is -36, ours -inf: keep to possible data.
        if not builder.zeros or possible(long.log_joint(assignments)):
            return model, long, assignments
    raise AssertionError("no program within the oracle's reach")


def possible(log_joint: Tensor) -> bool:
    """Whether some assignment meets no zero; each of these costs 36 nats."""
    return float(log_joint.max()) > -30


@hypothesis_settings(max_examples=20)
@given(seed=seeds)
def test_evidence_and_posterior(seed: int) -> None:
    evidence_and_posterior(*random_program(seed))


@hypothesis_settings(max_examples=8)
@given(seed=seeds)
def test_monotone_and_compiled_as_generic(seed: int) -> None:
    monotone_and_compiled_as_generic(random_program(seed)[0])


@hypothesis_settings(max_examples=8)
@given(seed=seeds)
def test_m_step_maximises(seed: int) -> None:
    m_step_maximises(*random_program(seed), seed)


@hypothesis_settings(max_examples=20)
@given(seed=seeds)
def test_draws_modes_and_pairs(seed: int) -> None:
    draws_modes_and_pairs(*random_program(seed), seed)


def draws_modes_and_pairs(
    model: Program, long: RandomModel, assignments: Values, seed: int
) -> None:
    """Joint draws by chi-square, a jointly most probable assignment, joints of all pairs."""
    assume(not model.weighted)
    posterior = model.log_joint(assignments).softmax(0)
    posterior = torch.where(posterior < 1e-12, 0.0, posterior)
    q = ExactPosteriorEM(model).posterior()
    draws, mode = q.sample(DRAWS, seed=seed % 1000), q.mode()
    truth = torch.zeros(len(posterior), dtype=torch.long)
    codes, best = torch.zeros(DRAWS).long(), torch.zeros(()).long()
    for name, z in model.latents.items():
        shape = model.shape(z.plates)
        drawn, at_mode = draws[name].long().reshape(DRAWS, *shape), mode[name].long()
        for cell in z.free.nonzero().tolist():
            codes = codes * z.size + drawn[(slice(None), *cell)]
            best = best * z.size + at_mode.reshape(shape)[tuple(cell)]
            truth = truth * z.size + assignments[z.site].long()[(slice(None), *cell)]
    table = torch.zeros(len(posterior)).index_add(0, truth, posterior)
    agree(codes, table)
    if not model.enumerated_holes:  # they are latents to the library
        assert float(table[best]) == pytest.approx(float(table.max()), rel=1e-9), model
    names = list(model.latents)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            first, second = model.latents[a], model.latents[b]
            if not (
                set(first.plates) <= set(second.plates) or set(second.plates) <= set(first.plates)
            ):
                continue
            plates = max(first.plates, second.plates, key=len)
            joint = q.joint(a, b)
            joint = joint.reshape(*model.shape(plates), first.size, second.size)
            both = (first.free & second.free).expand(model.shape(plates))
            for k in range(first.size):
                for m in range(second.size):
                    met = (assignments[first.site].long() == k) & (
                        assignments[second.site].long() == m
                    )
                    p = torch.einsum("s,s...->...", posterior, met.double())
                    torch.testing.assert_close(
                        joint[..., k, m][both],
                        p.expand(both.shape)[both],
                        rtol=1e-8,
                        atol=1e-9,
                        msg=f"{a} {b} of {model}",
                    )


@pytest.mark.slow
@hypothesis_settings(max_examples=6)
@given(seed=seeds)
def test_priors(seed: int) -> None:
    with_priors(*random_program(seed, with_priors=True))


def with_priors(model: Program, long: RandomModel, assignments: Values) -> None:
    """The evidence at the point, the log prior apart from it, an objective that rises."""
    updates = ExactPosteriorEM(model, guide="map").plan().updates
    pyro.clear_param_store()  # a second guide takes the first one's names
    em = ExactPosteriorEM(model, guide="map", updates=short_gradients(updates))
    previous = -math.inf
    for step in range(3):
        terms = em.elbo()
        log_prior = model.log_prior()
        evidence = float(long.log_joint(assignments).logsumexp(0)) - log_prior
        assert terms.log_evidence == pytest.approx(evidence, rel=1e-8, abs=1e-8), model
        assert terms.log_prior == pytest.approx(log_prior, rel=1e-8, abs=1e-8), model
        objective = evidence + log_prior
        assert terms.value == pytest.approx(objective, rel=1e-8, abs=1e-8), model
        assert objective >= previous - 1e-9 * max(1.0, abs(previous)), model
        previous = objective
        if not updates or step == 2:
            return  # nothing observed depends on a parameter, or two steps have risen
        try:
            em.step()
        except DegenerateError:
            return
        if collapsed(em._session.program.graph.parameters):
            return


@pytest.mark.slow
@hypothesis_settings(max_examples=6)
@given(seed=seeds)
def test_m_step_under_priors_maximises(seed: int) -> None:
    m_step_maximises(*random_program(seed, with_priors=True), seed)
