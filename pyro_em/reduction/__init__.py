"""How what parts of the data say becomes one: sums, maxima and decisions over parts.

A part is a chunk of the data, or what one process holds. It may import the ground alone, and knows of
no model: a part is whatever its caller makes of one. `over_parts` goes through parts one after the
other, `over_group` adds those of many processes, each of its calls an `exchange`. To combine parts in
another way, add a file with a `Reduction`, as these are.
"""
