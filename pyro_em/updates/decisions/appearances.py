"""Where a parameter stands in the densities of a graph, and what each place asks of its update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pyro_em.distributions import is_real
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role
from pyro_em.updates.decisions.read_priors import as_prior, as_spread_of_prior
from pyro_em.updates.decisions.read_uses import as_use, is_end
from pyro_em.updates.regressions.dispersed import dispersed_at
from pyro_em.updates.regressions.predictors import predictor_binding
from pyro_em.updates.update import Prior, Use


@dataclass
class Appearances:
    """The places of one parameter, taken in factor by factor.

    Attributes:
        graph: The factor graph.
        name: The parameter.
        together: Whether arguments in which several parameters meet may be solved for with all others
            of their density.
        uses: Places of closed forms.
        beside: Such places in densities that are solved for as a whole, each with its words.
        priors: What priors say of it.
        predicted: Predictors of which it is a coefficient, in words.
        joint: Arguments that it is an element of, in densities that are solved for as a whole.
        meeting: Arguments there that are functions of it and of others.
        degrees: Degrees of freedom that it is.
        is_affine: Whether it is a coefficient of a mean.
        is_curved: Whether it is a coefficient of a predictor.
        is_used: Whether any factor depends on it.
        weakest: Why nothing is left but gradients; the first reason that was found.
    """

    graph: FactorGraph
    name: str
    together: bool
    uses: list[Use] = field(default_factory=list)
    beside: list[tuple[str, Use]] = field(default_factory=list)
    priors: list[Prior] = field(default_factory=list)
    predicted: list[str] = field(default_factory=list)
    joint: list[str] = field(default_factory=list)
    meeting: list[str] = field(default_factory=list)
    degrees: list[str] = field(default_factory=list)
    is_affine: bool = False
    is_curved: bool = False
    is_used: bool = False
    weakest: str = ""

    @classmethod
    def of(cls, graph: FactorGraph, names: Sequence[str], together: bool) -> dict[str, Appearances]:
        """Those of some parameters in a graph, by name.

        Args:
            graph: The graph.
            names: The parameters.
            together: See there.
        """
        found = {name: cls(graph, name, together) for name in names}
        for g, group in enumerate(graph.groups):
            for own in found.values():
                own._take_group(g, group)
        return found

    @property
    def has_others(self) -> bool:
        """Whether it stands where nothing is solved for as a whole, or has a prior."""
        return bool(self.uses or self.is_affine or self.is_curved or self.priors)

    def _weaken(self, reason: str) -> None:
        self.weakest = self.weakest or reason

    def _take_group(self, g: int, group: Group) -> None:
        name, graph = self.name, self.graph
        if name in group.edges and not is_end(graph, g, name):
            self._weaken(
                f"the support of {group.distribution} at '{group.members[0]}' ends at it: the maximum "
                "is a jump, which no gradient sees"
            )
        is_value = group.raw_params is None or name in group.raw_params
        self.is_used = self.is_used or is_value
        if group.family is None:
            if is_value:
                self._weaken(f"{group.distribution} at '{group.members[0]}' has no record")
            return
        if is_value:
            prior = as_prior(graph, g, name)
            if prior is None:
                self._weaken(f"the value of '{group.members[0]}' depends on it")
            else:
                self.priors.append(prior)
        is_predicted = group.family.predicted is not None
        dispersed = dispersed_at(g, group, graph.parameters) if is_predicted else None
        if dispersed is not None and name in dispersed.params:
            self.is_curved = self.is_used = True
            self.predicted += dispersed.places(name)
            return
        for argument, binding in group.bindings.items():
            if name in binding.params:
                self.is_used = True
                self._take_argument(g, group, argument, binding)

    def _take_argument(self, g: int, group: Group, argument: str, binding: Binding) -> None:
        assert group.family is not None
        graph, name, family = self.graph, self.name, group.family
        place = f"{group.distribution}.{argument}"
        where = f"{place} at '{group.members[0]}'"
        constraint = graph.parameters[name].constraint
        if group.role is Role.POINT:
            prior = as_spread_of_prior(graph, g, argument, name)
            if prior is None:
                self._weaken(f"it is a hyperparameter of '{group.members[0]}'")
            else:
                self.priors.append(prior)
        elif binding.how in ("opaque", "computed"):
            self._weaken(f"{binding.reason} in {where}")
        elif self.together and is_joint(group):
            self._take_jointly(g, group, argument, binding)
        elif binding.how == "composite":
            self._weaken(f"a function of it is {where}, whose sums do not tell it")
        elif binding.how == "sum":
            self._weaken(f"{where} is a sum of it and others")
        elif _is_predicted(graph, g, argument, name):
            self.is_curved = True
            self.predicted.append(place)
            if not is_real(constraint):
                self._weaken(f"its constraint {constraint} bounds {where}")
        elif _is_one_climb(graph, group):
            self._weaken(f"no closed form is known for it in {where}")
        elif family.natural is not None and argument not in family.rules:
            self.joint.append(place)
            if binding.how != "selection":
                self._weaken(f"{where} is {binding.how} in it")
        elif argument == family.degrees:
            self.degrees.append(place)
            self._weaken(_why_not_plain(binding, name, where))
        elif _is_regressed(graph, g, argument, binding, name):
            self.is_affine = True
            if not is_real(constraint):
                self._weaken(f"its constraint {constraint} bounds {where}")
        else:
            use, problem = as_use(graph, g, argument, binding, name)
            if use is None:
                self._weaken(f"{problem} in {where}")
            else:
                self.uses.append(use)

    def _take_jointly(self, g: int, group: Group, argument: str, binding: Binding) -> None:
        """An argument of a density whose sums tell all arguments together."""
        assert group.family is not None
        place, form = f"{group.distribution}.{argument}", group.family.joint_form
        if form is not None and _is_one_climb(self.graph, group):
            self._weaken(f"no closed form is known for it in {place} at '{group.members[0]}'")
        use = None
        if binding.how == "selection" and argument in group.family.rules:
            use = as_use(self.graph, g, argument, binding, self.name)[0]
        if use is not None:
            self.beside.append((place, use))
        elif binding.how == "composite":
            self.meeting.append(place)
        else:
            self.joint.append(place)


def is_joint(group: Group) -> bool:
    """Whether parameters meet in an argument of a density whose sums tell all arguments together."""
    if group.family is None or group.family.joint_form is None or group.lines:
        return False
    hows = {b.how for b in group.bindings.values()}
    apart = [a for a in group.bindings if a not in group.family.joint_form.arguments]
    if any(group.bindings[a].how == "composite" for a in apart):
        return False
    return "composite" in hows and hows <= {"constant", "selection", "composite"}


def _why_not_plain(binding: Binding, name: str, where: str) -> str:
    """Why an argument is no selection of a parameter as it stands, or nothing."""
    if binding.how != "selection":
        return f"{where} is {binding.how} in it"
    selection = next(s for s in binding.selections if s.param == name)
    return f"{where} is a function of it" if selection.maps or selection.factor is not None else ""


def _is_one_climb(graph: FactorGraph, group: Group) -> bool:
    """Whether one climb finds the maximum of a group whose own E-step takes more in than latents.

    It reads none: of a mixture's components the M-step raises the evidence just so.
    """
    form = None if group.family is None else group.family.natural
    if form is None or not form.is_augmented:
        return False
    return not any(d in graph.latents for dims in group.dims for d in dims)


def _is_predicted(graph: FactorGraph, g: int, argument: str, name: str) -> bool:
    """Whether a parameter is a coefficient of a linear predictor that Newton's method solves for.

    A selection has a closed form, unless a factor multiplies what stands in the predictor.
    """
    group = graph.groups[g]
    if predictor_binding(group, argument, graph.parameters) is None:
        return False
    binding = group.bindings[argument]
    assert group.family is not None
    if group.family.natural is not None:
        return binding.how == "affine"
    is_line = binding.how in ("affine", "bilinear")
    return is_line or as_use(graph, g, argument, binding, name)[0] is None


def _is_regressed(graph: FactorGraph, g: int, argument: str, binding: Binding, name: str) -> bool:
    """Whether a parameter is a coefficient in an argument, for least squares.

    A selection is linear where no map changes its parameters. It is solved for as a coefficient where
    it is one part of a mean among others, or no closed form fits its elements.
    """
    group = graph.groups[g]
    if binding.how in ("affine", "bilinear"):
        return True
    if any(s.maps for s in binding.selections):
        return False
    rule = None if group.family is None else group.family.rules.get(argument)
    is_vector = rule is not None and rule.kind.event_dim == 1 and rule.kind.form.is_regressed
    return argument in group.lines or (
        is_vector and as_use(graph, g, argument, binding, name)[0] is None
    )
