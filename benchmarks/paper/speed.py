"""Table 4, speed: from rows that a GPU run recorded, never from a CPU.

Read is what `benchmarks/gpu.sh` leaves of its end-to-end table; rows of a CPU, and those that failed, are left out.
"""

from __future__ import annotations

import csv
from pathlib import Path

RECORDED = "gpu_end_to_end.csv"
COLUMNS = ("gpu", "model", "batch", "what", "mode", "bytes_per_row", "tokens_per_s", "commit")
PAPER = """\
## Table 4: speed

**The paper:** Mistral-7B-v0.2, snapkv + KIVI on an A100, tokens/s at batch 64, 96, 128, MB per sequence, LongBench,
needles: 128@16: 634.9 1460.1 1658.8, 18, 35.24, 81.16; 256@8: 575.9 1250.8 1389.5, 19.1, 38.98, 89.83; 512@4: 554.8
1317.6 1482.8, 20.2, 40.3, 93.28. So 4 bit is some 10 % slower than 16 at equal nominal bytes, which are 12 % more in
truth."""


def speed_table(results: Path) -> str:
    """The section, with what was recorded or "not run"."""
    path = results / RECORDED
    rows = _rows(path) if path.exists() else []
    if not rows:
        return f"{PAPER}\n\n**not run**: no GPU's rows are recorded as benchmarks/results/{RECORDED}."
    lines = ["| " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(row[name] for name in COLUMNS) + " |" for row in rows]
    return f"{PAPER}\n\n" + "\n".join(lines)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row.get("tokens_per_s") and "CPU" not in row["gpu"]]
