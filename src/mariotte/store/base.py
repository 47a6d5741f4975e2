"""The contract of a store: where records are kept, whoever writes them and whatever happens to the writer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, final

from mariotte.errors import StoreError
from mariotte.store.record import Failure, Record

SHORTEST_PREFIX = 4
"""Characters of an id below which a prefix says too little to be meant."""


def record_order(record: Record) -> tuple[Any, ...]:
    """The key by which stores and tables order records: by content, never by when they were written.

    The dense model comes first, then methods by name and amounts by size, so that a table reads well; the id is last,
    so that no two records tie and a resumed study prints what an uninterrupted one would.
    """
    return (
        record.study,
        record.model,
        record.method or "",
        -1.0 if record.amount is None else record.amount,
        record.recovery or "",
        record.recovery_tokens,
        record.chain,
        record.seed,
        record.measure,
        record.id,
    )


class Claims(ABC):
    """Locks by which several processes share the work of a study, each on a part of it that has a name.

    A claim is held until it is given back, or its holder is gone, however it went. It is a context manager, which gives
    back everything.
    """

    @abstractmethod
    def take(self, part: str) -> bool:
        """Claim a part of the study; False, at once, when another process holds it.

        Raises
        ------
        StoreError
            When the store cannot be reached.
        """

    @abstractmethod
    def give_back(self, part: str) -> None:
        """Let others claim a part that this process holds.

        Raises
        ------
        StoreError
            When the store cannot be reached: the claims are gone with the connection.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back all that is held; closing twice is harmless."""

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Store(ABC):
    """Records, failures and runs, kept for good.

    What every store promises:

    * **Who writes.** Any number of processes may read and write at once, on one machine for SQLite; each opens the
      store itself, and no `Store` is handed to another process.
    * **What is final.** A record is never changed or removed. Failures may be cleared, and a later failure of the same
      stage of the same experiment takes the place of the earlier one. A run is written once, when it ends.
    * **Adding again is harmless.** A record whose id is there with an equal `Record.result_hash` is left as it is:
      timings, environment and the study that asked may differ. Other results under the same id are refused.
    * **All or nothing.** What one call adds is there completely or not at all, also after the writer is killed, the
      machine loses power or the disk is full.
    * **Nothing damaged is returned.** Every record is checked against the hash that was stored beside it.
    * **Order.** Lists come in an order that depends on their content alone (`record_order`).

    Everything that goes wrong outside (a missing folder, a full disk, a lock, a damaged file) is a `StoreError` of one
    sentence that names the store. A store is a context manager, which closes it.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Where the store is, as messages call it; never with a password."""

    @abstractmethod
    def add(self, records: Sequence[Record]) -> int:
        """Add records in one transaction.

        Parameters
        ----------
        records : any number; those that are there already, with equal results, are left as they are

        Returns
        -------
        how many were new

        Raises
        ------
        StoreError
            When a record's id is there with other results (nothing is added then), or the store cannot be written.
        """

    @abstractmethod
    def share(self, study: str, ids: Iterable[str]) -> None:
        """Make records that another study added records of this one too: asking for a study finds all it wanted.

        Parameters
        ----------
        study : its name
        ids : of records; those of its own records, which `add` shares, do no harm
        """

    @abstractmethod
    def records(
        self,
        *,
        study: str | None = None,
        model: str | None = None,
        chain: str | None = None,
        measure: str | None = None,
        experiment: str | None = None,
        method: str | None = None,
        seed: int | None = None,
    ) -> list[Record]:
        """The records that agree with everything given, ordered by `record_order`.

        Parameters
        ----------
        measure : the canonical text (``loss:testbed/all(block=64)``), or its name alone (``loss``)
        study : a study that added or shared them; None for any
        model, chain, experiment, method, seed : exactly as in the record; None for any

        Raises
        ------
        StoreError
            When the store cannot be read or a record does not match its hash.
        """

    @abstractmethod
    def find(self, prefix: str) -> list[Record]:
        """The records whose id, or whose experiment's id, starts with `prefix`, ordered by `record_order`."""

    @abstractmethod
    def ids(self, *, study: str | None = None) -> set[str]:
        """Ids of all records (of one study): what a rerun need not do again. Reads no record's body."""

    @abstractmethod
    def add_failure(self, failure: Failure) -> None:
        """Store a failure, in place of an earlier one of the same study, experiment and stage."""

    @abstractmethod
    def failures(self, *, study: str | None = None, experiment: str | None = None) -> list[Failure]:
        """Failures not cleared, ordered by study, model, chain, seed and stage."""

    @abstractmethod
    def clear_failures(self, *, study: str | None = None, experiment: str | None = None) -> int:
        """Remove failures (of one study, of one experiment, or all) and return how many there were."""

    @abstractmethod
    def add_run(self, run: Mapping[str, Any]) -> None:
        """Store what one invocation of ``mariotte run`` did, when it ends.

        Parameters
        ----------
        run : JSON values; ``study`` (name), ``toml`` (the study's text), ``started`` and ``finished`` (UTC, ISO 8601),
            ``counters``, ``environment``, ``cost``; more keys are kept
        """

    @abstractmethod
    def runs(self, *, study: str | None = None) -> list[dict[str, Any]]:
        """All runs (of one study) as `add_run` got them, in the order in which they were added."""

    def claims(self, study: str) -> Claims | None:
        """Locks by which several processes share a study; None for a store where only one may run it at a time."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give back connections; closing twice is harmless."""

    @final
    def get(self, key: str) -> Record:
        """The one record whose id is `key` or starts with it.

        Parameters
        ----------
        key : an id, or at least 4 characters of its beginning

        Raises
        ------
        StoreError
            When no record or more than one is meant.
        """
        if len(key) < SHORTEST_PREFIX:
            raise StoreError(f"an id needs at least {SHORTEST_PREFIX} characters of its beginning, got {key!r}")
        found = [record for record in self.find(key) if record.id.startswith(key)]
        exact = [record for record in found if record.id == key]
        if len(exact or found) == 1:
            return (exact or found)[0]
        if not found:
            raise StoreError(
                f"no record of {self.name} has an id starting with {key!r}; `mariotte ls` lists what it holds"
            )
        shown = ", ".join(record.id[: len(key) + 6] for record in found[:3])
        raise StoreError(
            f"{len(found)} records of {self.name} have an id starting with {key!r} ({shown} ...): give more characters"
        )

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
