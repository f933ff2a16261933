"""The progress bar of an exact fit."""

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
            self.bar = tqdm(total=max_steps * starts, disable=disable, desc="EM", unit="step")
        self.max_steps, self.starts, self.current = max_steps, starts, 0
        self.objective_name = objective_name
        self.label = ""

    def update(self, start: int, objective: float) -> None:
        """One more step of a start."""
        if self.bar is None or self.bar.disable:
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
