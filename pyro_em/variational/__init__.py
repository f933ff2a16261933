"""Guides: the bound under draws of a guide, and its training.

`guide` looks at a guide, `pair` joins it with the model, `bound` evaluates the ELBO with whatever is
discrete summed exactly under each draw, `trainer` follows its gradients over `batches`.

May import: `pyro_em.posteriors` and what is below it. To add an estimator of the gradient, see
`score_function`; to add a divergence in closed form, see `divergence`.
"""
