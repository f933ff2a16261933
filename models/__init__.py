"""Models to read, run and copy; each file holds ``model``, ``load_data`` and ``initialize``."""
