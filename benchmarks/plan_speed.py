"""How long `mariotte plan` takes, and what it imports: seconds of a fresh process, and of the parts within one."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

MODEL = "testbed/qwen2-1m"
HEAVY = ("torch", "transformers", "pandas", "altair", "pyarrow", "scipy")
INSIDE = f"""
import sys, time
began = time.perf_counter()
import mariotte
from mariotte.plan import planner, read_budget
imported = time.perf_counter()
budget = read_budget(max_loss="+5%", bytes="60%", recovery_tokens="64k")
known = planner({MODEL!r}, budget)
learned = time.perf_counter()
found = known.plan()
done = time.perf_counter()
heavy = sorted(set({HEAVY!r}) & set(sys.modules))
print(imported - began, learned - imported, done - learned, len(found.options), ",".join(heavy) or "none")
"""


def main(repeat: int = 5) -> None:
    words = [sys.executable, "-m", "mariotte", "plan", MODEL, "--max-loss", "+5%", "--bytes", "60%", "--recover", "64k"]
    whole: list[float] = []
    for _ in range(repeat):
        began = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        whole.append(time.perf_counter() - began)
    runs = [
        subprocess.run([sys.executable, "-c", INSIDE], check=True, capture_output=True, text=True).stdout.split()
        for _ in range(repeat)
    ]
    print(f"`mariotte plan`, a fresh process: {statistics.median(whole):.2f} s (least {min(whole):.2f} s)")
    for place, part in enumerate(("imports", "reading and learning", "planning")):
        print(f"  {part}: {statistics.median(float(run[place]) for run in runs):.2f} s")
    print(f"  {runs[0][3]} options; of {', '.join(HEAVY)} imported: {runs[0][4]}")


if __name__ == "__main__":
    main()
