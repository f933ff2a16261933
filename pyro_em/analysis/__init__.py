"""Questions to a fitted model: bounds, evidence by draws, predictions, the order of components.

May import: `pyro_em.plan` and what is below it. To add a question, write a function of a program (or
of a `Variational` pair) in a file of its own, copy `predictive`, and call it from `pyro_em.em`.
"""
