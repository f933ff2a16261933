"""What models can be chosen by."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_em.errors import UsageError, message


@dataclass(frozen=True)
class Criterion:
    """A number of a row by which models are chosen.

    Attributes:
        column: The name of the row's number.
        words: What it is, for a figure's axis.
        sign: 1 where larger is better, −1 where smaller is.
    """

    column: str
    words: str
    sign: int


CRITERIA = {
    c.column: c
    for c in (
        Criterion("bic", "BIC (lower is better)", -1),
        Criterion("aic", "AIC (lower is better)", -1),
        Criterion("icl", "ICL (lower is better)", -1),
        Criterion("held_out", "log evidence of rows held out (nats)", 1),
        Criterion("log_evidence", "log evidence (nats)", 1),
        Criterion("elbo", "ELBO (nats)", 1),
    )
}


def criterion_of(name: object) -> Criterion:
    """The criterion of a name.

    Raises:
        UsageError: If there is none.

    Example:
        >>> criterion_of("bic").sign
        -1
    """
    found = CRITERIA.get(name) if isinstance(name, str) else None
    if found is None:
        raise UsageError(
            message(
                "select",
                f"criterion={name!r} is no criterion.",
                "",
                ["use one of " + ", ".join(f"'{n}'" for n in CRITERIA)],
            )
        )
    return found
