"""The M-step: θ ← argmax E_q[log p(x, z; θ)].

`decision` chooses the strongest exact update of each parameter, `m_step` carries the updates out block
after block, on the sums over data of `statistics`: `closed_form`, `least_squares`, `gradient`.

May import: `pyro_em.graph` and what is below it. To add an update, add its class to `update`, the
condition under which it is exact to `decision`, and a file that solves it beside `closed_form`.
"""
