"""Pyro's own handlers at less cost per site: the same messages, the same dimensions.

A chain of a thousand steps passes each of them twice a step. What is left out is what costs and says
nothing: a ``Counter`` per site, a context manager per call, methods looked up by name.
"""

from __future__ import annotations

from typing import Any

from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.markov_messenger import MarkovMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger


class _Markov(MarkovMessenger):
    """``pyro.markov`` that counts scopes in a plain dict."""

    def _process_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or msg["done"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        infer, pos = msg["infer"], self._pos
        scope = infer.get("_markov_scope")
        if scope is None:
            scope = infer["_markov_scope"] = {}
        for names in self._stack[max(0, pos - self.history) : pos + 1]:
            for name in names:
                scope[name] = scope.get(name, 0) + 1
        infer["_markov_depth"] = 1 + infer.get("_markov_depth", 0)
        self._stack[pos].add(msg["name"])

    def _postprocess_message(self, msg: Any) -> None:
        pass


class LeanTrace(TraceMessenger):
    """``poutine.trace``; turns the ``pyro.markov`` contexts that it meets into the quick ones."""

    def _process_message(self, msg: Any) -> None:
        for handler in _PYRO_STACK:
            if type(handler) is MarkovMessenger:
                handler.__class__ = _Markov  # from the next site on

    def _postprocess_message(self, msg: Any) -> None:
        name, nodes = msg["name"], self.trace.nodes
        plain = msg["type"] == "sample" and not msg["infer"].get("_do_not_trace")
        if plain and name not in nodes:
            nodes[name] = msg.copy()
        else:
            super()._postprocess_message(msg)


class LeanEnum(EnumMessenger):
    """``poutine.enum`` without a context manager around each site."""

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            _enumerate(self, msg)

    def _postprocess_message(self, msg: Any) -> None:
        value = msg["value"]
        if msg["type"] != "sample" or value is None:
            return
        if not isinstance(msg["fn"], TorchDistributionMixin):
            return
        shape = value.shape[: value.dim() - msg["fn"].event_dim]
        ids = msg["infer"].setdefault("_dim_to_id", {})
        ids.update(self._param_dims.get(msg["name"], {}))
        n = len(shape)
        self._value_dims[msg["name"]] = {
            dim: i for dim, i in ids.items() if n >= -dim and shape[dim] > 1
        }


# Without the block that silences warnings of torch.jit, which traces nothing here.
_enumerate = getattr(EnumMessenger._pyro_sample, "__wrapped__", EnumMessenger._pyro_sample)
