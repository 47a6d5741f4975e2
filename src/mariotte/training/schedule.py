"""Learning-rate schedules: a factor for each step, between 0 and 1."""

from __future__ import annotations

from dataclasses import dataclass

from mariotte.errors import MariotteError


@dataclass(frozen=True, kw_only=True)
class ConstantThenLinear:
    """Warm up, stay constant, then fall linearly to zero.

    The constant part does not depend on the length of the run, so that one trunk, trained at a constant
    rate, can be decayed from any of its states: a run to step 100 that decays over its last 20 steps is the
    trunk's state at step 80 followed by 20 steps of ``ConstantThenLinear(steps=100, decay=20)``.

    Parameters
    ----------
    steps : length of the whole run
    decay : how many of the last steps fall; 0 never falls
    warmup : how many of the first steps rise linearly; where the fall begins before the rise ends, the lower one counts
    """

    steps: int
    decay: int = 0
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.decay < 0 or self.warmup < 0:
            raise MariotteError(
                f"a schedule needs steps >= 1, decay >= 0 and warmup >= 0, got steps={self.steps}, "
                f"decay={self.decay}, warmup={self.warmup}"
            )
        if self.decay > self.steps:
            raise MariotteError(
                f"the decay must fit into the run, got {self.decay} of {self.steps} steps; shorten it or train longer"
            )

    def __call__(self, step: int) -> float:
        """Factor of the learning rate at a step counted from 0; positive inside the run, 0 after a decay."""
        rise = (step + 1) / self.warmup if step < self.warmup else 1.0
        if self.decay == 0:
            return rise
        # +1: the last step of the run still moves, by a 1/decay share, instead of being computed for nothing.
        return min(rise, max(0.0, (self.steps - step) / (self.decay + 1)))
