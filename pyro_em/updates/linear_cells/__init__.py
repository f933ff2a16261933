"""Densities that are linear in functions of their parameters, as many small problems.

`cells` say how arguments follow from `coordinates` without bounds, with derivatives; `placed` which
elements meet in a cell, and `blocks` makes of these the small problems that are solved side by side.

May import: `expectations` of this wing. To add a form of cells, copy one of `cells`.
"""
