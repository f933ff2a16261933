"""Tests of `pyro_em.posteriors`."""

import pytest

pytest.register_assert_rewrite("tests.posteriors.random_models")
