"""Which records of the testbed ship with the planner: writes src/mariotte/plan/testbed.csv from the studies' tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mariotte.plan.pool import METRICS, Entry, parted, protocol_of, write_shipped
from mariotte.store.tables import read_table

STUDIES = Path(__file__).resolve().parent.parent / "studies" / "testbed"


def entries(name: str) -> list[Entry]:
    table = read_table(STUDIES / f"{name}.parquet")
    kept = table[table["metric"].isin(METRICS)]
    found: list[Entry] = []
    for row in kept.astype(object).where(kept.notna(), None).to_dict("records"):
        parts = None if row["chain"] == "dense" else parted(row["chain"])
        if row["base_value"] is None or (row["chain"] != "dense" and parts is None):
            continue
        protocol: dict[str, Any] = json.loads(row["protocol"])
        chance = next((v for k, v in protocol.items() if k == f"chance_{row['metric']}"), None)
        found.append(
            Entry(
                model=row["model"],
                family=row["model_type"],
                params=float(row["base_params"]),
                chain=row["chain"],
                obtained=float(row["obtained"] or 0.0),
                n_params=float(row["n_params"]),
                n_bytes=float(row["n_bytes"]),
                metric=row["metric"],
                measure=row["measure"],
                protocol=protocol_of(row["measure"], protocol),
                base=float(row["base_value"]),
                value=float(row["value"]),
                se=row["stderr"],
                chance=chance,
            )
        )
    return found


def main() -> None:
    found = [entry for name in ("pruning-laws", "compression-laws", "recovery") for entry in entries(name)]
    decoders = {entry.model for entry in found}
    quantized = [
        entry
        for entry in entries("cost-of-compression")
        if entry.model in decoders
        and (entry.dense or ((parts := parted(entry.chain)) and parts.quantizer.startswith("rtn")))
    ]
    print(f"{write_shipped(found + [e for e in quantized if ':' not in e.chain])} rows")


if __name__ == "__main__":
    main()
