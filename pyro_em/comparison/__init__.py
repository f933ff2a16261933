"""Exact EM, SVI and direct maximisation side by side, from one start, per step and per second.

`compare` runs the contenders (`contenders`) through a `contest` and returns a `table.Comparison`.

May import: everything below, `pyro_em.plotting` included. To add a contender, see `contenders`.
"""
