"""`LatentModel`: any Pyro model of rows as a scikit-learn estimator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from pyro_em.arguments import whole
from pyro_em.em import ExactPosteriorEM
from pyro_em.errors import UsageError, message
from pyro_em.fitting.results.result import EMResult
from pyro_em.sklearn.estimator import EMEstimator
from pyro_em.sklearn.inputs import as_dict
from pyro_em.sklearn.latents import Latents


class LatentModel(EMEstimator):
    """A Pyro model with latents as a scikit-learn estimator.

    The model takes the rows as a tensor # (N, D), of the precision of X: ``model(x, **keywords)``. It
    is read and fitted as `ExactPosteriorEM` does it; ``print(estimator.result_.plan)`` says how.

    Args:
        model: A Pyro model of rows. A ``PyroModule`` is copied before it is fitted; networks that a
            function holds on to (``pyro.module``) are trained where they are.
        guide: As in `ExactPosteriorEM`: None, ``"map"``, a guide, an autoguide class.
        optim: As there, for guides that draw.
        latent: The site that ``predict``, ``predict_proba`` and ``transform`` are about, ``"z_*"`` for
            a chain; by default the only discrete one that the rows have, else the only one.
        keywords: The model's keyword arguments. They are parameters of the estimator, too:
            ``GridSearchCV(LatentModel(mixture), {"keywords__K": [1, 2, 3]})``.
        init: Where the first start begins: None (the values in the model), ``"kmeans"``, ``"random
            points"``, ``"random"``; see `ExactPosteriorEM.fit`.
        n_init: Number of starts; the best is kept (``num_restarts`` of `ExactPosteriorEM.fit`).
        tol: Estimated remaining gain of the log evidence of all rows, in nats, at which to stop.
        max_iter: Steps at most; of a stochastic fit without ``num_epochs`` the number of steps.
        missing: ``"nan"``: NaN in X is missing at random and integrated out.
        random_state: An int, a ``RandomState``, or None for numpy's global one, as in scikit-learn.
        warm_start: Whether a second ``fit`` begins at the parameters of the first.
        fit_options: More keywords of `ExactPosteriorEM.fit`: ``batch_size``, ``acceleration``, ….

    Attributes:
        n_features_in_: Columns of X.
        feature_names_in_: Their names, where X was a DataFrame.

    Example:
        >>> import numpy as np, pyro, pyro.distributions as dist
        >>> from torch.distributions import constraints
        >>> def coins(x, K=2):
        ...     p = pyro.param("p", torch.linspace(0.3, 0.6, K), constraint=constraints.unit_interval)
        ...     with pyro.plate("rows", len(x)):
        ...         coin = pyro.sample("coin", dist.Categorical(torch.ones(K)))
        ...         pyro.sample("heads", dist.Binomial(10, p[coin]), obs=x[:, 0])
        >>> X = np.array([[5], [9], [8], [4], [7]])
        >>> estimator = LatentModel(coins, tol=1e-9).fit(X)
        >>> estimator.params_["p"].round(3), estimator.predict(X)
        (array([0.52 , 0.797]), array([0, 1, 1, 0, 1]))
        >>> round(float(estimator.score(X)), 4)
        -1.9594
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Any = None,
        *,
        optim: Any = None,
        latent: str | None = None,
        keywords: Mapping[str, Any] | None = None,
        init: Any = None,
        n_init: int = 1,
        tol: float = 1e-3,
        max_iter: int = 1000,
        missing: str | None = None,
        random_state: Any = None,
        warm_start: bool = False,
        fit_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.guide = guide
        self.optim = optim
        self.latent = latent
        self.keywords = keywords
        self.init = init
        self.n_init = n_init
        self.tol = tol
        self.max_iter = max_iter
        self.missing = missing
        self.random_state = random_state
        self.warm_start = warm_start
        self.fit_options = fit_options

    # ------------------------------------------------------------------ parameters

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name; the model's keywords as ``keywords__K`` beside them."""
        params = super().get_params(deep)
        given = params.get("keywords")
        if deep and isinstance(given, Mapping):
            params |= {f"keywords__{name}": value for name, value in given.items()}
        return params

    def set_params(self, **params: Any) -> Self:
        """Set parameters by name; ``keywords__K=3`` sets one keyword of the model."""
        own = {n: params.pop(n) for n in [*params] if n.startswith("keywords__")}
        super().set_params(**params)
        if own:
            new = {name.removeprefix("keywords__"): value for name, value in own.items()}
            self.keywords = {**(self.keywords or {}), **new}
        return self

    # ------------------------------------------------------------------ fitting

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit the model to rows.

        Args:
            X: The rows, as an array or a DataFrame. # (N, D)
            y: Nothing, as in all of scikit-learn's mixtures.

        Returns:
            The estimator.

        Raises:
            ValueError: If X has another shape, is not finite, or does not suit the model.
        """
        return self._fit(X, lambda rows: (rows,))

    def _starts(self, rows: Tensor, rng: Any) -> Iterator[ExactPosteriorEM]:
        is_module = isinstance(self.model, torch.nn.Module)
        model = copy.deepcopy(self.model) if is_module else self.model
        yield ExactPosteriorEM(model, self.guide, self.optim, missing=self.missing)

    def _run(self, em: ExactPosteriorEM, arguments: tuple, seed: int, goes_on: bool) -> EMResult:
        own = {
            "init": None if goes_on else self.init,
            "num_restarts": 1 if goes_on else self.n_init,
            "tol": self.tol,
            "max_steps": self.max_iter,
            "seed": seed,
        }
        options = as_dict("fit_options", self.fit_options, "acceleration='auto'")
        for name in own:
            if name in options or name in self._model_keywords():
                raise UsageError(
                    message(
                        "LatentModel",
                        f"'{name}' is given twice.",
                        "init, n_init, tol, max_iter and random_state of the estimator say it",
                        ["leave it out of fit_options", "give the model's keyword another name"],
                    )
                )
        return em.fit(*arguments, **{"progress": False, **own, **options, **self._model_keywords()})

    def _model_keywords(self) -> dict[str, Any]:
        return as_dict("keywords", self.keywords, "K=3")

    def _note_fit(self, result: EMResult) -> None:
        self._latents = Latents.of(result.plan, self.latent)

    @property
    def _n_features_out(self) -> int:
        return self._features(self._example).shape[1]

    def _what_is_finite(self) -> bool | str:
        return True if self.missing is None else "allow-nan"

    # ------------------------------------------------------------------ asking

    def predict(self, X: Any) -> np.ndarray:
        """The most probable value of the latent for each row, by its marginal. # (N, D) -> (N,)"""
        return self.predict_proba(X).argmax(-1)

    def predict_proba(self, X: Any) -> np.ndarray:
        """The posterior probabilities of the latent's values for each row. # (N, D) -> (N, K)"""
        rows = self._rows(X)
        return self._ask(rows, lambda: self._latents.probs(self._posterior(rows))).numpy()

    def transform(self, X: Any) -> np.ndarray:
        """What is known of the latent of each row: probabilities, of a continuous one its mean.

        Args:
            X: The rows. # (N, D)

        Returns:
            Responsibilities # (N, K), or posterior means: the scores of factors, the codes of a VAE
            # (N, H).
        """
        return self._features(self._rows(X)).numpy()

    def score_samples(self, X: Any) -> np.ndarray:
        """The log evidence of each row in nats; where a guide draws, its bound. # (N, D) -> (N,)

        Raises:
            ValueError: If the model's rows depend on each other, so that no row has one of its own.
        """
        rows = self._rows(X)
        terms = self._ask(rows, lambda: self._em.elbo(rows, **self._model_keywords()))
        if terms.pointwise is None:
            raise UsageError(
                message(
                    "score_samples",
                    "the model has no evidence for each row.",
                    "no plate of the rows holds all that is observed",
                    ["call score(X): the log evidence of all rows, divided by their number"],
                )
            )
        return terms.pointwise.detach().cpu().numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """The log evidence per row in nats, as scikit-learn's mixtures; larger is better.

        Args:
            X: The rows. # (N, D)
            y: Nothing.
        """
        rows = self._rows(X)
        return self._ask(rows, lambda: self._evidence((rows,))) / len(rows)

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """New rows from the fitted model, with the values of the latent.

        Args:
            n_samples: Number of rows.

        Returns:
            The rows # (n, D), and the latent that ``transform`` answers for # (n, *event); None for a
            model without a single one. Columns of X that the model does not observe (covariates) are
            those of the first row of the fit. Draws follow ``random_state``: with an int each call
            gives the same rows.

        Raises:
            ValueError: If the rows of the model cannot be drawn.
        """
        check_is_fitted(self)
        n = whole("sample", "n_samples", n_samples)
        rows = self._example.expand(n, -1).clone()
        drawn = self._drawn(rows, (rows,))
        return drawn.args[0].numpy(), self._latents.drawn(drawn.values)

    def bic(self, X: Any) -> float:
        """BIC of rows: −2 log evidence + p log N; lower is better. # X: (N, D)"""
        return self._criterion(self.score(X), len(X), float(np.log(len(X))))

    def aic(self, X: Any) -> float:
        """AIC of rows: −2 log evidence + 2 p; lower is better. # X: (N, D)"""
        return self._criterion(self.score(X), len(X), 2.0)

    def _features(self, rows: Tensor) -> Tensor:
        return self._ask(rows, lambda: self._latents.features(self._posterior(rows)))

    def _posterior(self, rows: Tensor) -> Any:
        return self._em.posterior(rows, **self._model_keywords())
