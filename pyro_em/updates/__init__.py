"""The M-step: θ ← argmax E_q[log p(x, z; θ)].

`update` says which updates a parameter can have; `m_step` in which order those of a model are carried
out, block after block, `in_progress` what is found so far, and `unbounded` what has no maximiser. Each
folder has one subject:

* which update each parameter gets, the strongest that is exact: `decisions`;
* sums over data at the posterior: `expectations` are what they are, `sums` how they are added up;
* solvers: `closed_forms`, `regressions`, densities that are linear in their parameters: `linear_cells`,
  all others: `gradients`.

May import: `pyro_em.graph` and what is below it. To add an update, add its class to `update`, the
condition under which it is exact to `strongest` in `decisions`, a file that solves it beside
`closed_form`, and its turn to `m_step`.
"""
