"""Which update each parameter gets: the strongest that is exact, read off the bindings of a graph.

`decision` is the file to read first: `strongest` asks for one parameter, by its `appearances` in all
densities (`read_uses`, `read_priors`), and `together` finds what is solved for together.

May import: `update`, `closed_forms`, `regressions` and `linear_cells` of this wing. To add an update,
give `strongest` the condition under which it is exact.
"""
