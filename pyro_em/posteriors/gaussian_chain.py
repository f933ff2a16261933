"""The block of Gaussian latents that follow each other: Kalman's filter and smoother in place of matrices.

Sites that are alike at many steps are one group with a member for each, so that neither the E-step nor
the M-step goes from site to site. What an E-step costs is linear in the number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.graph.factors import Group
from pyro_em.posteriors.chain_form import ChainForm
from pyro_em.posteriors.chain_layout import ChainLayout, Stack
from pyro_em.posteriors.chain_numbers import ChainNumbers, StackNumbers, numbers_of
from pyro_em.posteriors.chain_solution import ChainSolution
from pyro_em.posteriors.gaussian import Arguments, GaussianBlock
from pyro_em.posteriors.kalman import smoothed
from pyro_em.tracing.sites import Role
