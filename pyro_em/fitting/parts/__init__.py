"""Fits whose data come in parts: chunks that are read in turn, or what each process of a group holds.

`chunked` reads each chunk as the model with these rows, provided that rows stand alone (`rows_alone`);
`chunk_by_chunk` answers questions so, `within_budget` takes this way where one table would be too
large. `joining` makes a fit of the `shards` of several processes.

May import: `session` and `steps` of this wing, and what is below the wing. To bring data in another
way, see `pyro_em.sources`.
"""
