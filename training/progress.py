"""Says how a training goes: epoch, step, loss, rate, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

_EVERY_S = 20.0


class Progress(TrainerCallback):
    """A line now and then, and one for every time that the student is judged.

    Args:
        say: receives the lines.
        every_s: seconds between two lines.
    """

    def __init__(self, say: Callable[[str], None] = print, every_s: float = _EVERY_S) -> None:
        self._say, self._every_s = say, every_s
        self._said = self._started = 0.0
        self._first_step = 0
        self._losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock."""
        self._started = self._said = time.monotonic()
        self._first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **passed: Any) -> None:
        """Says where it stands, when it is time to."""
        if not state.is_world_process_zero:
            return
        self._losses.append(control.last_loss)  # which DistillationTrainer puts there
        now = time.monotonic()
        if now - self._said < self._every_s and state.global_step < state.max_steps:
            return
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        steps_per_s = done / (now - self._started)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        loss = sum(self._losses) / len(self._losses)
        self._say(
            f"epoch {state.epoch:.2f}/{args.num_train_epochs:g}  step {state.global_step:,}/"
            f"{state.max_steps:,}  loss {loss:.4g}  {steps_per_s * batch:.0f} clips/s  "
            f"{duration(left / steps_per_s)} left"
        )
        self._said, self._losses = now, []

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any
    ) -> None:
        """Says how the student did."""
        if not state.is_world_process_zero:
            return
        self._say(
            f"epoch {state.epoch:.2f}  held out: loss {metrics['eval_loss']:.4g}, "
            f"mAP {metrics['eval_mAP']:.3f} (micro), {metrics['eval_macro_map']:.3f} (macro), "
            f"F1 {metrics['eval_f1']:.3f}"
        )


def duration(seconds: float) -> str:
    """`1 h 05 min`, `12 min`, `40 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
