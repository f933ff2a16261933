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

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_em.analysis.elbo import ELBOTerms
    from pyro_em.analysis.evidence import EvidenceEstimate
    from pyro_em.analysis.forecast import Forecast
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
    from pyro_em.fitting.batches.online_sums import StepSize
    from pyro_em.fitting.results.history import EMStatus, EMStep, History
    from pyro_em.fitting.results.result import EMResult
    from pyro_em.fitting.results.standard_errors import StandardErrors
    from pyro_em.loss import TraceExact_ELBO
    from pyro_em.plan.plan import Plan
    from pyro_em.posteriors.answers.posterior import Posterior
    from pyro_em.posteriors.strategies import Annealed, Hard, MonteCarlo
    from pyro_em.resampling.bootstrap import Bootstrap
    from pyro_em.selection.ratio import Ratio
    from pyro_em.selection.select import select
    from pyro_em.selection.selection import Selection
    from pyro_em.sources.chunks import Chunks
    from pyro_em.tracing.vectorized import vectorized_markov
    from pyro_em.updates.update import ClosedForm, Fixed, Gradient, LeastSquares, Newton
    from pyro_em.variational.amortized import AutoAmortizedCategorical, AutoAmortizedNormal
    from pyro_em.variational.drawn import DrawnPosterior
    from pyro_em.variational.trainer import Alternating

__version__ = version("pyro-em")

__all__ = [
    "Alternating",
    "Annealed",
    "AutoAmortizedCategorical",
    "AutoAmortizedNormal",
    "Bootstrap",
    "Chunks",
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
    "Forecast",
    "Gradient",
    "Hard",
    "History",
    "Kind",
    "LeastSquares",
    "Link",
    "ModelError",
    "MonteCarlo",
    "Newton",
    "Plan",
    "Posterior",
    "PyroEMError",
    "PyroEMWarning",
    "Ratio",
    "Rule",
    "Selection",
    "StandardErrors",
    "StepSize",
    "TraceExact_ELBO",
    "UsageError",
    "compare",
    "log_partition",
    "register_family",
    "select",
    "standard_contenders",
    "vectorized_markov",
]

# Each module is imported when its first name is asked for.
_HOMES = {
    "Alternating": "pyro_em.variational.trainer",
    "Annealed": "pyro_em.posteriors.strategies",
    "AutoAmortizedCategorical": "pyro_em.variational.amortized",
    "AutoAmortizedNormal": "pyro_em.variational.amortized",
    "Bootstrap": "pyro_em.resampling.bootstrap",
    "Chunks": "pyro_em.sources.chunks",
    "ClosedForm": "pyro_em.updates.update",
    "Comparison": "pyro_em.comparison.table",
    "DataError": "pyro_em.errors",
    "DegenerateError": "pyro_em.errors",
    "Direct": "pyro_em.comparison.contenders",
    "DrawnPosterior": "pyro_em.variational.drawn",
    "ELBOTerms": "pyro_em.analysis.elbo",
    "EMResult": "pyro_em.fitting.results.result",
    "EMStatus": "pyro_em.fitting.results.history",
    "EMStep": "pyro_em.fitting.results.history",
    "EvidenceEstimate": "pyro_em.analysis.evidence",
    "ExactPosteriorEM": "pyro_em.em",
    "Family": "pyro_em.families.family",
    "FileError": "pyro_em.errors",
    "Fixed": "pyro_em.updates.update",
    "Forecast": "pyro_em.analysis.forecast",
    "Gradient": "pyro_em.updates.update",
    "Hard": "pyro_em.posteriors.strategies",
    "History": "pyro_em.fitting.results.history",
    "Kind": "pyro_em.families.forms",
    "LeastSquares": "pyro_em.updates.update",
    "Newton": "pyro_em.updates.update",
    "Link": "pyro_em.families.family",
    "ModelError": "pyro_em.errors",
    "MonteCarlo": "pyro_em.posteriors.strategies",
    "Plan": "pyro_em.plan.plan",
    "Posterior": "pyro_em.posteriors.answers.posterior",
    "PyroEMError": "pyro_em.errors",
    "PyroEMWarning": "pyro_em.errors",
    "Ratio": "pyro_em.selection.ratio",
    "Rule": "pyro_em.families.family",
    "Selection": "pyro_em.selection.selection",
    "StandardErrors": "pyro_em.fitting.results.standard_errors",
    "StepSize": "pyro_em.fitting.batches.online_sums",
    "TraceExact_ELBO": "pyro_em.loss",
    "UsageError": "pyro_em.errors",
    "compare": "pyro_em.comparison.compare",
    "log_partition": "pyro_em.analysis.partition",
    "register_family": "pyro_em.families.registry",
    "select": "pyro_em.selection.select",
    "standard_contenders": "pyro_em.comparison.contenders",
    "vectorized_markov": "pyro_em.tracing.vectorized",
}


def __getattr__(name: str) -> Any:
    """A public name from its module, or one of the package's modules."""
    home = _HOMES.get(name)
    if home is not None:
        value = getattr(import_module(home), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
