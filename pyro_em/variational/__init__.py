"""Guides: the bound under draws of a guide, and its training.

`guide` looks at a guide, `pair` joins it with the model, `laying` lays the pair out, `drawing` draws
once with whatever is discrete summed exactly under the draw, `integrating` integrates whatever is
Gaussian or conjugate there, `bound` evaluates the ELBO from such draws (`particle`, whose terms are
made of `summands`). `trainer` follows its gradients over `batches`, `training` is what lasts from step
to step, `running_averages` keeps closed forms there, `recovery` has parameters to return to when a step
breaks. `drawn` is the posterior as users hold it, `amortized` the guide that users make of encoders.

May import: `pyro_em.posteriors` and what is below it. To add an estimator of the gradient, see
`score_function`; to add a divergence in closed form, see `divergence`.
"""
