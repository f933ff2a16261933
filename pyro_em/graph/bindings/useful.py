"""Which bindings of an argument have an update: others need not be looked for."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_em.families.family import Family


@dataclass(frozen=True)
class Useful:
    """What an argument may be of its parameters, beside a selection, so that an update follows.

    Attributes:
        affine: Affine; its Jacobian is then computed.
        bilinear: Affine in some parameters while others have values.
        logs: With a predictor that is affine in logarithms of parameters.
        product: Matrices A Aᵀ, and sums of these and of selections.
        composite: An elementwise function of several parameters.
        link: What makes the argument of an affine predictor, by its name in ``binding.LINKS``.
        normalised: ``"probs"`` or ``"logits"`` where the distribution normalises the argument's
            rows, else empty.
    """

    affine: bool = False
    bilinear: bool = False
    logs: bool = False
    product: bool = False
    composite: bool = False
    link: str = ""
    normalised: str = ""


SELECTIONS = Useful()


def useful_for(family: Family, argument: str, *, may_meet: bool) -> Useful:
    """The bindings of an argument that have an update.

    Args:
        family: The distribution's record.
        argument: The argument's name.
        may_meet: Whether parameters that meet in an argument may be solved for together.
    """
    rule, dims = family.rules.get(argument), family.argument_dims.get(argument, 0)
    is_regressed, link = _is_regressed(family, argument), family.links.get(argument)
    return Useful(
        affine=may_be_affine(family, argument),
        bilinear=is_regressed or (dims == 0 and link == ""),
        logs=family.predicted is not None,
        product=rule is not None and rule.takes_products,
        composite=may_meet and family.may_meet,
        link=link or "",
        normalised=argument if dims == 1 else "",
    )


def may_be_affine(family: Family, argument: str) -> bool:
    """Whether an argument that is affine in parameters has an update: least squares, or Newton's."""
    return _is_regressed(family, argument) or argument in family.links


def _is_regressed(family: Family, argument: str) -> bool:
    return argument == "loc" and family.name in ("Normal", "LogNormal", "MultivariateNormal")
