"""A guide and a model at its values in one trace, by one handler.

A step of a network runs both, and most of what it adds to their arithmetic is the way of each message
through the handlers: this one does what four of `pyro_em.tracing.handlers` do in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro.poutine.trace_messenger import TraceMessenger

from pyro_em.tracing.handlers import GiveValues, GuideSites, OfBatch, SampleMessenger
from pyro_em.tracing.sites import Role


class PairTrace(TraceMessenger):
    """A trace of sample sites: first those of a guide (`GuideSites`), then those of the model.

    From `turn_to_model` on latents have the guide's values (`GiveValues`); in both some plates are
    batches that stand for all data (`OfBatch`).

    Args:
        shown: Guide sites whose log density counts.
        chosen: Guide sites that are held at one value of their support, by its place there.
        roles: Per latent of the model that takes its value from the guide, what that value is.
        factors: Per plate what multiplies its sites.
    """

    def __init__(
        self,
        shown: frozenset[str],
        chosen: Mapping[str, int],
        roles: Mapping[str, Role],
        factors: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.guide = GuideSites(shown, chosen)
        self._model = GiveValues(self.guide.values, roles, self.guide.subsamples)
        self._batch = OfBatch(factors)
        self._turn: SampleMessenger = self.guide

    def turn_to_model(self) -> None:
        """The guide has been run: what comes now are the model's sites."""
        self._turn = self._model

    def _process_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            return
        self._turn._pyro_sample(msg)
        if not msg["stop"]:
            self._batch._pyro_sample(msg)

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            return
        if not msg["stop"]:
            name, nodes = msg["name"], self.trace.nodes
            if name in nodes or msg["infer"].get("_do_not_trace"):
                self._pyro_post_sample(msg)
            else:
                nodes[name] = msg.copy()
        self._turn._pyro_post_sample(msg)
