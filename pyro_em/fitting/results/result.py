"""What a fit returns: `EMResult`, with its criteria, its table and its posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pyro_em import html
from pyro_em.arguments import a_level, number, truth
from pyro_em.elsewhere import OF_RESULT, NamesFromElsewhere
from pyro_em.errors import UsageError, message
from pyro_em.fitting.results.ends import End
from pyro_em.fitting.results.history import EMStatus, History
from pyro_em.fitting.results.inference_data import as_inference_data, inference_groups
from pyro_em.fitting.results.information import StaticInformation
from pyro_em.fitting.results.information_criteria import Criteria
from pyro_em.fitting.results.labels import ParameterForm, labels_of
from pyro_em.fitting.results.result_in_words import above_the_table, in_words
from pyro_em.fitting.results.standard_errors import StandardErrors
from pyro_em.fitting.results.summary import as_frame, estimates, parameter_table, wide_table
from pyro_em.plan.plan import Plan
from pyro_em.portable import Copied, Portable, Refused, answered
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.tracing.dependences import changed_since
from pyro_em.variational.drawn import DrawnPosterior

_QUICK, _STEP = 3e6, 500  # standard errors that take some seconds; a site costs as much as 500 rows

if TYPE_CHECKING:
    from pyro_em.resampling.bootstrap import Bootstrap


@dataclass(frozen=True, eq=False, repr=False)
class EMResult(Portable, NamesFromElsewhere):
    """A fitted model; everything is computed at the *returned* parameters.

    Attributes:
        params: Constrained values by name.
        log_evidence: log p(x; θ) in nats; None where a guide draws latents.
        elbo: The bound that was raised, log prior included; evidence plus log prior when exact. With
            ``MonteCarlo(n)`` and draws of a guide it is the importance-weighted bound of n draws,
            which is above the ELBO of ``em.elbo``; so is ``history``.
        history: See `History`.
        converged: Whether a stopping rule was met; None in a stochastic fit without a rule.
        status: Why it ended.
        message: More about the status (which component was degenerate), or its sentence.
        num_steps: E-step and M-step pairs done by this call.
        total_steps: Steps of ``fit``, ``step`` and ``steps`` together since the last reset.
        seconds: Wall-clock time.
        plan: The decisions.
        log_prior: Log density of point-estimated latents in nats.
        rate: The measured rate of convergence (last ratio of successive gains), or None.
        starts: Final log evidence of every start, in order; nan where none was reached.
        ends: Per run to the end, how it began and where it ended (`End`), in the order of ``starts``;
            one that collapsed comes before the run that took its place.
        num_rows: N of the BIC: elements of the outermost data plate in which anything was observed,
            weighted by scale; of one series without a plate its steps.
        counted: What ``num_rows`` counts, in words.
        num_local_estimates: Numbers of the point estimates of latents inside the plates that the data
            share, which are no parameters of the model; the log evidence takes them as known.
        start: Where the best run began, in words: "values in the model", "values in the param store"
            where those are others, or the ``init`` that was asked for.
        seed: The seed that was given.
        dtype: Of the densities.
        bound_name: Which bound ``elbo`` and ``history`` hold, in words.
        is_parted: Whether the data came in parts, so that there is no posterior of all rows at once.
        columns: The names of the columns of each DataFrame that was passed, by argument.
    """

    elsewhere: ClassVar[Mapping[str, str]] = OF_RESULT

    params: Mapping[str, Tensor]
    log_evidence: float | None
    elbo: float
    history: History
    converged: bool | None
    status: EMStatus
    message: str
    num_steps: int
    total_steps: int
    seconds: float
    plan: Plan
    rate: float | None
    starts: tuple[float, ...]
    num_rows: float
    start: str
    seed: int | None
    dtype: torch.dtype
    _standard_errors: Callable[[], StandardErrors] = field(repr=False)
    _posterior: Callable[[], Posterior | DrawnPosterior] = field(repr=False)
    _free: Callable[[], int] = field(repr=False)
    counted: str = "rows"
    log_prior: float = 0.0
    num_local_estimates: int = 0
    bound_name: str = "ELBO"
    is_parted: bool = False
    ends: tuple[End, ...] = ()
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    _forms: Callable[[], Mapping[str, ParameterForm]] = field(default=dict, repr=False)
    _information: StaticInformation | None = field(default=None, repr=False)
    _bootstrap: Callable[..., Any] | None = field(default=None, repr=False)
    _posterior_at: Callable[[Mapping[str, Tensor]], Posterior] | None = field(
        default=None, repr=False
    )

    def _travelling(self) -> dict[str, Any]:
        """A copy keeps the posterior, and what gives standard errors where no model is needed."""
        information, errors = self._information, self._standard_errors
        if information is None:
            errors = errors if isinstance(errors, Refused) else Refused(_NO_MODEL)
        else:
            errors = (
                Refused(changed_since("standard_errors"))
                if information.is_changed()
                else information
            )
        return {
            **vars(self),
            "_posterior": answered(self._posterior),
            "_free": answered(self._free),
            "_forms": answered(self._forms),
            "_standard_errors": errors,
            "_information": None if isinstance(errors, Refused) else information,
            "_bootstrap": None,
        }

    def _staying(self) -> dict[str, Any]:
        changed = self._information is not None and self._information.is_changed()
        return {
            **vars(self),
            "_posterior": Copied(self._posterior),
            "_free": Copied(self._free),
            "_forms": Copied(self._forms),
            "_posterior_at": None,
            "_information": None if changed else self._information,
        }

    @property
    def posterior(self) -> Posterior | DrawnPosterior:
        """The E-step at ``params``; after steps on sums it is computed when first asked for."""
        return self._posterior()

    @property
    def num_free_parameters(self) -> int:
        """p of the BIC, through constraints.

        Not counted are fixed ones, structural zeros, and elements that no factor reads. Point estimates
        of latents outside every plate that the data share count as parameters.
        """
        return self._free()

    def criteria(self, n: float | None = None) -> Criteria:
        """BIC, AIC, ICL and the entropy of the latents, at a stated N.

        Args:
            n: N of BIC and ICL. By default ``num_rows``: the rows in which anything was observed,
                weighted by scale; of one series without a plate its steps.

        Raises:
            UsageError: If the log evidence is not known, or ``n`` is no positive number.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     with pyro.plate("rows", len(x)):
            ...         pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0), obs=x)
            >>> found = ExactPosteriorEM(model).fit(torch.tensor([0.0, 1.0])).criteria(n=100)
            >>> found.n, round(found.bic - found.aic, 4)  # log 100 − 2
            (100, 2.6052)
            >>> pyro.clear_param_store()
        """
        if self.log_evidence is None:
            raise UsageError(
                message(
                    "criteria",
                    "the log evidence of this model is not known: a guide draws latents.",
                    "BIC, AIC and ICL are made of it",
                    ["compare models by em.estimate_evidence(x), or by the bound of held-out data"],
                )
            )
        if n is not None and not number("criteria", "n", n) > 0:
            raise UsageError(message("criteria", f"n={n} is no number of rows.", "it is positive"))
        p, entropy = self.num_free_parameters, self._entropy()
        own = self.num_rows if n is None else n
        words = self.counted if n is None else "as was asked"
        return Criteria(self.log_evidence, p, own, words, entropy)

    def _entropy(self) -> float | None:
        if self.is_parted:
            return None
        q = self.posterior
        return q.entropy_value if isinstance(q, Posterior) else q.entropy()

    @property
    def bic(self) -> float | None:
        """BIC at ``num_rows``, lower is better (`criteria`); None without an evidence."""
        if self.log_evidence is None:
            return None
        return Criteria(self.log_evidence, self.num_free_parameters, self.num_rows, "").bic

    @property
    def aic(self) -> float | None:
        """AIC, lower is better (`criteria`); None without an evidence."""
        if self.log_evidence is None:
            return None
        return Criteria(self.log_evidence, self.num_free_parameters, self.num_rows, "").aic

    @property
    def icl(self) -> float | None:
        """ICL = BIC + 2 H(q), lower is better (`criteria`).

        None without an evidence, and where the data came in parts.
        """
        return None if self.log_evidence is None else self.criteria().icl

    def standard_errors(self) -> StandardErrors:
        """Standard errors at ``params``, from the Hessian of the exact log evidence.

        Returns:
            A mapping from parameter to standard errors of its shape, with ``covariance`` and
            ``notes``; nan on boundaries and where the data do not identify a parameter. Bounds of a
            Uniform have none, and are taken as known for all others.
        """
        return self._standard_errors()

    def bootstrap(
        self,
        n: int = 200,
        *,
        parametric: bool = True,
        num_restarts: int = 1,
        level: float = 0.95,
        processes: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Bootstrap:
        """Standard errors and intervals from fits to ``n`` other data sets of the same size.

            θ*_b = fit(x*_b),    x*_b ~ p(x; θ̂),    b = 1, …, n

        Each fit begins at the parameters of this one, in a param scope of its own; the components of
        each are put into the order of this one's before spreads are taken. Gaussian latents without
        names of their own (loadings up to a rotation) are not matched.

        Args:
            n: Number of data sets.
            parametric: Whether data are drawn from the model at its parameters, with its covariates,
                masks and what is missing as they are; otherwise rows (sequences) are drawn from the
                data with replacement, with all arguments that have a value for each row.
            num_restarts: Starts of each fit, of which the first is at the parameters of this one.
            level: The probability that intervals hold.
            processes: How many processes, forked from this one; None for this one alone. The numbers
                are the same to the bit. Each fit uses one thread.
            seed: Seed of data and starts.
            progress: Whether to show a bar; by default where the output is a terminal.

        Returns:
            The refits, with standard errors, intervals and biases; failed fits are counted.

        Raises:
            UsageError: If the data cannot be drawn: rows that are not independent, what is observed
                is in no argument, a ``pyro.factor`` reads latents or data, a guide draws latents, data
                came in chunks.

        Source: Efron and Tibshirani (1993); for mixtures O'Hagan, Murphy, Scrucca and Gormley (2019).

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     with pyro.plate("rows", len(x)):
            ...         pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0), obs=x)
            >>> result = ExactPosteriorEM(model).fit(torch.zeros(25))
            >>> result.bootstrap(8).draws["mu"].shape
            torch.Size([8])
            >>> pyro.clear_param_store()
        """
        if self._bootstrap is None:
            raise UsageError(_NO_REFITS)
        return self._bootstrap(  # type: ignore[no-any-return]
            self, n, parametric, num_restarts, level, processes, seed, progress
        )

    def summary(
        self,
        level: float = 0.95,
        *,
        labels: Mapping[str, Any] | None = None,
        wide: bool = False,
        standard_errors: bool | None = None,
    ) -> Any:
        """The estimates as a table, one row per element of a parameter, with the fit described above.

        Intervals stay within the constraint of a parameter: of values with one bound they are symmetric
        in the logarithm, of values with two (probabilities) in the logit, of others in the value.
        Parameters of more than a thousand elements, and those of networks, have one row.

        Args:
            level: The probability that an interval holds.
            labels: Of the places on an axis, ``{"component": ["short", "long"]}``, or on an axis of a
                parameter, ``{"mu": {"feature": ["eruption", "wait"]}}``; see `labels_of`. By default
                features have the names of the columns of a DataFrame that was fitted, all else numbers
                from zero.
            wide: Whether to give the estimates alone, with a column for each component.
            standard_errors: Whether to compute them. By default they are where that is quick; else, and
                where there are none, the table says so above.

        Returns:
            A pandas DataFrame where pandas is installed, else a `Table` that prints the same. Its
            columns are estimate, standard_error, z, lower, upper and note (fixed, boundary, not
            identified); its index is the parameter, and what its axes run over: component, from and to,
            feature, category, factor, covariate, a plate. What describes the fit is in ``attrs``.

        Raises:
            UsageError: If labels do not fit.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_em import ExactPosteriorEM
            >>> def model(x):
            ...     mu = pyro.param("mu", torch.tensor([1.0, -1.0]))
            ...     with pyro.plate("data", len(x)):
            ...         z = pyro.sample("z", dist.Bernoulli(0.5)).long()
            ...         pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)
            >>> pyro.clear_param_store()
            >>> result = ExactPosteriorEM(model).fit(torch.tensor([-2.0, -1.0, 2.0, 4.0]))
            >>> table = result.summary(labels={"component": ["high", "low"]})
            >>> table.loc[("mu", "high"), ["estimate", "lower", "upper"]].round(2).tolist()
            [3.0, 1.61, 4.39]
            >>> table.attrs["steps"] == result.num_steps
            True
            >>> pyro.clear_param_store()
        """
        level = a_level("summary", level)
        truth("summary", "wide", wide)
        forms = self.forms
        shapes = {n: v.shape for n, v in self.params.items()}
        named = labels_of(labels, forms, shapes, self.columns.values())
        about = dict(above_the_table(self))
        if wide:
            return as_frame(wide_table(self.params, forms, named, about))
        errors, why = self._errors_for_a_table(standard_errors)
        if why:
            about["standard errors"] = why
        updates = self.plan.updates
        return as_frame(parameter_table(self.params, forms, updates, errors, named, level, about))

    def to_inference_data(
        self,
        num_samples: int = 1000,
        *,
        parameters: str = "estimates",
        seed: int | None = None,
        labels: Mapping[str, Any] | None = None,
    ) -> Any:
        """The fit for ArviZ: draws of latents, the log likelihood of each row, observed data.

        The log likelihood of a row is its log evidence in nats: its latents are summed and integrated
        out. At the estimates it is the same in every draw; with ``parameters="draws"`` it is that of
        each draw, so that ``arviz.loo`` and ``arviz.waic`` are those of the model with its parameters'
        normal approximation. Steps of a chain (``z_0``, ``z_1``, …) become one variable ``z``.

        Args:
            num_samples: Number of draws.
            parameters: ``"estimates"``: they are constant, in ``constant_data``. ``"draws"``: they are
                drawn from the normal distribution that they have when data are many, in unconstrained
                coordinates, and each draw of latents is given one of them; one E-step for each.
            seed: Seed of the draws; torch's global state otherwise.
            labels: Of axes and plates, as for ``summary``.

        Returns:
            An ``InferenceData`` of ArviZ 0.x, a ``DataTree`` from ArviZ 1 on. Dimensions are plates and
            the axes of parameters.

        Raises:
            UsageError: If ArviZ is not installed, the data came in parts, or parameters cannot be
                drawn.
        """
        groups = inference_groups(self, num_samples, parameters, seed, labels)
        return as_inference_data(groups)

    @property
    def forms(self) -> Mapping[str, ParameterForm]:
        """Of each parameter the names of its axes and its constraint."""
        return self._forms()

    def posterior_at(self, params: Mapping[str, Tensor]) -> Posterior:
        """The exact E-step for the data of the fit at other parameters; changes nothing.

        Args:
            params: Constrained values.

        Raises:
            UsageError: If the data have changed since, came in parts, or a guide draws latents; in a
                pickled copy, which has no model.
        """
        if self._posterior_at is None:
            raise UsageError(_NO_OTHER_POSTERIOR)
        return self._posterior_at(params)

    def _errors_for_a_table(self, wanted: bool | None) -> tuple[StandardErrors | None, str]:
        """Standard errors where they are wanted, or quick to have, and why there are none."""
        if wanted is not None:
            truth("summary", "standard_errors", wanted)
        work = self.num_free_parameters * len(self.plan.observed) * (self.num_rows + _STEP)
        if wanted is False or (wanted is None and work > _QUICK):
            return None, "not computed; summary(standard_errors=True) does" * (wanted is None)
        try:
            return self.standard_errors(), ""
        except UsageError as error:
            if wanted:
                raise
            return None, str(error).split("\n")[0].removeprefix("standard_errors: ")

    def __repr__(self) -> str:
        return f"EMResult: {self}"

    def _repr_html_(self) -> str:
        forms = self.forms
        shapes = {n: v.shape for n, v in self.params.items()}
        named = labels_of(None, forms, shapes, self.columns.values())
        table = estimates(self.params, forms, named)
        return html.whole(html.heading("EMResult"), html.line(str(self)), table._repr_html_())

    def __str__(self) -> str:
        return in_words(self)


_NO_REFITS = message(
    "bootstrap",
    "this is a pickled copy of a result, without its model.",
    "each data set takes a fit of the model",
    ["call bootstrap() in the process that fitted, and send what it returns"],
)


_NO_OTHER_POSTERIOR = message(
    "posterior_at",
    "this result has no model that could be asked at other parameters.",
    "it is a copy, its data came in parts, or a guide draws latents",
    ["ask the result of an exact fit, in the process that fitted"],
)


_NO_MODEL = message(
    "standard_errors",
    "this is a pickled copy of a result, without its model.",
    "parameters reach the densities in a way that only the model knows",
    [
        "call standard_errors() in the process that fitted, and send what it returns",
        "fit here, from the values in params",
    ],
)
