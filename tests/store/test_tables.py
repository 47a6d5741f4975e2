from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from mariotte.errors import StoreError
from mariotte.store.tables import PUBLISHED, RECORD_COLUMNS, read_table, records_table, write_table
from mariotte.testing.stores import make_record

SHARED = Path(__file__).resolve().parents[3] / "shared" / "published"
SUFFIXES = ["csv", "parquet", "json"]


def rows(table: pd.DataFrame) -> list[dict[str, object]]:
    """Rows as JSON values, so that every kind of missing value is equal."""
    return json.loads(table.to_json(orient="records", double_precision=15))


def test_a_table_has_one_row_a_metric_with_its_dense_value() -> None:
    record = make_record(2, metrics={"top1": 0.5, "top1_se": 0.01, "extra": 3.0}, base={"top1": 0.9})
    table = records_table([record])
    assert list(table.columns) == list(RECORD_COLUMNS)
    found = {row["metric"]: (row["value"], row["base_value"], row["stderr"]) for row in rows(table)}
    assert found == {"top1": (0.5, 0.9, 0.01), "extra": (3.0, None, None)}
    (first, _) = rows(table)
    assert (first["id"], first["amount"], first["removed"]) == (record.id, 0.2, record.removed)
    assert json.loads(str(first["protocol"])) == record.protocol


def test_a_standard_error_without_its_metric_is_a_metric() -> None:
    assert rows(records_table([make_record(1, metrics={"lone_se": 1.0}, base={})]))[0]["metric"] == "lone_se"


def test_rows_do_not_depend_on_the_order_of_records() -> None:
    records = [make_record(n) for n in range(4)]
    pd.testing.assert_frame_equal(records_table(records), records_table(records[::-1]))


def test_no_records_make_a_table_without_rows() -> None:
    table = records_table([])
    assert table.empty
    assert list(table.columns) == list(RECORD_COLUMNS)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_written_is_read_back(tmp_path: Path, suffix: str) -> None:
    table = records_table([make_record(n) for n in range(4)])
    path = tmp_path / f"records.{suffix}"
    write_table(table, path)
    assert rows(read_table(path)[list(RECORD_COLUMNS)]) == rows(table)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_tables_give_equal_files(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for path in paths:
        write_table(records_table([make_record(n) for n in range(4)]), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_column_of_nothing_keeps_its_type_in_parquet(tmp_path: Path) -> None:
    for number in (0, 1):
        write_table(records_table([make_record(number)]), tmp_path / f"{number}.parquet")
    dense, pruned = (pd.read_parquet(tmp_path / f"{number}.parquet").dtypes for number in (0, 1))
    assert dense.equals(pruned)


def test_a_published_table_needs_six_columns_and_gets_the_others(tmp_path: Path) -> None:
    path = tmp_path / "paper.csv"
    path.write_text(
        "model,method,ratio,metric,base_value,value,recovery_tokens\nLlama,Wanda,0.5,ppl,,7.26,50k samples\n"
    )
    table = read_table(path)
    assert set(PUBLISHED) <= set(table.columns)
    assert table["value"].tolist() == [7.26]
    assert math.isnan(table["base_value"][0])
    assert table["recovery_tokens"][0] == "50k samples"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"published tables are not at {SHARED}")
def test_published_tables_are_read_with_all_their_rows() -> None:
    files = sorted(SHARED.glob("*.csv"))
    assert files
    for file in files:
        table = read_table(file)
        assert list(table.columns) == list(PUBLISHED)
        assert len(table) == len(pd.read_csv(file))
        assert table["value"].dtype == table["ratio"].dtype == "float64"


HEAD = "model,method,ratio,metric,base_value,value\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", b"", r"table .*t.csv is empty: it needs the columns model, method"),
        ("t.csv", HEAD.encode(), r"has columns and no rows: add rows"),
        ("t.csv", b"model,ratio\nx,0.5\n", r"lacks the column 'method': it needs model, method"),
        ("t.csv", f"{HEAD}m,w,half,loss,1,2\n".encode(), r"row 1 of .*t.csv has ratio 'half': it must be a number"),
        ("t.csv", b"\xff\xfe\x00\x01\n", r"is not a CSV table"),
        ("t.csv", b'a,b\n"1,2\n3,4,5,6\n', r"is not a CSV table"),
        ("t.parquet", b"nonsense", r"is not a PARQUET table"),
        ("t.json", b"[{", r"is not a JSON table"),
        ("t.json", b"3", r"is not a JSON table"),
        ("t.xls", b"x", r"a table is a file ending in .csv, .parquet or .json, got '.*t.xls'"),
    ],
)
def test_what_is_no_table_is_answered_in_one_sentence(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(StoreError, match=expected) as caught:
        read_table(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["http://none.invalid/t.csv", "s3://none/t.parquet", "file:///none/t.json"])
def test_an_address_is_no_table_and_asks_no_network(address: str) -> None:
    with pytest.raises(StoreError, match=r"a table is a file on this machine, got the address .*: download it first"):
        read_table(address)
    with pytest.raises(StoreError, match="no table at"):
        read_table(Path(address))


def test_a_missing_table_and_a_folder_are_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no table at .*none.csv: check the path"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(StoreError, match=r"folder.csv cannot be read"):
        read_table(tmp_path / "folder.csv")


def test_writing_refuses_what_could_not_be_read_back(tmp_path: Path) -> None:
    table = records_table([make_record(1)])
    for path in ("records.xls", "records"):
        with pytest.raises(StoreError, match=r"ending in .csv, .parquet or .json"):
            write_table(table, tmp_path / path)
    with pytest.raises(StoreError, match="the table has no rows"):
        write_table(table[:0], tmp_path / "none.csv")
    with pytest.raises(StoreError, match="No such file or directory"):
        write_table(table, tmp_path / "no" / "records.csv")
    assert list(tmp_path.iterdir()) == []


WRITE_WITHOUT_ROOM = """
import resource, signal, sys
from mariotte.errors import StoreError
from mariotte.store.tables import records_table, write_table
from mariotte.testing.stores import make_record
table = records_table([make_record(n) for n in range(50)])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_table(table, sys.argv[1])
except StoreError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="this system has no limit on file sizes")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_write_that_fails_in_the_middle_leaves_the_old_file(tmp_path: Path, suffix: str) -> None:
    """A limit on the size of files stands for a full disk."""
    path = tmp_path / f"old.{suffix}"
    path.write_text("as it was")
    found = subprocess.run(
        [sys.executable, "-c", WRITE_WITHOUT_ROOM, str(path)], capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(f"table {path} cannot be written: File too large")
    assert path.read_text() == "as it was"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
