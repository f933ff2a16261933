"""Every decision about a model, with its reason, before anything is paid.

`planner` looks at a model, its guide and its data and decides the route of each latent (`routing`),
the update of each parameter, and which block iterates (`eligibility`); `plan.Plan` prints it, with its
rows (`routes`). `building` makes of a `task` a `program`, a model with its data ready for E-steps and
M-steps: `examined` is what two cheap runs say, `continuous` integrates latents, `decisions` makes a
program of a graph, and `verification` holds it against another run of the model; `kept` are readings
that serve again (`kept_reading`), where another run does the same (`read_again`). `part`, `over_all`
and `summed` are programs of some rows, in common with those of others. `wishes`, `fit_wishes` and
`given_q` check what the user asked for.

May import: `pyro_em.variational`, `pyro_em.posteriors` and what is below them. To make a block
eligible, add it to the ordered list in `eligibility`; to add a note, see `notes`.
"""
