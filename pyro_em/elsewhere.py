"""Names that users know from other libraries: an `AttributeError` says what does it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar


class NamesFromElsewhere:
    """A class whose missing attributes are explained where they are usual in other libraries.

    ``hasattr`` and ``getattr(x, name, default)`` work as ever: nothing is added but words.
    """

    elsewhere: ClassVar[Mapping[str, str]] = {}

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Called only for what is not found."""
            cls = type(self)
            if hasattr(cls, name):  # a property that raised: its own message stands
                return object.__getattribute__(self, name)
            here = cls.elsewhere.get(name)
            if here is not None:
                raise AttributeError(f"{cls.__name__} has no '{name}': {here}")
            words = f"'{cls.__name__}' object has no attribute '{name}'"
            raise AttributeError(words, name=name, obj=self)


def table(*rows: tuple[str, str]) -> dict[str, str]:
    """A dictionary from each of several names to their sentence.

    Example:
        >>> table(("a b", "see c"))
        {'a': 'see c', 'b': 'see c'}
    """
    return {name: here for names, here in rows for name in names.split()}


_FITTED = (
    "means_ covariances_ precisions_ weights_ startprob_ transmat_ means covars_ emissionprob_ "
    "components_ noise_variance_ mixing_ lambdas_ parameters params_ get_param get_parameters coef_ "
    "weights covariances transitions theta"
)


OF_EM = table(
    (
        "predict labels_ decode viterbi fit_predict assign classify map",
        "fit the model with em.fit(x); em.posterior(x).assignments('z') gives the most probable value "
        "of each row by itself, em.posterior(x).mode() those of all latents together",
    ),
    (
        "predict_proba predict_log_proba transform fit_transform responsibilities resp_ probs "
        "inverse_transform",
        "em.posterior(x).probs('z') gives the probabilities of a latent (after em.fit(x)), for "
        "fitted or new data",
    ),
    (
        "log_likelihood loglik log_prob log_evidence marginal_log_prob logpdf score_",
        "em.score(x) is the log evidence of data x in nats (em.elbo(x).value the bound)",
    ),
    (
        "score_samples pointwise evidence_per_row",
        "em.posterior(x).evidence_per_row is the log evidence of each row in nats",
    ),
    (
        "get_forecast predict_ahead forecast_ahead",
        "em.forecast(longer) predicts the steps of a longer series that are NaN",
    ),
    (
        "sample simulate rvs posterior_predictive",
        "em.generate(100, x) draws 100 new rows from the model; given these data, "
        "em.predictive(x, num_samples=100) draws what it observes, em.posterior(x).sample(100) its "
        "latents",
    ),
    (
        _FITTED + " params get_params param",
        "parameters have the model's own names: em.fit(x).params['mu'], or pyro.param('mu')",
    ),
    ("set_params", "parameters are set with pyro.get_param_store()['mu'] = value before em.fit(x)"),
    (
        "n_iter_ converged_ lower_bound_ history converged status bic aic icl result_ summary",
        "what em.fit(x) returns holds it: result.num_steps, .converged, .history, .bic, .summary()",
    ),
    ("e_step expectation E_step estep", "em.posterior(x) is the E-step"),
    ("M_step maximization mstep", "em.m_step(em.posterior(x), x) is the M-step"),
    ("run train fit_model optimize optimise", "em.fit(x) fits, em.step(x) does one step"),
    ("loss_and_grads loss", "em.evaluate_loss(x) is −ELBO, em.step(x) returns it with each step"),
    ("state_dict get_state", "em.save(path) writes the parameters to a file"),
    ("load_state_dict set_state", "em.load(path) reads parameters that em.save wrote"),
    ("to cuda cpu double float half", "device and dtype follow the data: em.fit(x.to(device))"),
    ("standard_errors", "what em.fit(x) returns has it: result.standard_errors()"),
    ("plot", "pyro_em.plotting has the pictures, and pyro_em.compare(...) a plot of its own"),
)


OF_RESULT = table(
    (
        "predict labels_ labels mode decode viterbi assignments z",
        "result.posterior.assignments('z') gives the most probable value of each row by itself, "
        "result.posterior.mode() those of all latents together; for new data em.posterior(x)",
    ),
    (
        "predict_proba predict_log_proba transform responsibilities resp_ probs probabilities",
        "result.posterior.probs('z') gives the probabilities of a latent; for new data "
        "em.posterior(x).probs('z')",
    ),
    (
        "sample",
        "em.generate(100, x) draws 100 new rows; given these data, result.posterior.sample(100) draws "
        "latents, em.predictive(x) observations",
    ),
    ("entropy", "result.posterior.entropy() is the entropy of the latents in nats"),
    (
        "loglik log_likelihood loglikelihood logLik llf score evidence marginal_log_likelihood "
        "log_prob logp fun",
        "result.log_evidence is the log-likelihood of the observed data in nats",
    ),
    ("lower_bound_ lower_bound bound ELBO", "result.elbo is the bound in nats"),
    (
        "score_samples pointwise evidence_per_row",
        "result.posterior.evidence_per_row is the log evidence of each row in nats",
    ),
    (
        "loss losses loss_",
        "result.history holds the bound of every step (the loss is its negative)",
    ),
    ("n_iter_ n_iter nit iterations num_iterations steps n_steps", "result.num_steps counts steps"),
    ("converged_ success", "result.converged says it, result.status and .message say why it ended"),
    ("AIC BIC ICL", "the names are lower case: result.aic, result.bic, result.icl"),
    (
        _FITTED + " x param",
        "parameters have the model's own names: result.params['mu'], or pyro.param('mu')",
    ),
    (
        "bse se std_errors standard_error cov_params stderr covariance",
        "result.standard_errors() gives them by parameter, and their .covariance; "
        "result.bootstrap() those of refits",
    ),
    ("plot", "pyro_em.plotting has the pictures; result.history can be drawn as it is"),
    ("save", "em.save(path) writes the parameters to a file"),
)


OF_POSTERIOR = table(
    (
        "predict labels_ labels argmax map viterbi decode most_probable",
        "q.assignments('z') gives the most probable value of each row by itself, q.mode() those of all "
        "latents together",
    ),
    (
        "predict_proba responsibilities resp_ probabilities proba marginals gamma weights "
        "smoothed_probs posterior pmf",
        "q.probs('z') gives the probabilities of a latent",
    ),
    (
        "pairwise xi joint_probs",
        "q.joint('z_0', 'z_1') gives the joint probabilities of two latents",
    ),
    ("samples draw rsample", "q.sample(n) draws all latents together"),
    ("log_prob logp log_probs", "q.probs('z').log() are the log probabilities of a latent"),
    (
        "evidence loglik log_likelihood score score_samples",
        "q.log_evidence is the log evidence in nats, q.evidence_per_row that of each row",
    ),
    ("elbo ELBO loss", "q.bound is the ELBO in nats; em.elbo(x, q=q) has its terms"),
    ("kl", "em.elbo(x, q=q).kl is the divergence from the prior, .gap that from the posterior"),
)


OF_SUMMED = OF_POSTERIOR | table(
    (
        "filter filtered_probs filtered_means filtered_state",
        "q.filtered('z_*') gives what was known at each step of a chain, q.probs('z_*') and "
        "q.mean('h_*') what all data say",
    ),
    (
        "residuals resid innovations",
        "q.prediction_errors('y_*') gives standardised one-step errors",
    ),
    (
        "expectation",
        "(q.probs('z') * values).sum(-1) is the mean of a discrete latent with these values, "
        "q.mean('h') that of a Gaussian one",
    ),
    (
        "variance var std stddev cov",
        "q.covariance('h') gives the variances of a Gaussian latent, q.probs('z') the probabilities "
        "of a discrete one, and so its moments",
    ),
)


OF_DRAWN = OF_POSTERIOR | table(
    (
        "filtered prediction_errors",
        "what is known step by step takes an exact posterior; em.posterior(x[:t]) is that of the first "
        "t steps alone",
    ),
    ("marginal", "q.probs('z') gives the probabilities of a discrete latent"),
    (
        "variance var std",
        "q.sample(1000)['h'].std(0) estimates it from draws; q.covariance('h') gives the variances of "
        "a Gaussian latent that is integrated under each draw",
    ),
    ("joint", "q.sample(1000) draws all latents together"),
    (
        "bound pointwise evidence_per_row",
        "em.elbo(x, num_particles=100) estimates the bound, with .pointwise",
    ),
)
