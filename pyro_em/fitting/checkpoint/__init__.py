"""What a fit writes while it goes on, so that another process can go on from there.

`checkpoints` opens the `checkpoint_file` of a call and holds what it belongs to against it
(`fingerprints`); `keeper` writes where a fit of exact steps stands.

May import: `steps`, `parts` and `session` of this wing, and what is below the wing. To keep another
kind of run, copy `keeper`.
"""
