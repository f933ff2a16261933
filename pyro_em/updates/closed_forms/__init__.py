"""Parameters whose maximiser is written down: numerators over denominators, solved by kind.

`closed_form` is the file to read first. `priors` add to its sums, `from_data` are closed forms that
need the data themselves, `ends` and `met_ends` those of supports (with data at their `edges`),
`degrees` those of Wisharts, by Newton's method. `collapses` says where a spread has shrunk to rounding.

May import: `update` and `expectations` of this wing. To add a closed form, copy `degrees`.
"""
