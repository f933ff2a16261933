"""Fits to many data sets: what a fit would have been on other data of the same kind.

`tasks` runs many fits, here or in processes; `refits` fits a model again in a param scope of its own;
`bootstrap` summarises how far its parameters move, once components are `matching`.

May import: `pyro_em.fitting`, `pyro_em.analysis` and what is below them. To add a way of making data,
copy `refits.Fitted.parametric`.
"""
