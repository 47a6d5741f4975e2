"""Tables: records as one flat row a metric, published tables in the same shape, CSV, Parquet and JSON files of both."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mariotte.errors import StoreError
from mariotte.store.base import record_order
from mariotte.store.record import Record, canonical_json

if TYPE_CHECKING:
    from pandas import DataFrame

PUBLISHED = (
    "source",
    "model",
    "params_b",
    "method",
    "ratio",
    "ratio_kind",
    "recovery_tokens",
    "metric",
    "base_value",
    "value",
    "stderr",
    "bits",
    "protocol",
    "note",
)
"""Columns of a table of published numbers, one row a number; see `read_table`."""

REQUIRED = ("model", "method", "ratio", "metric", "base_value", "value")
"""Columns without which a row says nothing."""

_NUMBERS = ("params_b", "ratio", "base_value", "value", "stderr", "bits")
SUFFIXES = (".csv", ".parquet", ".json")
"""What the name of a table's file ends in."""

_NESTED = ("metrics", "base", "details", "steps", "cost", "environment", "protocol")
_SCALARS = tuple(f.name for f in dataclasses.fields(Record) if f.name not in _NESTED)
_DERIVED = ("removed", "params_b", "ratio_kind", "protocol", "metric", "value", "base_value", "stderr")
RECORD_COLUMNS = (*_SCALARS, *_DERIVED)
"""Columns of `records_table`: the scalar fields of `Record`, then what is derived from the others."""

_RATIO_KIND = "parameters removed / dense parameters"


def records_table(records: Iterable[Record]) -> DataFrame:
    """Records as a flat table, one row a metric.

    Parameters
    ----------
    records : in any order; the rows are ordered by `record_order`, then by metric

    Returns
    -------
    columns `RECORD_COLUMNS`: every scalar field under its own name, and ``removed`` (`Record.removed`), ``params_b``
    (dense parameters, in 1e9), ``ratio_kind`` (what ``ratio`` is a share of, as in published tables), ``protocol``
    (canonical JSON), ``metric``, ``value``, ``base_value`` (of the dense model) and ``stderr`` (of the value: the
    metric ``<name>_se``, which has no row of its own). What is missing is None or NaN.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for record in sorted(records, key=record_order):
        shared = {name: getattr(record, name) for name in _SCALARS}
        shared |= {"removed": record.removed, "params_b": record.base_params / 1e9, "ratio_kind": _RATIO_KIND}
        shared["protocol"] = canonical_json(dict(record.protocol))
        for metric in sorted(record.metrics):
            if metric.endswith("_se") and metric.removesuffix("_se") in record.metrics:
                continue
            row = {"metric": metric, "value": record.metrics[metric], "base_value": record.base.get(metric)}
            rows.append(shared | row | {"stderr": record.metrics.get(f"{metric}_se")})
    table = pd.DataFrame(rows, columns=list(RECORD_COLUMNS))
    # A column of None alone has no type of its own, and Parquet files of two stores would not fit together.
    for name in ("amount", "obtained", "base_value", "stderr"):
        table[name] = table[name].astype("float64")
    for name in ("method", "family", "unit", "recovery"):
        table[name] = table[name].astype("string")
    return table


def read_table(path: str | Path) -> DataFrame:
    """A table of numbers, one row each: exported records, or a table of published results.

    Parameters
    ----------
    path : a .csv, .parquet or .json file with at least the columns `REQUIRED`. The other columns of a published table
        (`PUBLISHED`) are added, empty, where they are missing; more columns are kept. ``ratio`` is in ``ratio_kind``;
        ``recovery_tokens`` is a number, or a text such as ``50k samples`` where a paper does not state tokens;
        accuracies are fractions and perplexities as printed.

    Raises
    ------
    StoreError
        When the file is missing, empty, not a table, lacks a column, or has text where a number belongs.
    """
    import pandas as pd

    if "://" in str(path):
        raise StoreError(f"a table is a file on this machine, got the address {str(path)!r}: download it first")
    path = Path(path)
    _check_suffix(path)
    try:
        # Opened here and not by pandas, which would ask the network for a name such as http:/x.csv.
        if path.suffix.lower() == ".csv":
            with path.open("rb") as file:
                table = pd.read_csv(file)
        elif path.suffix.lower() == ".parquet":
            with path.open("rb") as file:
                table = pd.read_parquet(file)
        else:
            table = pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise StoreError(f"no table at {path}: check the path") from error
    except OSError as error:
        raise StoreError(f"table {path} cannot be read: {_reason(error)}; check the file") from error
    except (ValueError, TypeError) as error:  # what pandas, pyarrow and json raise for text that is no table
        if path.stat().st_size == 0:
            raise StoreError(f"table {path} is empty: it needs the columns {', '.join(REQUIRED)}") from error
        raise StoreError(
            f"{path} is not a {path.suffix[1:].upper()} table: {_reason(error)}; check the file"
        ) from error
    if missing := [name for name in REQUIRED if name not in table.columns]:
        raise StoreError(
            f"table {path} lacks the column {missing[0]!r}: it needs {', '.join(REQUIRED)}; add or rename it"
        )
    if table.empty:
        raise StoreError(f"table {path} has columns and no rows: add rows, or give another file")
    for name in PUBLISHED:
        if name not in table.columns:
            table[name] = float("nan")
        if name in _NUMBERS:
            table[name] = _numbers(table, name, path)
    return table


def _numbers(table: DataFrame, name: str, path: Path) -> Any:
    """A column as float64; a StoreError names the first row that is no number."""
    import pandas as pd

    column = cast("Any", table)[name]  # pandas' own types promise less than a column has
    numbers = cast("Any", pd).to_numeric(column, errors="coerce").astype("float64")
    wrong = (numbers.isna() & column.notna()).to_numpy().nonzero()[0].tolist()
    if wrong:
        value = column.iloc[wrong[0]]
        raise StoreError(f"row {wrong[0] + 1} of {path} has {name} {value!r}: it must be a number or empty; correct it")
    return numbers


def write_table(table: DataFrame, path: str | Path) -> None:
    """Write a table, in the format that the name ends in; a file that is there is replaced when the new one is whole.

    Parameters
    ----------
    table : rows are written in their order, so that equal tables give equal files
    path : ends in .csv, .parquet or .json (a list of objects, missing values as null)

    Raises
    ------
    StoreError
        When there are no rows, the name ends otherwise, or the folder is missing, read-only or full.
    """
    path = Path(path)
    _check_suffix(path)
    if table.empty:
        raise StoreError(f"nothing to write to {path}: the table has no rows; select more")
    try:
        # In the same folder: a rename within one file system is atomic.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise StoreError(f"table {path} cannot be written: {_reason(error)}; name another file") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            if path.suffix.lower() == ".csv":
                table.to_csv(file, index=False, lineterminator="\n", encoding="utf-8")
            elif path.suffix.lower() == ".parquet":
                table.to_parquet(file, index=False)
            else:
                rows = cast("list[dict[str, Any]]", table.astype(object).where(table.notna(), None).to_dict("records"))
                file.write((json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(
            f"table {path} cannot be written: {_reason(error)}; name another file or free space"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise StoreError(f"a table is a file ending in .csv, .parquet or .json, got {str(path)!r}: choose one of them")


def _reason(error: Exception) -> str:
    """What went wrong, in one line without the path, which the message has already."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


def _umask() -> int:
    mask = os.umask(0)  # there is no other way to ask
    os.umask(mask)
    return mask
