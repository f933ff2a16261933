"""The conformance suite of distribution families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.nn.functional import pad

from pyro_em.em import ExactPosteriorEM
from pyro_em.errors import UsageError, message
from pyro_em.families.family import Family, NaturalForm
from pyro_em.families.registry import REGISTRY
from pyro_em.tracing.turns import alone
from pyro_em.updates.update import ClosedForm, NewtonOnSums


@alone("check_family")
def check_family(
    family: Family,
    arguments: Mapping[str, Tensor],
    *,
    num_data: int = 60,
    seed: int = 0,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
) -> None:
    """Test a closed-form family record as users will meet it: in a mixture.

    Each argument that has a rule is made a parameter in turn, the others are held; those of a linear
    form are parameters together. Checked are: the
    density against the distribution's own; the gradient of the expected log joint, which vanishes
    at the solution; statistics, which add over splits of the data (additive records only);
    weights, which equal replication; float32 and float64; a component of zero weight.

    Args:
        family: A registered record.
        arguments: Two or more components' arguments. # (K, *argument event)
        num_data: Number of data drawn from the components.
        seed: Seed of the data and of the responsibilities.
        dtypes: Dtypes to check in.

    Raises:
        AssertionError: With the check and the argument that failed.

    Example:
        >>> from pyro_em.families import family_of
        >>> poisson = family_of(dist.Poisson(1.0))
        >>> check_family(poisson, {"rate": torch.tensor([1.0, 4.0])})
    """
    if REGISTRY.get(family.distribution) is not family:
        raise UsageError(
            message(
                "check_family",
                f"the record of {family.name} is not registered.",
                "the suite fits models, which look it up",
                ["call register_family(family) first"],
            )
        )
    if any(a.dim() == 0 for a in arguments.values()):
        raise UsageError(
            message(
                "check_family",
                "an argument has no leading dimension of components.",
                fixes=["give one value per component: torch.tensor([1.0, 2.0])"],
            )
        )
    for dtype in dtypes:
        typed = {
            n: a.to(dtype) if a.is_floating_point() else a.clone() for n, a in arguments.items()
        }
        case = _FamilyCase(family, typed, num_data, seed, dtype)
        case.check_density()
        if family.additive:
            case.check_additive()
        if family.natural is not None:
            case.check_linear_form()
        natural = () if family.natural is None else family.natural.arguments
        jointly = tuple(name for name in natural if name not in family.rules)
        each = [(name,) for name in family.rules] + [jointly] * bool(jointly)
        for together in each:
            names = tuple(name for name in together if name in typed)
            if names:
                case.check_stationary(names)
                case.check_weights(names)
                case.check_empty_component(names)


class _FamilyCase:
    """One family, one dtype: data drawn from K components and random responsibilities."""

    def __init__(
        self,
        family: Family,
        arguments: Mapping[str, Tensor],
        num_data: int,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self.family, self.arguments, self.dtype = family, dict(arguments), dtype
        self.K = next(iter(arguments.values())).shape[0]
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.labels = torch.randint(self.K, (num_data,), generator=generator)
            rows = {n: self._rows(n, a) for n, a in self.arguments.items()}
            self.x = family.distribution(**rows).sample()
        if self.x.is_floating_point():
            self.x = self.x.to(dtype)
        q = torch.rand(num_data, self.K, generator=generator, dtype=torch.float64) + 0.05
        self.q = q / q.sum(-1, keepdim=True)
        self.where = f"family {family.name}, {str(dtype).removeprefix('torch.')}"
        self.rtol = 2e-3 if dtype == torch.float32 else 1e-7

    def _rows(self, name: str, argument: Tensor) -> Any:
        if name in self.family.constants and bool((argument == argument.reshape(-1)[0]).all()):
            return int(argument.reshape(-1)[0])
        return argument[self.labels]

    def _constraint(self, name: str) -> constraints.Constraint:
        """What the distribution says of an argument; real for a number bounded by another argument."""
        declared = self.family.distribution.arg_constraints  # type: ignore[attr-defined]
        if not isinstance(declared, Mapping):
            found = self.family.distribution(**self.arguments).arg_constraints[name]
            return found if found.event_dim else constraints.real
        return declared[name]

    def check_density(self) -> None:
        """log p as the record computes it, against the distribution's own."""
        rows = {n: a[self.labels] for n, a in self.arguments.items()}
        ours = self.family.log_prob(self.x, rows)
        theirs = self.family.distribution(
            **{n: self._rows(n, a) for n, a in self.arguments.items()}
        ).log_prob(self.x)
        assert torch.allclose(ours.to(theirs.dtype), theirs, rtol=self.rtol, atol=self.rtol), (
            f"{self.where}: log_density differs from the distribution's log_prob by up to "
            f"{float((ours - theirs).abs().max()):.3g}"
        )

    def check_additive(self) -> None:
        """Statistics of the whole are the sum of those of two halves."""
        weights = self.q.to(self.dtype)
        half = len(self.x) // 2
        cells = {n: a.unsqueeze(0) for n, a in self.arguments.items()}
        x = self.x.unsqueeze(1)
        keep = (False, True)
        whole = self.family.expected_statistics(weights, x, cells, keep)
        parts = [
            self.family.expected_statistics(weights[s], x[s], cells, keep)
            for s in (slice(None, half), slice(half, None))
        ]
        for name, value in whole.items():
            first, second = (part[name] for part in parts)
            if self.family.natural is not None and self.family.natural.of_counts:
                # A part whose counts are lower has none above the others.
                first, second = (
                    pad(t, (0, value.shape[-1] - t.shape[-1])) for t in (first, second)
                )
            total = first + second
            assert torch.allclose(value, total, rtol=self.rtol, atol=self.rtol), (
                f"{self.where}: statistic '{name}' does not add over a split of the data"
            )

    def check_linear_form(self) -> None:
        """log p is linear in the statistics; its derivatives are those that autograd finds."""
        form = self.family.natural
        assert form is not None
        if form.is_augmented:
            return self._check_derivatives(form)
        rows = {n: a[self.labels].to(torch.float64) for n, a in self.arguments.items()}
        moved = {n: a.flip(0)[self.labels].to(torch.float64) for n, a in self.arguments.items()}
        if form.is_local:
            moved = {n: 1.1 * a for n, a in rows.items()}
        x = self.x.to(torch.float64)
        statistics = {
            "feature": self.family.statistics(x, rows)["feature"],
            "weight": torch.ones(len(x), dtype=torch.float64),
            **{f"reference:{n}": rows[n] for n in form.references},
        }
        linear = form.expected(statistics, rows) - form.expected(statistics, moved)
        exact = self.family.log_prob(x, rows) - self.family.log_prob(x, moved)
        assert torch.allclose(linear, exact, rtol=1e-7, atol=1e-7), (
            f"{self.where}: log p is not linear in its statistics; off by up to "
            f"{float((linear - exact).abs().max()):.3g}"
        )
        self._check_derivatives(form)

    def _check_derivatives(self, form: NaturalForm) -> None:
        """Those of sums about the arguments, at others."""
        rows = {n: a[self.labels].to(torch.float64) for n, a in self.arguments.items()}
        x = self.x.to(torch.float64)
        statistics = {
            "feature": self.family.statistics(x, rows)["feature"],
            "weight": torch.ones(len(x), dtype=torch.float64),
            **{f"reference:{n}": rows[n] for n in form.references},
        }
        if form.derivatives is None:
            return
        names = [n for n in form.arguments if n in rows]
        leaves = [(1.1 * rows[n]).clone().requires_grad_() for n in names]
        first, second = form.derivatives(statistics, dict(zip(names, leaves, strict=True)))
        value = form.expected(statistics, dict(zip(names, leaves, strict=True))).sum()
        slopes = torch.autograd.grad(value, leaves, create_graph=True)
        flat = torch.cat([g.reshape(len(x), -1) for g in slopes], -1)
        curved = [torch.autograd.grad(c.sum(), leaves, retain_graph=True) for c in flat.unbind(-1)]
        square = [torch.cat([g.reshape(len(x), -1) for g in row], -1) for row in curved]
        for ours, exact in ((first, flat), (second, torch.stack(square, -2))):
            assert torch.allclose(ours, exact, rtol=1e-6, atol=1e-6), (
                f"{self.where}: derivatives differ from autograd by up to "
                f"{float((ours - exact).abs().max()):.3g}"
            )

    def model(self, names: Sequence[str], x: Tensor, weights: Tensor | None = None) -> None:
        """A mixture in which some arguments are parameters and the others are constants."""
        parameters = {}
        for name in names:
            constraint = _of(self._constraint(name))
            start = self.arguments[name].clone()
            parameters[name] = pyro.param(name, start, constraint=constraint)
        scale = 1.0 if weights is None else weights
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=scale):
            prior = torch.ones(self.K, dtype=self.dtype) / self.K
            z = pyro.sample("z", dist.Categorical(prior))
            given: dict[str, Any] = {}
            for n, a in self.arguments.items():
                constant = n in self.family.constants and bool((a == a.reshape(-1)[0]).all())
                given[n] = int(a.reshape(-1)[0]) if constant else a[z]
            given |= {name: parameter[z] for name, parameter in parameters.items()}
            pyro.sample("x", self.family.distribution(**given), obs=x)

    def solution(
        self, names: Sequence[str], x: Tensor, q: Tensor, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The M-step of some arguments together."""
        with pyro.get_param_store().scope():
            em = ExactPosteriorEM(lambda *args: self.model(names, *args))
            args = (x,) if weights is None else (x, weights)
            for name, update in em.plan(*args).updates.items():
                assert isinstance(update.update, ClosedForm | NewtonOnSums), (
                    f"{self.where}: argument '{name}' has a rule but takes "
                    f"{type(update.update).__name__}: {update.reason}"
                )
            em.m_step({"z": q.to(x.device)}, *args)
            return {name: pyro.param(name).detach().clone() for name in names}

    def objective(self, values: Mapping[str, Tensor]) -> Tensor:
        """E_q[log p(x | z)], by the distribution itself or by a density that was checked."""
        components = []
        for k in range(self.K):
            rows: dict[str, Any] = {
                n: self._rows(n, a[k].expand(a.shape)) for n, a in self.arguments.items()
            }
            rows = {n: r if isinstance(r, int) else self.arguments[n][k] for n, r in rows.items()}
            rows |= {name: value[k] for name, value in values.items()}
            if self.family.natural is not None:
                components.append(self.family.log_prob(self.x, rows))
                continue
            components.append(
                self.family.distribution(**rows, validate_args=False).log_prob(self.x)
            )
        return (self.q.to(self.dtype) * torch.stack(components, -1)).sum()

    def check_stationary(self, names: Sequence[str]) -> None:
        """The gradient in unconstrained coordinates is zero, and no neighbour is better."""
        values = self.solution(names, self.x, self.q)
        if self.family.natural is not None and self.family.natural.is_augmented:
            before, after = self.objective(self.arguments), self.objective(values)
            assert float(after) > float(before), f"{self.where}: the M-step raises nothing"
            return
        rule = self.family.rules.get(names[0])
        if rule is not None and rule.kind.form.needs_data:
            best = float(self.objective(values))
            for step in (1e-3, -1e-3):
                moved = {name: value + step for name, value in values.items()}
                assert float(self.objective(moved)) <= best + 1e-6 * abs(best), (
                    f"{self.where}: '{names[0]}' is no maximiser"
                )
            return
        transforms = {name: transform_to(_of(self._constraint(name))) for name in names}

        def slopes(at: Mapping[str, Tensor]) -> list[Tensor]:
            u = {n: transforms[n].inv(at[n]).detach().requires_grad_() for n in names}
            objective = self.objective({n: transforms[n](u[n]) for n in names})
            return list(torch.autograd.grad(objective, list(u.values())))

        for name, gradient, before in zip(
            names, slopes(values), slopes(self.arguments), strict=True
        ):
            size = float(before.abs().max()) + float(len(self.x)) ** 0.5
            assert float(gradient.abs().max()) <= 10 * self.rtol * size, (
                f"{self.where}: the gradient of the expected log joint in '{name}' is "
                f"{float(gradient.abs().max()):.3g} at the solution, not zero"
            )

    def check_weights(self, names: Sequence[str]) -> None:
        """Integer weights give what replicated rows give."""
        counts = torch.arange(len(self.x)) % 3 + 1
        repeated = self.x.repeat_interleave(counts, 0)
        q = self.q.repeat_interleave(counts, 0)
        long = self.solution(names, repeated, q)
        short = self.solution(names, self.x, self.q, counts.to(self.dtype))
        for name in names:
            assert torch.allclose(long[name], short[name], rtol=self.rtol, atol=self.rtol), (
                f"{self.where}: weighted rows give another '{name}' than replicated rows"
            )

    def check_empty_component(self, names: Sequence[str]) -> None:
        """A component without mass keeps its values and leaves the others right."""
        q = self.q.clone()
        q[:, -1] = 0
        q = q / q.sum(-1, keepdim=True)
        for name, value in self.solution(names, self.x, q).items():
            assert bool(torch.isfinite(value).all()), (
                f"{self.where}: a component of zero weight makes '{name}' non-finite"
            )
            before = self.arguments[name][-1]
            assert torch.allclose(value[-1], before, rtol=self.rtol, atol=self.rtol), (
                f"{self.where}: a component of zero weight does not keep its '{name}'"
            )


def _of(constraint: constraints.Constraint) -> constraints.Constraint:
    """A constraint that has a transform: ``nonnegative`` is reached through ``positive``."""
    return constraints.positive if constraint is constraints.nonnegative else constraint
