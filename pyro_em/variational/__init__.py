"""Guides: the bound under draws of a guide, and its training.

`guide` looks at a guide, `pair` joins it with the model, `drawing` draws once with whatever is
discrete summed exactly under the draw, `bound` evaluates the ELBO from such draws, `trainer` follows
its gradients over `batches`, `training` is what lasts from step to step, and `running_averages` keeps
closed forms there.

May import: `pyro_em.posteriors` and what is below it. To add an estimator of the gradient, see
`score_function`; to add a divergence in closed form, see `divergence`.
"""
