"""The M-step: θ ← argmax E_q[log p(x, z; θ)].

`decision` chooses the strongest exact update of each parameter (`strongest`), and what is solved for
together; `m_step` says in which order they are carried out, `in_progress` what is found so far, and
`data_sums` what is asked of one part of the data. Each kind of update has its file: `closed_form`,
`least_squares`, `coefficients` of linear predictors, `newton_on_sums` on the cells of `blocks`,
`degrees`, `ends` of supports, `gradient`. `statistics` are sums over data, `model_sums` those that are
kept from batch to batch, `beliefs` and `conjugate_beliefs` what stands in place of values of latents.

May import: `pyro_em.graph` and what is below it. To add an update, add its class to `update`, the
condition under which it is exact to `strongest`, a file that solves it beside `closed_form`, and its
turn to `m_step`.
"""
