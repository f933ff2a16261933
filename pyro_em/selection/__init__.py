"""Choosing a model: a grid of models fitted to the same data with the same starts, and compared.

`select` makes and fits the `candidates`, holds rows out, and returns a `selection.Selection`; `ratio`
tests one of them against the next by a parametric bootstrap.

May import: everything below, `pyro_em.plotting` included. To add a criterion, see `criteria`.
"""
