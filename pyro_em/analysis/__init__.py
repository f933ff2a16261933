"""Questions to a fitted model: bounds, evidence by draws, predictions, the order of components.

`elbo` and `evidence` are numbers of the model at hand, `predictive`, `generate` and `forecast` other
data, `partition` the constant of a random field, `ordering` puts components in order; `rows` finds
which arguments have rows, for questions that ask for more or fewer of them.

May import: `pyro_em.plan` and what is below it. To add a question, write a function of a program (or
of a `Variational` pair) in a file of its own, copy `predictive`, and call it from `pyro_em.questions`.
"""
