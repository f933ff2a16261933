"""Models whose data have so many rows that a run on all of them would make too much.

`slices` runs a model on some rows at a time, `by_rows` reads arguments that differ from row to row so,
`given_rows` is the graph of large data whose rows are those of the arguments, `alike_rows` holds once
what is the same in all of them, and `row_products` what is a number of each row times an element of a
parameter.

May import: `factors`, `bindings` and what they need of this wing. To read something else in slices,
copy `by_rows`.
"""
