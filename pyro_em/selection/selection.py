"""`Selection`: what the candidates reached, as a value that prints and draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pyro_em import html, plotting
from pyro_em.arguments import whole
from pyro_em.em import ExactPosteriorEM
from pyro_em.errors import UnknownNameError, UsageError, message
from pyro_em.fitting.results.ends import ends_in_words
from pyro_em.fitting.results.result import EMResult
from pyro_em.fitting.results.summary import as_frame
from pyro_em.fitting.results.table import Table
from pyro_em.globs import listed
from pyro_em.plan.fit_wishes import fit_wishes
from pyro_em.portable import Absent, Portable
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.resampling.bootstrap import bootstrap
from pyro_em.resampling.refits import BROKEN, EMPTY, Again
from pyro_em.selection.candidates import Key
from pyro_em.selection.criteria import criterion_of
from pyro_em.selection.fits import Fits
from pyro_em.selection.ratio import Ratio, ratio_of
from pyro_em.tracing.scopes import own_store
from pyro_em.tracing.turns import alone
from pyro_em.variational.drawn import DrawnPosterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = (
    "log_evidence",
    "num_free_parameters",
    "bic",
    "aic",
    "icl",
    "entropy",
    "held_out",
    "elbo",
    "status",
    "seconds",
)


@dataclass(frozen=True)
class Row:
    """What a selection says of one candidate; None where a number is not known.

    Attributes:
        key: The values of the keywords that vary.
        log_evidence: In nats.
        num_free_parameters: p.
        bic: −2 log evidence + p log N.
        aic: −2 log evidence + 2 p.
        icl: BIC + 2 entropy.
        entropy: Of the discrete latents, in nats: how clearly rows belong to their components.
        held_out: Log evidence of rows that were held out, each once, in nats; the bound where a guide
            draws.
        elbo: What the fit raised, in nats; None where it is the log evidence.
        status: Why the fit ended, in a word; "failed" where there is none.
        ends: Where its starts ended, in words.
        seconds: Of the fit to all rows.
        note: What a reader has to know; why it failed, if it failed.
    """

    key: Key
    log_evidence: float | None = None
    num_free_parameters: int | None = None
    bic: float | None = None
    aic: float | None = None
    icl: float | None = None
    entropy: float | None = None
    held_out: float | None = None
    elbo: float | None = None
    status: str = "failed"
    ends: str = ""
    seconds: float | None = None
    note: str = ""
    is_sound: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Selection(Portable):
    """What `select` found; prints as a table.

    Attributes:
        names: The keywords that vary.
        rows: A `Row` per candidate.
        criterion: By what ``best`` is chosen: a column of the table.
        n: N of BIC, and what it counts, in words.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    criterion: str
    n: str
    _results: Mapping[Key, EMResult]
    _states: Mapping[Key, Mapping[str, Any]]
    _fits: Fits

    def by(self, criterion: str) -> Selection:
        """The same, with ``best`` chosen by another criterion.

        Args:
            criterion: ``"bic"``, ``"aic"``, ``"icl"``, ``"held_out"``, ``"log_evidence"``, ``"elbo"``.

        Raises:
            UsageError: If there is no such criterion, or no candidate has it.
        """
        criterion_of(criterion)
        found = replace(self, criterion=criterion)
        _ = found.best_row
        return found

    @property
    def best_row(self) -> Row:
        """The row with the best criterion; candidates whose evidence is unbounded are left out."""
        criterion = criterion_of(self.criterion)
        known = [r for r in self.rows if r.is_sound and getattr(r, criterion.column) is not None]
        if not known:
            raise UsageError(
                message(
                    "select",
                    f"no candidate has a number '{self.criterion}'.",
                    "rows are held out where folds are asked for; criteria take a log evidence",
                    ["select(..., folds=5)", "choose by another: selection.by('bic')"],
                )
            )
        return max(known, key=lambda r: criterion.sign * getattr(r, criterion.column))

    @property
    def best(self) -> EMResult:
        """The fit of the best candidate."""
        return self[self.best_row.key]

    @property
    def best_em(self) -> ExactPosteriorEM:
        """The best model, at its fitted parameters; see `em`."""
        return self.em(self.best_row.key)

    def __getitem__(self, key: Any) -> EMResult:
        """The fit of one candidate: ``selection[3]``, or ``selection[3, "full"]``.

        Raises:
            UsageError: If there is no such candidate, or its fit failed.
        """
        key = self._key(key)
        result = self._results[key]
        if isinstance(self._fits, Absent):  # in a pickled copy
            return result
        again = self._again(key, self._fits.grid.made(key))
        posterior = partial(_posterior_of, self, key)
        return replace(result, _posterior=posterior, _bootstrap=partial(bootstrap, again))

    def em(self, key: Any) -> ExactPosteriorEM:
        """A candidate's model with its fitted parameters, ready for questions and for more steps.

        Its parameters are written into the param store when it is used first, as those of a file are
        that ``em.load`` reads; the store has to be free of parameters of another form by these names.

        Args:
            key: The candidate: ``3``, or ``(3, "full")``.

        Raises:
            UsageError: If there is no such candidate, or its fit failed.
        """
        key = self._key(key)
        em = self._fits.grid.made(key)
        em._session.pending = dict(self._states[key])
        return em

    def _again(self, key: Key, em: ExactPosteriorEM) -> Again:
        wishes = fit_wishes(**self._fits.wishes)
        return Again(em._session.request, em.num_particles, self._fits.data, {}, wishes)

    def _key(self, key: Any) -> Key:
        key = key if isinstance(key, tuple) else (key,)
        row = next((r for r in self.rows if r.key == key), None)
        shown = _in_words(self.names, key) if len(key) == len(self.names) else repr(key)
        if row is None:
            known = ", ".join(repr(r.key[0] if len(r.key) == 1 else r.key) for r in self.rows)
            what, first = f"{shown} is no candidate; these are: {known}.", self.rows[0].key
            fixes = [f"name one by the values of {listed(self.names)}: {first!r}"]
            raise UnknownNameError(message("selection", what, "", fixes if len(first) > 1 else []))
        if key not in self._results:
            raise UsageError(message("selection", f"{shown} has no fit.", row.note))
        return key

    def _completed(self, key: Any) -> tuple[Key, str]:
        """A candidate of which the first keyword alone may be given, and what was added, in words."""
        if isinstance(key, tuple) or len(self.names) == 1:
            return self._key(key), ""
        others = self.best_row.key[1:]
        added = _in_words(self.names[1:], others)
        return self._key((key, *others)), f"{added}: as in the best candidate by {self.criterion}."

    @alone("bootstrap_ratio")
    def bootstrap_ratio(
        self,
        key: Any,
        larger: Any = None,
        *,
        n: int = 99,
        num_restarts: int | None = None,
        processes: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Ratio:
        """Test a candidate against a larger one by a parametric bootstrap of their likelihood ratio.

            R = 2 (log p(x; θ̂_larger) − log p(x; θ̂)),    R*_b the same of x*_b ~ p(x; θ̂)
            p = (1 + #{b: R*_b ≥ R}) / (n + 1)

        Of a number of components K against K + 1 the ratio has no χ² distribution: under K components
        some parameters of the larger model are not identified.

        Args:
            key: The candidate that is taken as true: ``3``, or ``(3, "full")``. Of several keywords
                ``3`` is the first one's value; the others have those of the best candidate.
            larger: The one against it; by default the next value of the first keyword.
            n: Number of data sets B; 99 for a p-value of a hundredth at least.
            num_restarts: Starts of each fit, of which the first is at the fitted parameters; by default
                as many as in the selection. With fewer the ratios of the data sets are too small
                where the larger model has many maxima, and so is the p-value.
            processes: How many processes, forked from this one; None for this one alone. The numbers
                are the same to the bit.
            seed: Seed of data and starts.
            progress: Whether to show a bar; by default where the output is a terminal.

        Returns:
            The ratio, those of the data sets, and the p-value.

        Raises:
            UsageError: If there is no such candidate, or the data cannot be drawn from its model.

        Source: McLachlan (1987), "On bootstrapping the likelihood ratio test statistic for the number
        of components in a normal mixture".
        """
        key, note = self._completed(key)
        if larger is None:
            values = self._fits.grid.values[0]
            after = values.index(key[0]) + 1
            if after == len(values):
                raise UsageError(
                    message(
                        "bootstrap_ratio",
                        f"{_in_words(self.names, key)} has the last value of {self.names[0]}.",
                        "there is no candidate after it",
                        ["select among more values", "name the other one: larger="],
                    )
                )
            larger = (values[after], *key[1:])
        elif not isinstance(larger, tuple):
            larger = (larger, *key[1:])
        larger = self._key(larger)

        def fitted(k: Key) -> tuple[str, Again, EMResult]:
            again = self._again(k, self._fits.grid.made(k))
            return _in_words(self.names, k), again, self._results[k]

        pair = fitted(key), fitted(larger)
        if num_restarts is None:
            few, many = (len(self._results[k].starts) for k in (key, larger))
        else:
            few = many = whole("bootstrap_ratio", "num_restarts", num_restarts)
        found = ratio_of(*pair, n, (few, many), processes, seed, progress)
        return replace(found, note=note)

    def plot(self, criterion: str | None = None, ax: Axes | None = None) -> Axes:
        """Draw a criterion against the first keyword that is a number, a line for each of the others.

        Args:
            criterion: A column of the table; that of ``best`` where None.
            ax: Axes to draw on; new ones by default.

        Returns:
            The axes.
        """
        return plotting.selection(self, criterion_of(criterion or self.criterion), ax)

    # ------------------------------------------------------------------ showing

    @property
    def table(self) -> Any:
        """A row per candidate: a pandas DataFrame where pandas is installed, else a `Table`."""
        return as_frame(self._table())

    def _table(self) -> Table:
        columns = [c for c in _COLUMNS if any(getattr(r, c) is not None for r in self.rows)]
        rows = [(*(_number(getattr(r, c)) for c in columns), r.ends, r.note) for r in self.rows]
        index = tuple(r.key for r in self.rows)
        return Table(self.names, index, (*columns, "ends", "note"), tuple(rows), self._attrs())

    def _attrs(self) -> dict[str, Any]:
        try:
            best = _in_words(self.names, self.best_row.key)
        except UsageError:
            best = "none"
        return {f"best by {self.criterion}": best, "N": self.n}

    def __repr__(self) -> str:
        return f"Selection:\n{self}"

    def __str__(self) -> str:
        header, lines = self._lines()
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        out = [
            "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in [header, *lines]
        ]
        return "\n".join([*out, *self._words()])

    def _repr_html_(self) -> str:
        header, lines = self._lines()
        numbers = range(len(self.names), len(header))
        return html.whole(html.table(header, lines, numbers), html.line("\n".join(self._words())))

    def _lines(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        names = {"log_evidence": "log evidence", "num_free_parameters": "p", "held_out": "held out"}
        names |= {c: c.upper() for c in ("bic", "aic", "icl", "elbo")}
        columns = [c for c in _COLUMNS if any(getattr(r, c) is not None for r in self.rows)]
        header = ("", *self.names, *(names.get(c, c) for c in columns))
        try:
            best: Row | None = self.best_row
        except UsageError:
            best = None
        lines = [
            (
                "*" if r is best else "",
                *(str(k) for k in r.key),
                *(_shown(c, getattr(r, c)) for c in columns),
            )
            for r in self.rows
        ]
        return header, lines

    def _words(self) -> list[str]:
        found = [f"{name}: {value}" for name, value in self._attrs().items()]
        found[0] = "* " + found[0]
        for r in self.rows:
            if r.note:
                found.append(f"{_in_words(self.names, r.key)}: {r.note}")
        return found


def row_of(
    key: Key, result: EMResult | None, entropy: float | None, held_out: float | None, note: str
) -> Row:
    """The row of a candidate.

    Args:
        key: The candidate.
        result: Its fit; None where that failed.
        entropy: Of its discrete latents.
        held_out: Log evidence of rows that were held out.
        note: What there is to say.
    """
    if result is None:
        return Row(key, note=note)
    bic, sound = result.bic, result.status not in BROKEN
    return Row(
        key,
        result.log_evidence,
        result.num_free_parameters,
        bic,
        result.aic,
        None if bic is None or entropy is None else bic + 2 * entropy,
        entropy,
        held_out,
        None if result.elbo == result.log_evidence else result.elbo,
        "converged" if result.converged else result.status.name.lower().replace("_", " "),
        ends_in_words(result.ends) if result.ends else "",
        result.seconds,
        note if sound else " ".join([result.message.partition("\n")[0], note]).strip(),
        sound,
    )


def _posterior_of(selection: Selection, key: Key) -> Posterior | DrawnPosterior:
    with own_store(EMPTY):
        found: Posterior | DrawnPosterior = selection.em(key).posterior(*selection._fits.data)
        return found


def _in_words(names: tuple[str, ...], key: Key) -> str:
    return ", ".join(f"{n}={v}" for n, v in zip(names, key, strict=True))


def _number(value: Any) -> Any:
    return float("nan") if value is None else value


def _shown(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if column == "seconds" else f"{value:.3f}"
    return str(value)
