"""From the runs of a model to its factor graph.

* The model as it is: `examination` finds its `structure` (plates, latents, observed sites) with the
  findings of `checks` and `value_checks`; `coupling`, `side_effects`, `unregistered` and `agreement`
  see what shapes do not show; `failures`, `blame` and `failing_…` say what to do where the model
  raises.
* The graph: `trace` brings an enumerated run into the compact `layout`, as the groups of `factors`
  (`stacking`); `parting` takes a graph apart.
* How parameters reach each argument: `autograd` reads it off the gradient graph as a `binding`, by
  `selections`, `affine`, `log_affine`, `bilinear`, `composites`; `useful` says which of these have an
  update, `signatures` recalls those of one form, `prediction` holds them against another run.
* How latents reach each argument: Gaussian ones `read_lines` (`lines`), conjugate ones
  `conjugate_reads` (`conjugate_record`), in a `conjugate_model`.
* Many rows and many steps: `slices` and `by_rows` read some rows at a time, `all_data` is what a part
  is told of all; `series`, `stepwise` and `unrolled` read vectorised loops by a few of their steps.

May import: `pyro_em.tracing`, `pyro_em.families` and the ground. To add a finding about models or
data, copy a function of `checks`; to recognise another way in which a parameter reaches an argument,
copy `bilinear` and see `autograd`.
"""
