"""How long does the command line take to start? Help, and a fit of a law, against a bare interpreter.

    python benchmarks/startup.py

Prints the best of several runs of each: the machine's noise only ever adds. Goals: .5 s for help, 2 s for fit.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 7
COLUMNS = (
    "source",
    "model",
    "method",
    "ratio",
    "ratio_kind",
    "recovery_tokens",
    "metric",
    "base_value",
    "value",
    "protocol",
)


def best(command: list[str]) -> float:
    """Shortest wall time of a command over `RUNS` runs, seconds."""
    times: list[float] = []
    for _ in range(RUNS):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return min(times)


def write_table(path: Path) -> None:
    """A small table of made-up losses in the published layout, for timing alone."""
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS)
        rows.writeheader()
        for model in range(4):
            for step in range(1, 10):
                ratio = step / 10
                value = (2 + model / 10) * (1 - ratio) ** -0.3
                values = ["made up", f"m{model}", "width", ratio, "parameters", 0, "loss", 2 + model / 10, value, "p"]
                rows.writerow(dict(zip(COLUMNS, values, strict=True)))


def main() -> None:
    mariotte = [sys.executable, "-m", "mariotte"]
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        write_table(table)
        bare = best([sys.executable, "-c", "pass"])
        print(f"bare interpreter      {bare:.2f} s")
        for name, command, goal in (
            ("mariotte --help", [*mariotte, "--help"], 0.5),
            ("mariotte fit TABLE", [*mariotte, "fit", str(table)], 2.0),
        ):
            seconds = best(command)
            print(f"{name:<20}  {seconds:.2f} s  (goal {goal} s, {seconds / bare:.0f} times a bare interpreter)")


if __name__ == "__main__":
    main()
