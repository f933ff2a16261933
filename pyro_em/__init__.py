"""Exact expectation-maximisation for latent variable models written in Pyro.

A user writes an ordinary Pyro model and hands it to `ExactPosteriorEM`. The library finds which
latents have an exact posterior and which parameters have a closed-form update, and does that.

Glossary, used throughout:

* N data, K states or components, D features, T time steps;
* x observed, z latent, θ parameters, q(z) any distribution over the latents;
* log evidence: log p(x; θ), the log-likelihood of the observed data, in nats;
* ELBO: E_q[log p(x, z; θ)] + H(q), never above the log evidence;
* E-step: q ← p(z | x; θ); M-step: θ ← argmax of the expected log joint E_q[log p(x, z; θ)];
* responsibilities: the posterior marginals q(z_n = k) of a mixture;
* sufficient statistics: T(x), what a family's density needs to know of x;
* site, plate, guide, param: as in Pyro.
"""

from importlib.metadata import version

from pyro_em.analysis.elbo import ELBOTerms
from pyro_em.analysis.evidence import EvidenceEstimate
from pyro_em.analysis.partition import log_partition
from pyro_em.comparison.compare import compare
from pyro_em.comparison.contenders import Direct, standard_contenders
from pyro_em.comparison.table import Comparison
from pyro_em.em import ExactPosteriorEM
from pyro_em.errors import (
    DataError,
    DegenerateError,
    FileError,
    ModelError,
    PyroEMError,
    PyroEMWarning,
    UsageError,
)
from pyro_em.families.family import Family, Link, Rule
from pyro_em.families.forms import Kind
from pyro_em.families.registry import register_family
from pyro_em.fitting.result import EMResult, EMStatus, EMStep, History
from pyro_em.fitting.standard_errors import StandardErrors
from pyro_em.loss import TraceExact_ELBO
from pyro_em.plan.plan import Plan
from pyro_em.posteriors.posterior import Posterior
from pyro_em.posteriors.strategies import Annealed, Hard, MonteCarlo
from pyro_em.tracing.vectorized import vectorized_markov
from pyro_em.updates.update import ClosedForm, Fixed, Gradient, LeastSquares
from pyro_em.variational.amortized import AutoAmortizedCategorical, AutoAmortizedNormal
from pyro_em.variational.drawn import DrawnPosterior
from pyro_em.variational.trainer import Alternating

__version__ = version("pyro-em")

__all__ = [
    "Alternating",
    "Annealed",
    "AutoAmortizedCategorical",
    "AutoAmortizedNormal",
    "ClosedForm",
    "Comparison",
    "DataError",
    "DegenerateError",
    "Direct",
    "DrawnPosterior",
    "ELBOTerms",
    "EMResult",
    "EMStatus",
    "EMStep",
    "EvidenceEstimate",
    "ExactPosteriorEM",
    "Family",
    "FileError",
    "Fixed",
    "Gradient",
    "Hard",
    "History",
    "Kind",
    "LeastSquares",
    "Link",
    "ModelError",
    "MonteCarlo",
    "Plan",
    "Posterior",
    "PyroEMError",
    "PyroEMWarning",
    "Rule",
    "StandardErrors",
    "TraceExact_ELBO",
    "UsageError",
    "compare",
    "log_partition",
    "register_family",
    "standard_contenders",
    "vectorized_markov",
]
