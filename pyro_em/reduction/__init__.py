"""How what parts of the data say becomes one: sums, maxima and decisions over parts.

A part is a chunk of the data, or what one process holds; the wing knows of no model, and a part is
whatever its caller makes of one. `reduction` is the protocol, with `Whole` where there is one part;
`over_parts` goes through parts one after the other, `over_group` adds those of many processes, each of
its calls an `exchange`. `trees` are values that add up leaf by leaf.

May import: `pyro_em.errors`. To combine parts in another way, add a file with a `Reduction`, as these
are.
"""
