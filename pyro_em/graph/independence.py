"""The graph of a model: which site's density uses the value of which, and what follows from it.

Edges run from a site to every site whose distribution uses its returned value. ``pyro.factor`` sites
are nodes of kind ``"factor"``: a clique potential couples all its parents, whatever is known.

Source: Lauritzen (1996), "Graphical Models", for separation in the moral graph of the ancestral set.
"""

from __future__ import annotations

from collections.abc import Iterable

import networkx

from pyro_em.errors import UsageError, message


class ModelGraph(networkx.DiGraph):
    """A ``networkx.DiGraph`` over the sites of a model, with questions about independence.

    Nodes carry ``observed``, ``partly`` (observed under an ``obs_mask``), ``kind`` (``"site"`` or
    ``"factor"``) and ``plates`` (names).

    Example:
        >>> graph = ModelGraph()
        >>> graph.add_edges_from([("cloudy", "rain"), ("cloudy", "sprinkler"),
        ...                       ("rain", "wet"), ("sprinkler", "wet")])
        >>> sorted(graph.markov_blanket("rain"))
        ['cloudy', 'sprinkler', 'wet']
        >>> graph.is_separated("rain", "sprinkler", ["cloudy"])
        True
        >>> graph.is_separated("rain", "sprinkler", ["cloudy", "wet"])
        False
    """

    def _factors(self) -> set[str]:
        return {n for n, kind in self.nodes(data="kind") if kind == "factor"}

    def markov_blanket(self, site: str) -> set[str]:
        """The sites given which a site is independent of all others.

        Its parents, its children and their other parents; neighbours in a clique for a
        ``pyro.factor`` field.

        Args:
            site: Its name.

        Raises:
            UsageError: If there is no such site.
        """
        self._require([site])
        blanket = set(self.predecessors(site))
        for child in self.successors(site):
            blanket |= {child, *self.predecessors(child)}
        return blanket - {site} - self._factors()

    def is_separated(self, a: str, b: str, given: Iterable[str] = ()) -> bool:
        """Whether the graph implies that two sites are independent given others.

        Args:
            a: One site.
            b: Another.
            given: Sites whose values are known.

        Raises:
            UsageError: If a name is unknown, or ``a`` or ``b`` is among ``given``.
        """
        known = {given} if isinstance(given, str) else set(given)
        self._require([a, b, *known])
        if a == b or {a, b} & known:
            raise UsageError(
                message(
                    "is_separated",
                    f"'{a}' and '{b}' must differ, and be outside given={sorted(known)}.",
                    fixes=["name two other sites"],
                )
            )
        factors = self._factors()
        relevant = {a, b} | known | factors
        for site in tuple(relevant):
            relevant |= networkx.ancestors(self, site)
        moral = networkx.Graph(networkx.DiGraph(self.subgraph(relevant)).to_undirected())
        for site in relevant:
            parents = list(self.predecessors(site))
            moral.add_edges_from((p, q) for i, p in enumerate(parents) for q in parents[i + 1 :])
        moral.remove_nodes_from(known | factors)
        return not networkx.has_path(moral, a, b)

    def _require(self, names: Iterable[str]) -> None:
        unknown = [n for n in names if n not in self]
        if unknown:
            shown = ", ".join(f"'{n}'" for n in list(self.nodes)[:12])
            raise UsageError(
                message(
                    f"site '{unknown[0]}'",
                    f"the model's graph has no such site; it has: {shown}.",
                    fixes=["use a site's name in the model"],
                )
            )
