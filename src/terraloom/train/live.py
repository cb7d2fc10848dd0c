"""What a running training shows: a line in the log, and a table of its epochs that grows.

The table has a row per epoch and task and can be plotted while the training runs::

    dvc plots show work/train/fold-0-member-0.csv -x epoch -y loss

It is made from the history that the checkpoint holds, so a training that was killed and goes on
has all its epochs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from terraloom.io import write_text
from terraloom.log import get_logger
from terraloom.tables import csv_text
from terraloom.train.checkpoint import Progress

__all__ = ["Live", "epoch_table"]

log = get_logger(__name__)


def epoch_table(
    history: Mapping[str, Sequence[float]], scores: Sequence[float], per_epoch: float
) -> str:
    """CSV with ``epoch``, ``step``, ``task``, ``loss`` and ``score`` of the epochs so far.

    Args:
        history: Loss per task and step, NaN without a label.
        scores: Score of the fold of early stopping per epoch; may be empty.
        per_epoch: Steps of an epoch (count, may be a fraction).

    Returns:
        The mean loss of each epoch, the last of which may be short; a cell without a number is
        empty.
    """
    rows = []
    for task, values in history.items():
        for epoch in range(math.ceil(len(values) / per_epoch)):
            start, stop = round(epoch * per_epoch), round((epoch + 1) * per_epoch)
            seen = [v for v in values[start:stop] if math.isfinite(v)]
            loss = f"{sum(seen) / len(seen):.6g}" if seen else ""
            score = f"{scores[epoch]:.6g}" if epoch < len(scores) else ""
            rows.append((epoch + 1, min(stop, len(values)), task, loss, score))
    return csv_text(("epoch", "step", "task", "loss", "score"), rows)


@dataclass
class Live:
    """Shows how far a training is, at most every few seconds and at its end.

    Attributes:
        path: The table; None: log only.
        every_s: Least time between two looks, seconds.
    """

    path: Path | None = None
    every_s: float = 10.0
    _first: tuple[float, int] | None = None
    _last: float = field(default_factory=time.monotonic)

    def tell(self, now: Progress, per_epoch: float, steps: int) -> None:
        """Called after each step.

        Args:
            now: Where the training stands.
            per_epoch: Steps of an epoch (count, may be a fraction).
            steps: Steps of the whole training (count).
        """
        clock = time.monotonic()
        if self._first is None:
            self._first = (clock, now.step)
        over = now.step >= steps or now.ended
        if not over and clock - self._last < self.every_s:
            return
        self._last = clock
        since, done = clock - self._first[0], now.step - self._first[1]
        left = (
            f", about {since / done * (steps - now.step):.0f} s left" if done and not over else ""
        )
        recent = max(1, round(per_epoch))
        means = {k: [v for v in h[-recent:] if math.isfinite(v)] for k, h in now.history.items()}
        losses = ", ".join(f"{k} {sum(v) / len(v):.4g}" for k, v in means.items() if v)
        score = f"; score {now.scores[-1]:.4f}" if now.scores else ""
        log.info("step %d of %d, epoch %.1f: loss of the last epoch %s%s%s", now.step, steps,
                 now.step / per_epoch, losses or "unknown", score, left)  # fmt: skip
        if self.path is not None:
            write_text(self.path, epoch_table(now.history, now.scores, per_epoch))
