"""Progress of long work on stderr: a line per stage, and on a terminal a bar with the best result so far and the time
left."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """Counts steps over all stages. `total_steps` is the estimate that the time left is computed from."""

    def __init__(self, total_steps: int, quiet: bool = False) -> None:
        self.quiet, self.total_steps, self.started = quiet, total_steps, time.monotonic()
        self._stage, self._stage_started, self._seconds = "preparation", self.started, dict[str, float]()
        self._best: tuple[str, float] | None = None
        self._bar = tqdm(
            total=total_steps,
            file=sys.stderr,
            disable=quiet or not sys.stderr.isatty(),
            leave=False,
            bar_format="{desc:<13}{percentage:3.0f}%|{bar:30}| {elapsed} so far, about {remaining} left{postfix}",
        )

    def stage(self, name: str) -> None:
        """The name of what is being done, beside the bar."""
        self._seconds = self.stage_seconds
        self._stage, self._stage_started = name, time.monotonic()
        self.label(name)

    def label(self, text: str) -> None:
        """What the stage is at, in its name's place."""
        self._bar.set_description_str(text[:13])

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Wall time by stage so far, those that came again (for another budget) summed."""
        now = self._seconds.get(self._stage, 0.0) + time.monotonic() - self._stage_started
        return {**self._seconds, self._stage: now}

    def best(self, measure: str, loss: float) -> None:
        """A result; the lowest of a split's so far is shown beside the bar."""
        if self._best is None or self._best[0] != measure or loss < self._best[1]:
            self._best = (measure, loss)
            self._bar.set_postfix_str(f"best {measure} {loss:.3f}")

    def step(self, count: int = 1) -> None:
        # an estimate that turns out low must not show more than all
        self._bar.update(min(count, max(0, self.total_steps - 1 - self._bar.n)) if not self._bar.disable else 0)

    def say(self, line: str) -> None:
        """A line of results, with the time it came at."""
        if not self.quiet:
            self.warn(line)

    def warn(self, line: str) -> None:
        """A line that a quiet run prints too."""
        self._bar.clear()
        print(f"[{time.monotonic() - self.started:5.0f} s] {line}", file=sys.stderr, flush=True)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()
