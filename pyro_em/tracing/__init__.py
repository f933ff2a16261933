"""Running a model: everything that touches Pyro's or torch's internals lives here.

A model is run plainly, with tagged latents, and with its latents enumerated (`runs`); handlers change
what a run does (`handlers`), `parameters` hands out and writes parameter values, `checkpoint` keeps
them in files.

May import: `pyro_em.errors`, `pyro_em.distributions`. To add a handler, copy a class in `handlers`;
whatever private name of Pyro or torch it needs is tested in ``tests/tracing/test_pyro_internals.py``.
"""
