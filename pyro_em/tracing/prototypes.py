"""A model as an autoguide runs it, for the shapes and first values of the latents that it covers.

Pyro's autoguides run the whole model before their first draw and keep the trace. Of a mixture they
want its priors alone, and the run draws a component for each row and looks up an argument for each:
several tables of rows and components, of which the arguments stay with the guide.
"""

from __future__ import annotations

from typing import Any

from pyro.distributions.torch_distribution import TorchDistributionMixin

from pyro_em.tracing.allocation import Shadows
from pyro_em.tracing.handlers import SampleMessenger
from pyro_em.tracing.lean import asks_for_many
from pyro_em.tracing.runs import Model
from pyro_em.tracing.sparing import DrawNothing, validate_nothing
from pyro_em.tracing.tables import Tables


class SparingOnce:
    """A model whose first whole run has shadows in place of large latents that can be enumerated.

    Whoever runs it restores whether distributions validate what they are given.

    Args:
        model: The model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._has_run = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            NumbersNeeded: If it fails with shadows.
        """
        if self._has_run:
            return self.model(*args, **kwargs)
        tables = Tables.beside((*args, *kwargs.values()), validate_nothing)
        shadows = Shadows(tables=tables)
        with shadows, _Instead(DrawNothing(shadows)):
            out = self.model(*args, **kwargs)
        shadows.let_go()
        self._has_run = True
        return out


class _Instead(SampleMessenger):
    """Asks at each site for many numbers whether something stands in their place."""

    def __init__(self, instead: DrawNothing) -> None:
        super().__init__()
        self.instead = instead

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        # A plate's own message draws a subsample and has no distribution.
        if isinstance(msg["fn"], TorchDistributionMixin) and asks_for_many(msg):
            self.instead(msg)
