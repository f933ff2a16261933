"""From the runs of a model to its factor graph.

The files of this folder serve every model: `structure` is its skeleton (plates, latents, observed
sites; `unregistered` and `coupling` see what shapes do not show, `checks` what is wrong in the layout,
`independence` who reads whom, `mixtures` what hides in distributions), which `enumerated` runs with its
latents enumerated. `trace` brings such a run into the compact `layout` (`compact`, `forms`, `stacking`,
`stretches`, `diagonals`, `unrecorded`) as the groups of `factors`; `laid_out` keeps how that was done
for later runs, and `told_by_selections` what was decided of them. `parting` takes a graph apart, `axes`
names its axes, `clamps` makes factors of what is seen of a latent, `all_data` says what a part is told
of all, `later_arguments` are computed when asked for, `computed_arguments` are done again by what a run
did, and `prediction` holds a graph against another run. Each folder has one subject:

* the model as it is, and all that is wrong with it: `findings`; what to say where it raises: `failing`;
* how parameters reach each argument: `bindings`;
* how latents reach each argument: `gaussian_lines`, `conjugate_children`;
* many steps: `vectorised_loops`; many rows: `many_rows`.

May import: `pyro_em.tracing`, `pyro_em.families` and the ground. To add a finding about models or data,
copy a function of `checks`; to recognise another way in which a parameter reaches an argument, copy a
file of `bindings`.
"""
