"""Estimators in scikit-learn's manner: any Pyro model, Gaussian mixtures, hidden Markov models.

`latent_model` has `LatentModel`, `estimator` what all estimators share, `gaussian_mixture` and
`hidden_markov` are short models on it. `inputs` turns rows into tensors and back, `kept_store` keeps
each estimator's parameters apart from the user's, `latents` says which latent is asked for, `chains`
answers for series at hand, `starts` draws scikit-learn's starts, `gaussians` has the four structures
of covariances, `emissions` the table of what states emit.

May import: everything below, and scikit-learn, which nothing else of the library needs. To add an
emission, add a class to `emissions` and an entry to the table at its end.
"""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "pyro_em.sklearn needs scikit-learn 1.6 or newer: pip install 'pyro-em[sklearn]'"
    ) from error

from pyro_em.sklearn.gaussian_mixture import GaussianMixture
from pyro_em.sklearn.hidden_markov import HMM
from pyro_em.sklearn.latent_model import LatentModel

__all__ = ["HMM", "GaussianMixture", "LatentModel"]
