"""Distribution families with closed-form updates, looked up by exact type.

A density is inherited by subclasses, a maximum-likelihood rule is not. The record is `family.Family`;
the functional forms that its rules can have are in `forms` (what each answers: `form`), the table of
all records in `registry`. `conjugacy` has the conjugate priors of parameters, `conjugate_kernels` and
`conjugate_pairs` those of latents with their children, `predicted` and `predictor_forms` the densities
of linear predictors, `short_rows` softmax of many rows.

May import: `pyro_em.errors`, `pyro_em.distributions`. To add a family, copy a neighbour in `discrete`,
`rates`, `normal` or `wishart`, add it to that file's ``FAMILIES`` and let
`pyro_em.testing.check_family` judge it; or call `register_family`.
"""

from pyro_em.families.family import Family, Link, Rule
from pyro_em.families.forms import Kind
from pyro_em.families.registry import family_of, register_family

__all__ = ["Family", "Kind", "Link", "Rule", "family_of", "register_family"]
