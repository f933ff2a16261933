"""The updates that a parameter can have, and what was decided for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.arguments import number, shown, whole
from pyro_em.errors import UsageError, message
from pyro_em.families.family import CHOLESKY, IDENTITY, PRECISION, Rule
from pyro_em.families.forms import Kind
from pyro_em.graph.bindings.binding import Selection
from pyro_em.graph.factors import FactorGraph


@dataclass(frozen=True)
class ClosedForm:
    """The exact maximiser given all other parameters.

    Attributes:
        floor: The smallest variance (for a covariance: the smallest eigenvalue); 0 for none. A
            variance below it is set to it, nothing is ever added.
        step_size: For batches only: the weight of the newest batch in the running average of
            expected statistics; (t + 1)^−0.6 at step t where None (Cappé and Moulines 2009).

    Example:
        >>> ClosedForm(floor=1e-3)
        ClosedForm(floor=0.001, step_size=None)
    """

    floor: float = 0.0
    step_size: float | None = None

    def __post_init__(self) -> None:
        if not number("ClosedForm", "floor", self.floor) >= 0:
            raise UsageError(message("ClosedForm", f"floor={self.floor} is no variance."))
        size = self.step_size
        if size is not None and not 0 < number("ClosedForm", "step_size", size) <= 1:
            raise UsageError(
                message(
                    "ClosedForm",
                    f"step_size={self.step_size} is no weight in (0, 1].",
                    fixes=["pass 0.1, or None for one that falls with the steps"],
                )
            )


@dataclass(frozen=True)
class LeastSquares:
    """Weighted least squares, jointly for all parameters of one affine ``loc``."""


@dataclass(frozen=True)
class Newton:
    """Newton's method with the exact Hessian, jointly for all parameters of one linear predictor.

    Of Bernoulli, Binomial and Categorical logits, of logarithms of rates: iteratively reweighted least
    squares, to the maximum of the expected log joint.
    """


@dataclass(frozen=True)
class NewtonOnSums:
    """Newton's method for all parameters of a density together, on sums over the data."""


@dataclass(frozen=True)
class NewtonOnProfile:
    """Newton's method for degrees of freedom on sums, with scale matrices at their maximisers."""


@dataclass(frozen=True)
class Gradient:
    """A gradient step on the expected log joint in the unconstrained space.

    Attributes:
        optimizer: A callable from a list of tensors to a torch optimiser, one of ``pyro.optim``,
            or None for L-BFGS with a line search to convergence, under which the objective cannot
            fall.
        steps: Steps of the optimiser per M-step, or iterations of L-BFGS at most.

    Example:
        >>> Gradient(lambda p: torch.optim.Adam(p, lr=0.01), steps=5).steps
        5
    """

    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None
    steps: int = 100

    def __post_init__(self) -> None:
        if self.optimizer is not None and not callable(self.optimizer):
            raise UsageError(
                message(
                    "Gradient",
                    f"optimizer={shown(self.optimizer)} makes no optimiser.",
                    "it is called with a list of tensors",
                    ["pass lambda params: torch.optim.Adam(params, lr=0.01)", "None for L-BFGS"],
                )
            )
        if whole("Gradient", "steps", self.steps, None) < 1:
            raise UsageError(message("Gradient", f"steps={self.steps} would change nothing."))


@dataclass(frozen=True)
class Fixed:
    """The parameter is never changed."""


@dataclass(frozen=True)
class NoUpdate:
    """No M-step: a latent of the model has no route. It occurs in plans; nobody asks for it."""


Update = ClosedForm | LeastSquares | Newton | NewtonOnSums | NewtonOnProfile | Gradient | Fixed

EXACT = (
    ClosedForm,
    LeastSquares,
    Newton,
    NewtonOnSums,
    NewtonOnProfile,
)  # these go to a maximum, from sums over the data


@dataclass(frozen=True, eq=False)
class Use:
    """One place where a parameter is used: an argument of a group of factors.

    Attributes:
        group: The number of the group.
        argument: The argument's name.
        selection: Which of the parameter's elements are where in the argument.
        rule: The family's rule for the argument.
        is_multiple: Whether a number of the parameter multiplies a whole known matrix.
    """

    group: int
    argument: str
    selection: Selection
    rule: Rule
    is_multiple: bool = False

    @cached_property
    def natural(self) -> Selection:
        """The same of natural values: with what multiplies these, and one number for a multiple."""
        s = self.selection
        if self.is_multiple:
            return replace(s, index=s.index.amax((-2, -1)), factor=None)
        if s.factor is None or not self.rule.kind.event_dim:
            return s
        return replace(s, factor=natural_factor(s.factor, self.rule))

    def at(self, value: Tensor) -> Selection:
        """The natural selection at a value of the parameter, of which a multiple takes its unit."""
        found = self.natural
        return replace(found, factor=1 / found.forward(value)) if self.is_multiple else found


def natural_factor(factor: Tensor, rule: Rule) -> Tensor | None:
    """By what a natural value is multiplied where its argument is multiplied by a known factor.

    None where a matrix is not multiplied as a whole.
    """
    if rule.kind.event_dim:
        first = factor[..., :1, :1].expand(factor.shape)
        if not torch.allclose(factor, first, rtol=1e-9, atol=0.0):
            return None
        factor = first
    powers = {IDENTITY.name: 1, CHOLESKY.name: 2, PRECISION.name: -1}
    power = powers.get(rule.link.name)
    return None if power is None else factor**power


@dataclass(frozen=True, eq=False)
class Prior:
    """A prior that says something of a parameter: the group of a point-estimated site.

    Attributes:
        group: The number of that group.
        selection: Which of the parameter's elements are where in the site's value, or in an argument;
            its factor is that of the natural value.
        argument: Where the site's spread is that of the data times a known factor (a Normal prior on a
            mean, of a Normal–inverse-gamma or a Normal–Wishart): the name of that argument. Empty
            where the parameter is the site's value.
        is_constant: Whether no argument of the prior depends on parameters.
    """

    group: int
    selection: Selection
    argument: str = ""
    is_constant: bool = True


@dataclass(frozen=True, eq=False)
class ParameterUpdate:
    """What was decided for one parameter, and why.

    Attributes:
        name: The parameter.
        update: The update.
        reason: Why, in words.
        uses: The places of a closed form.
        block: Parameters solved for together (least squares, Newton's method).
        priors: Conjugate priors that a closed form takes in.
        is_mixed: Whether sites of different kinds read it, so that no update of one kind serves.
        is_met_end: Whether both ends of a support are made of it and another parameter.
    """

    name: str
    update: Update | NoUpdate
    reason: str
    uses: tuple[Use, ...] = ()
    block: tuple[str, ...] = ()
    priors: tuple[Prior, ...] = ()
    is_mixed: bool = False
    is_met_end: bool = False

    @cached_property
    def kind(self) -> Kind | None:
        """The functional form of a closed-form update."""
        return self.uses[0].rule.kind if self.uses else None

    @cached_property
    def needs_data(self) -> bool:
        """Whether its maximiser needs the data themselves, not only sums over them."""
        return self.is_met_end or (self.kind is not None and self.kind.form.needs_data)

    @cached_property
    def is_end(self) -> bool:
        """Whether a support ends at it: it is found from the outermost data."""
        return self.is_met_end or (self.kind is not None and self.kind.form.end != 0)

    @cached_property
    def is_row(self) -> bool:
        """Whether it is solved for by rows of probabilities, which may well go without data."""
        return self.kind is not None and self.kind.form.is_row


def at_other_rows(
    updates: Mapping[str, ParameterUpdate], graph: FactorGraph
) -> dict[str, ParameterUpdate]:
    """Updates decided on some rows, for others of the same form: which elements a row reads may differ.

    Args:
        updates: What was decided.
        graph: The graph of the other rows, as an M-step sees it.
    """

    def moved(use: Use) -> Use:
        selections = graph.groups[use.group].bindings[use.argument].selections
        own = next(s for s in selections if s.param == use.selection.param)
        return replace(use, selection=own)

    return {n: replace(u, uses=tuple(map(moved, u.uses))) for n, u in updates.items()}
