"""What is seen of a latent: no parameter reaches it, and nothing of it is summed."""

from __future__ import annotations

from pyro_em.clamped import Clamped, agreement
from pyro_em.families.family import Family

FAMILIES = (
    Family(
        Clamped,
        lambda x, a: {},
        {},
        log_density=lambda x, a: agreement(x, a["held"]),
        plain=("held",),
    ),
)
