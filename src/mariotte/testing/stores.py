"""What every store must do, as a test class: subclass it, say where a new store is, and run pytest."""

# ruff: noqa: D102  (the name of a test is its docstring)

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, cast

import pytest
from typing_extensions import override

from mariotte.errors import StoreError
from mariotte.store.base import Store, record_order
from mariotte.store.record import FORMAT, Failure, Record, digest
from mariotte.store.sql import open_store

TIMEOUT_S = 60.0
"""How long another process may take to start and write a few records; a slow machine needs several seconds."""


def make_record(number: int = 0, **changes: Any) -> Record:
    """A record for tests: equal numbers give equal records, and everything in it is made up.

    Parameters
    ----------
    number : says the amount (number tenths, 0 is the dense model) and, with `changes`, the ids
    changes : fields to replace
    """
    amount = number / 10
    fields: dict[str, Any] = {
        "study": "made-up",
        "model": "testbed/none",
        "model_type": "qwen2",
        "model_hash": digest("none"),
        "chain": f"width@{amount} | lora@4k" if number else "dense",
        "seed": 0,
        "measure": "loss:testbed/all(block=64)",
        "metrics": {"loss": 1.3 + amount, "bits_per_byte": 0.7 + amount},
        "base": {"loss": 1.3, "bits_per_byte": 0.7},
        "protocol": {"corpus": digest("corpus"), "block": 64},
        "n_params": 1000 - 10 * number,
        "n_params_non_embedding": 800 - 10 * number,
        "base_params": 1000,
        "n_bytes": 2000 - 20 * number,
        "flops_per_token": 2000.0 - 20 * number,
        "method": "width" if number else None,
        "family": "width" if number else None,
        "unit": "neurons" if number else None,
        "amount": amount if number else None,
        "obtained": amount if number else None,
        "ratio": number / 100,
        "recovery": "lora" if number else None,
        "recovery_tokens": 4000 if number else 0,
        "tokens_seen": 4096 if number else 0,
        "details": {"relations": {"born": {"known": 3, "asked": 4}}, "text": "naïve, « quoted »; 'x' \"y\" \\"},
        "steps": ({"name": "width", "layers": [1, 2]},) if number else (),
        "cost": {"load_s": 0.25},
        "environment": {"threads": 1},
        "created": "2026-01-01T00:00:00Z",
    }
    fields.update(changes)
    experiment = digest([fields["model"], fields["chain"], fields["seed"]])
    fields.setdefault("experiment", experiment)
    fields.setdefault("id", digest([fields["experiment"], fields["measure"]]))
    return Record(**fields)


def make_failure(number: int = 1, **changes: Any) -> Failure:
    """The failure of the experiment of `make_record` with the same number."""
    record = make_record(number)
    fields: dict[str, Any] = {
        "experiment": record.experiment,
        "study": record.study,
        "model": record.model,
        "chain": record.chain,
        "seed": record.seed,
        "stage": "apply width",
        "error": "widths must be multiples of 8, got 3",
        "traceback": "Traceback (most recent call last): ...",
        "created": "2026-01-01T00:00:00Z",
    }
    fields.update(changes)
    return Failure(**fields)


class _Stuck(Record):
    """A record whose writer stops in the middle of adding it: says so, then waits to be killed."""

    reached: Event

    @override
    def to_dict(self) -> dict[str, Any]:
        self.reached.set()
        time.sleep(TIMEOUT_S)
        raise AssertionError("nobody ended this process")


def _add_until_stuck(url: str, numbers: list[int], reached: Event) -> None:
    """Add records in one transaction, the last of which is never finished."""
    records = [make_record(number) for number in numbers]
    # The id that sorts last, so that the others are on their way to the store when the writer stops.
    fields: dict[str, Any] = {f.name: getattr(records[0], f.name) for f in dataclasses.fields(Record)}
    fields["id"] = "f" * 64
    stuck = _Stuck(**fields)
    object.__setattr__(stuck, "reached", reached)
    with open_store(url, create=True) as store:
        store.add([*records, stuck])


def _add_one_by_one(url: str, numbers: list[int], start: Event) -> None:
    """Open the store and add each record in its own transaction, when told to begin."""
    assert start.wait(TIMEOUT_S)
    with open_store(url, create=True) as store:
        for number in numbers:
            store.add([make_record(number)])


class StoreConformance:
    """The contract of `mariotte.store.base.Store`, as tests.

    A subclass says where a new store is (`new_url`) and how to reach behind its back (`damage`, `set_format`).
    """

    def new_url(self, tmp_path: Path) -> str:
        """URL of a store that does not exist yet, for `open_store`; another one for each `tmp_path`."""
        raise NotImplementedError

    def damage(self, url: str, record: Record) -> None:
        """Change one result inside the stored record, and nothing else."""
        raise NotImplementedError

    def set_format(self, url: str, number: int) -> None:
        """Make the store say that it is of this format."""
        raise NotImplementedError

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return self.new_url(tmp_path)

    def open(self, url: str, *, create: bool = True) -> Store:
        return open_store(url, create=create)

    def test_what_was_added_comes_back_equal(self, url: str) -> None:
        records = [make_record(n) for n in range(3)]
        with self.open(url) as store:
            assert store.add(records) == 3
        with self.open(url, create=False) as store:
            assert store.records() == records
            assert store.ids() == {record.id for record in records}
            assert [store.get(record.id) for record in records] == records
            assert [record.hash() for record in store.records()] == [record.hash() for record in records]

    def test_order_depends_on_content_alone(self, url: str) -> None:
        records = [make_record(n, seed=seed) for n in (10, 3, 0, 2) for seed in (1, 0)]
        with self.open(url) as store:
            for record in records:
                store.add([record])
            assert store.records() == sorted(records, key=record_order)
            assert [record.amount for record in store.records()][::2] == [None, 0.2, 0.3, 1.0]

    def test_nothing_is_found_in_an_empty_store(self, url: str) -> None:
        with self.open(url) as store:
            assert store.add([]) == 0
            assert (store.records(), store.ids(), store.failures(), store.runs()) == ([], set(), [], [])

    def test_records_are_selected_by_each_field(self, url: str) -> None:
        one = make_record(1)
        other = make_record(2, study="other", model="testbed/Other", measure="loss:x", method="slice", seed=7)
        with self.open(url) as store:
            store.add([one, other])
            for field in ("study", "model", "chain", "measure", "experiment", "method", "seed"):
                assert store.records(**{field: getattr(one, field)}) == [one], field
            assert store.records(study="other", seed=0) == []
            assert store.records(measure="loss") == store.records()
            assert store.records(measure="LOSS") == store.records(measure="los") == store.records(measure="%") == []
            assert store.ids(study="other") == {other.id}

    def test_a_prefix_is_enough_when_it_is_unique(self, url: str) -> None:
        one, other = make_record(1, id="abcd01", experiment="eeee1"), make_record(2, id="abcd02", experiment="eeee2")
        with self.open(url) as store:
            store.add([one, other])
            assert store.get("abcd01") == one
            assert store.find("eeee1") == [one]
            assert store.find("eeee") == [one, other]
            with pytest.raises(StoreError, match=r"2 records .* id starting with 'abcd'"):
                store.get("abcd")
            with pytest.raises(StoreError, match=r"no record .* starting with 'eeee1'"):
                store.get("eeee1")
            with pytest.raises(StoreError, match="at least 4 characters"):
                store.get("abc")

    def test_an_id_that_begins_another_is_found(self, url: str) -> None:
        one, other = make_record(1, id="abcd"), make_record(2, id="abcd02")
        with self.open(url) as store:
            store.add([one, other])
            assert store.get("abcd") == one

    def test_adding_twice_is_harmless(self, url: str) -> None:
        record = make_record(1)
        again = dataclasses.replace(record, cost={"load_s": 9.0}, environment={"threads": 8}, created="", study="later")
        with self.open(url) as store:
            assert store.add([record]) == 1
            assert store.add([record, again]) == 0
            assert store.records() == [record]

    def test_timings_may_differ_when_the_protocol_says_so(self, url: str) -> None:
        record = make_record(1, protocol={"repeatable": False})
        with self.open(url) as store:
            assert store.add([record, dataclasses.replace(record, metrics={"loss": 5.0})]) == 1
            assert store.records() == [record]

    def test_other_results_under_the_same_id_are_refused_with_everything_added_beside_them(self, url: str) -> None:
        record = make_record(1)
        other = dataclasses.replace(record, metrics={"loss": 5.0})
        with self.open(url) as store:
            store.add([record])
            with pytest.raises(StoreError) as caught:
                store.add([make_record(2), make_record(3), other])
            assert record.result_hash()[:12] in str(caught.value)
            assert other.result_hash()[:12] in str(caught.value)
            assert store.records() == [record]

    def test_failures_replace_one_another_and_can_be_cleared(self, url: str) -> None:
        with self.open(url) as store:
            store.add_failure(make_failure(2))
            store.add_failure(make_failure(1))
            store.add_failure(make_failure(1, error="again"))
            store.add_failure(make_failure(1, stage="measure loss", study="other"))
            found = [
                (failure.chain[:9], failure.stage, failure.error[:5]) for failure in store.failures(study="made-up")
            ]
            assert found == [("width@0.1", "apply width", "again"), ("width@0.2", "apply width", "width")]
            assert store.failures(experiment=make_failure(2).experiment) == [make_failure(2)]
            assert store.clear_failures(study="other") == 1
            assert store.clear_failures(experiment=make_failure(1).experiment) == 1
            assert store.clear_failures() == 1
            assert store.failures() == []

    def test_runs_come_back_in_the_order_they_were_added(self, url: str) -> None:
        runs = [{"study": name, "toml": 'name = "x"\n', "counters": {"done": n}} for n, name in enumerate("bab")]
        with self.open(url) as store:
            for run in runs:
                store.add_run(run)
            assert store.runs() == runs
            assert store.runs(study="b") == [runs[0], runs[2]]

    def test_closing_twice_is_harmless(self, url: str) -> None:
        store = self.open(url)
        store.close()
        store.close()

    def test_a_store_that_does_not_exist_is_not_made_by_reading(self, url: str) -> None:
        for _ in range(2):
            with pytest.raises(StoreError):
                self.open(url, create=False)

    def test_two_processes_add_the_same_and_different_records(self, url: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        start = spawn.Event()
        shares = [list(range(12)), list(range(6, 18))]
        writers = [spawn.Process(target=_add_one_by_one, args=(url, share, start)) for share in shares]
        for writer in writers:
            writer.start()
        start.set()
        for writer in writers:
            writer.join(TIMEOUT_S)
        assert [writer.exitcode for writer in writers] == [0, 0]
        with self.open(url, create=False) as store:
            assert store.records() == sorted((make_record(n) for n in range(18)), key=record_order)

    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
    def test_a_writer_killed_in_the_middle_leaves_nothing_of_its_transaction(self, url: str) -> None:
        with self.open(url) as store:
            store.add([make_record(1)])
        spawn = multiprocessing.get_context("spawn")
        reached = spawn.Event()
        writer = spawn.Process(target=_add_until_stuck, args=(url, list(range(2, 40)), reached))
        writer.start()
        assert reached.wait(TIMEOUT_S)
        with self.open(url, create=False) as store:
            assert store.records() == [make_record(1)]  # readers neither wait nor see half of it
        os.kill(cast("int", writer.pid), signal.SIGKILL)
        writer.join(TIMEOUT_S)
        with self.open(url) as store:
            assert store.records() == [make_record(1)]
            assert store.add([make_record(n) for n in range(3)]) == 2

    def test_a_damaged_record_is_never_returned(self, url: str) -> None:
        good, bad = make_record(1), make_record(2)
        with self.open(url) as store:
            store.add([good, bad])
        self.damage(url, bad)
        with self.open(url, create=False) as store:
            assert store.get(good.id) == good
            for read in (store.records, lambda: store.get(bad.id)):
                with pytest.raises(StoreError, match=f"{bad.id}.*does not match its hash.*restore"):
                    read()

    def test_a_newer_format_is_refused(self, url: str) -> None:
        self.open(url).close()
        self.set_format(url, 7)
        for create in (False, True):
            with pytest.raises(StoreError, match=f"has format 7 .*reads up to {FORMAT}: update mariotte"):
                self.open(url, create=create)
