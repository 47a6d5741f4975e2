"""What work on one model is expected to take, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mariotte.cli.console import duration

if TYPE_CHECKING:
    from mariotte.experiments.estimate import Preflight


def expected(takes: Preflight) -> str:
    """What a run is expected to take, and why it is streamed or not."""

    def size(n_bytes: int) -> str:
        return f"{n_bytes / 1e9:.2f} GB"

    free = "" if takes.free_bytes is None else f", of {size(takes.free_bytes)} that are free"
    other = takes.whole_bytes if takes.streamed else takes.streamed_bytes
    said = [
        f"{'streamed block by block' if takes.streamed else 'loaded whole'}: expected peak of memory "
        f"{size(takes.peak_bytes)} beside the program's {size(takes.program_bytes)}{free}",
        f"{'loaded whole' if takes.streamed else 'streamed'} {size(other)}"
        if takes.streamed or not takes.cannot_stream
        else takes.cannot_stream,
        f"calibration {takes.calibration_tokens:,} tokens" if takes.calibration_tokens else f"{takes.tokens:,} tokens",
        f"scratch on disk {size(takes.scratch_bytes)}",
        "time unknown, as the device is not here" if takes.seconds is None else f"time {duration(takes.seconds)}",
    ]
    return "; ".join(said) + " (a factor of two either way)"
