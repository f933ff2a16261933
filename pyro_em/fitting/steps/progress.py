"""The progress bars of an exact fit: of its steps, and of a pass over data that are read."""

from __future__ import annotations

from tqdm.auto import tqdm


class Bar:
    """The progress bar: evidence per step, over all starts."""

    def __init__(
        self, progress: bool | None, max_steps: int, starts: int, objective_name: str
    ) -> None:
        self.bar: tqdm | None = None
        if progress is not False:
            disable = None if progress is None else False
            bar = tqdm(total=max_steps * starts, disable=disable, desc="EM", unit="step")
            self.bar = None if bar.disable else bar
        self.max_steps, self.starts, self.current = max_steps, starts, 0
        self.objective_name = objective_name
        self.label = ""

    def update(self, start: int, objective: float) -> None:
        """One more step of a start."""
        if self.bar is None:
            return
        if start != self.current:
            self.bar.n = start * self.max_steps
            self.current = start
        label = f"EM start {start + 1}/{self.starts}" if self.starts > 1 else "EM"
        label = self.label or label
        self.bar.set_description(label, refresh=False)
        self.bar.set_postfix_str(f"{self.objective_name} {objective:.6f}", refresh=False)
        self.bar.update()

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()


def bar_of_rows(progress: bool | None, total: int | None) -> tqdm:
    """A bar for one pass over data: rows per second, and the time that is left of it.

    Args:
        progress: Whether to show it; by default where the output is a terminal.
        total: The number of all rows, where it is known.
    """
    disable = None if progress is None else not progress
    return tqdm(
        total=total, disable=disable, desc="rows", unit=" rows", unit_scale=True, leave=False
    )
