"""Conformance suites for users' own families and models.

`check_family` judges a closed-form family, `check_model` compares a model with Pyro's own enumeration,
`check_block` judges a block of latents against the joint table.

May import: everything below. To add a suite, copy `families`.
"""

from pyro_em.testing.blocks import check_block
from pyro_em.testing.families import check_family
from pyro_em.testing.models import check_model

__all__ = ["check_block", "check_family", "check_model"]
