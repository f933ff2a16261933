"""Data larger than memory: chunks of a model's arguments, read one after the other, pass after pass.

`chunks` holds the public class and `source` what it reads from; a kind of data is a file
with a `Source`: `arrays`, `iterables`, `parquet`. To add another kind, copy `arrays`. The wing
knows of no model.
"""
