"""Experiments on a Ray cluster: every branch of the study's tree is a task that asks for processors and GPUs."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, cast

import mariotte
from mariotte.errors import MariotteError, StudyError
from mariotte.experiments.branches import WAIT_S, Branches
from mariotte.experiments.pipeline import Held, Outcome, Task
from mariotte.experiments.work import Said, Work, add, narrate
from mariotte.models.step import Counters

__all__ = ["check_answers", "on_ray"]

TRIES = 3
"""How often workers may die at an experiment before it fails: a node that goes takes innocent ones with it."""

ANSWER_S = 5.0
"""How long a cluster may take to answer its address; one that is there takes milliseconds."""

PATIENCE_S = 60.0
"""How long a cluster may be without room for a single branch, as when its only node is being replaced."""

_ORPHAN_S = 60.0
"""How long the worker of a driver that died may hold a branch; Ray ends it as soon as it misses the driver."""

_OBJECTS_BYTES = 128 * 2**20
"""Ray's shared memory on a cluster of our own: only records come back, and Ray would take a third of the machine."""

_BREATH_S = 0.002
"""How long a worker waits for more to tell: what it says together costs the driver one answer instead of several."""

_held: dict[str, Held] = {}
"""Of a worker, which Ray uses again for the next task: the present run's model; between runs its files may change."""


def _package() -> Any:
    """Ray itself, told to keep quiet and to send nothing home.

    Raises
    ------
    StudyError
        When it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Of tasks without GPUs Ray would hide those that are there, and announce that it soon will not any more.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise StudyError(
            f"the runner ray needs the package {error.name}, which is not installed: pip install 'mariotte[ray]'"
        ) from error


def check_answers(address: str) -> None:
    """See that something at `address` answers as Ray's head does, which Ray itself would try for two minutes.

    Raises
    ------
    StudyError
        When nothing does.
    """
    advice = "start one with `ray start --head`, or leave the address out for a cluster of this machine alone"
    if "://" in address:
        raise StudyError(
            f"a Ray cluster's address is HOST:PORT or auto, got {address!r}: run this on a node of the cluster, which "
            f"`ray start --address=HOST:PORT --num-cpus=0` makes of this machine"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise StudyError(f"a Ray cluster's address is HOST:PORT, such as 10.0.0.1:6379, or auto, got {address!r}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S) as line:
            # Ray speaks gRPC, so HTTP/2, where each side begins with its settings: a frame of type 4.
            line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
            head = line.recv(9)
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise StudyError(f"no Ray cluster answers at {address} within {ANSWER_S:g} s ({reason}): {advice}") from error
    if len(head) < 4 or head[3] != 4:
        raise StudyError(f"what answers at {address} is no Ray cluster: {advice}")


def _environment() -> dict[str, str]:
    """Variables that workers must agree with this process on, without anything secret."""
    named = ("MARIOTTE_", "HF_", "OMP_WAIT_POLICY")
    return {name: value for name, value in os.environ.items() if name.startswith(named) and "TOKEN" not in name}


@contextmanager
def _connected(address: str | None, cpus: float, gpus: float, workers: int | None) -> Generator[Any]:
    """Ray, connected to the cluster at `address`, or to one of this machine alone that ends with the block.

    Raises
    ------
    StudyError
        When Ray is not installed or there is no such cluster.
    """
    ray = _package()
    if ray.is_initialized():  # by whoever called us, and theirs to end
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": {"env_vars": _environment()}}
    try:
        if address == "local":
            here = os.cpu_count() or 1
            ray.init(
                address="local",
                num_cpus=max(1, round(workers * cpus) if workers else here),
                include_dashboard=False,
                object_store_memory=_OBJECTS_BYTES,
                **({"num_gpus": round(workers * gpus)} if workers and gpus else {}),
                **quiet,
            )
        else:
            if address != "auto":
                check_answers(address)
            ray.init(address=address, **quiet)
    except MariotteError:
        raise
    except (Exception, SystemExit) as error:  # Ray leaves the process when a cluster goes in the middle of its answer
        said = " ".join(str(error).split())[:300]
        raise StudyError(f"the Ray cluster {address} cannot be used: {said}; see `ray status`") from error
    # What Ray says of a worker that died goes to standard output, where --json is; we say it ourselves.
    ray._private.worker._worker_logs_enabled = False
    try:
        yield ray
    finally:
        ray._private.worker._worker_logs_enabled = True
        ray.shutdown()


@contextmanager
def _alone(folder: Path, branch: str) -> Generator[None]:
    """Hold a branch's preparations on this node: the worker of a driver that was killed may not be gone yet.

    Raises
    ------
    StudyError
        When the folder cannot be made here, or another worker keeps holding it.
    """
    file = folder / f".{branch[:16]}.lock"
    until = time.monotonic() + _ORPHAN_S
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = file.open("w")
    except OSError as error:
        raise StudyError(
            f"node {socket.gethostname()} cannot keep its work in {folder} ({error.strerror}): name with --work a "
            "folder that every node can make"
        ) from error
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise StudyError(
                        f"another process holds {file} for over {_ORPHAN_S:g} s: end the other run of this study first"
                    ) from None
                time.sleep(WAIT_S)
        yield


def _branch(task: Task, run: str, home: str, version: str) -> Iterator[list[Said]]:
    """In a worker: do a task and yield what there is to tell, as `narrate` says, while it is being done.

    Parameters
    ----------
    run : tells the runs of one driver from one another
    home, version : the folder that the driver works in, and the Mariotte that it is
    """
    if run not in _held:
        _held.clear()
    held = _held.setdefault(run, Held())
    told: SimpleQueue[Said | None] = SimpleQueue()
    # Names of models and files are as the driver's folder has them, where this node has that folder.
    with contextlib.suppress(OSError):
        os.chdir(home)

    def labour() -> None:
        try:
            if version != mariotte.__version__:
                raise StudyError(
                    f"this run is Mariotte {version}'s, and node {socket.gethostname()} has {mariotte.__version__}: "
                    "install the same version on every node"
                )
            with _alone(task.work, task.branch):
                narrate(task, told.put, held)
        except MariotteError as error:
            told.put(("error", error))
        finally:
            told.put(None)

    # In a thread of its own, so that what is told in the middle of the work is on its way before the work ends.
    threading.Thread(target=labour, daemon=True).start()
    end = False
    while not end:
        said = [told.get()]
        time.sleep(_BREATH_S)
        with contextlib.suppress(Empty):
            while True:
                said.append(told.get_nowait())
        end = said[-1] is None
        yield [one for one in said if one is not None]


def _room(nodes: Sequence[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """How many branches the nodes of a cluster have room for, each on one node, with nothing else there."""
    wanted = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    alive = [cast("Mapping[str, float]", node["Resources"]) for node in nodes if node["Alive"]]
    return sum(min(int(has.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items()) for has in alive)


def on_ray(
    branches: Branches,
    counters: Counters,
    progress: Callable[[str, float], None],
    *,
    cpus: float = 1,
    gpus: float = 0,
    address: str | None = None,
    workers: int | None = None,
) -> Iterator[Outcome]:
    """Perform tasks on a Ray cluster and yield every outcome as soon as it is there.

    Workers never touch the store: what they find comes back experiment by experiment, while their tasks go on, and the
    caller adds it. A worker or a node that dies costs what it was at, and another goes on with the rest of its task; an
    experiment at which workers die three times fails.

    Parameters
    ----------
    cpus, gpus : that each task asks for
    address : of a cluster that runs; None takes the environment's ``RAY_ADDRESS``, and without it a cluster of this
        machine alone, which ends with the run. A connection that this process has already is used as it is
    workers : tasks that such a cluster of this machine does at once; None for as many as there are processors

    Raises
    ------
    MariotteError
        When Ray is not installed, the cluster does not answer or has no room for a task; what a worker raised.
    """
    with _connected(address, cpus, gpus, workers) as ray:
        # Tried again by us and not by Ray, which would do everything anew that was told already.
        asked: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0, "num_returns": "streaming"}
        remote = ray.remote(**asked)(_branch)
        told = (uuid.uuid4().hex, str(Path.cwd()), mariotte.__version__)
        running: list[tuple[Any, Work]] = []
        deaths: Counter[tuple[str, str]] = Counter()
        room, looked, had_room = 0, 0.0, time.monotonic()
        try:
            while running or branches:
                if (moment := time.monotonic()) - looked > WAIT_S:
                    room, looked = _room(ray.nodes(), cpus, gpus), moment
                    had_room = moment if room else had_room
                    if moment - had_room > (PATIENCE_S if running or deaths else 0):
                        raise StudyError(
                            f"no node of the Ray cluster has {cpus:g} CPUs{f' and {gpus:g} GPUs' if gpus else ''}: "
                            "ask for less with --cpus and --gpus, or add a node that has them"
                        )
                while len(running) < room and (task := branches.take()):
                    running.append((remote.remote(task, *told), Work(task)))
                if not running:
                    progress("waiting for other processes", 0.0)
                    time.sleep(WAIT_S)
                    continue
                ready, _ = ray.wait([stream for stream, _ in running], num_returns=1, timeout=WAIT_S)
                for stream in ready:
                    place = next(place for place, (other, _) in enumerate(running) if other is stream)
                    work = running[place][1]
                    task = work.task
                    assert task is not None, "what runs has a task"
                    try:
                        said = _next(ray, stream)
                    except _DiedError as error:
                        del running[place]
                        add(counters, work.counters)
                        blamed = work.blamed()
                        deaths.update((task.branch, served.experiment) for served in blamed)
                        given_up = tuple(s for s in blamed if deaths[task.branch, s.experiment] >= TRIES)
                        rest, lost = work.left(f"{error}, {TRIES} times", given_up)
                        yield from lost
                        progress(f"{error}; another goes on", 0.0)
                        if rest is not None:
                            branches.put_back(rest)
                        else:
                            branches.finished(task)
                        continue
                    if said is None:
                        del running[place]
                        branches.finished(task)
                        continue
                    for one in said:
                        if outcome := work.hear(one, counters, progress):
                            yield outcome
        finally:
            for stream, _ in running:
                with contextlib.suppress(ray.exceptions.RayError):  # of a cluster that is gone, tasks and all
                    ray.cancel(stream, force=True)


class _DiedError(Exception):
    """A worker, or its node, is gone."""


def _next(ray: Any, stream: Any) -> list[Said] | None:
    """What a task says next, None at its end.

    Raises
    ------
    _DiedError
        When its worker is gone, in words for a failure.
    MariotteError
        When the cluster cannot run the task at all.
    """
    errors = ray.exceptions
    try:
        return cast("list[Said]", ray.get(next(stream)))
    except StopIteration:
        return None
    except errors.OutOfMemoryError as error:
        raise _DiedError(
            "the node was out of memory, and Ray killed the worker: ask for more --cpus a branch"
        ) from error
    except (
        errors.WorkerCrashedError,
        errors.NodeDiedError,
        errors.LocalRayletDiedError,
        errors.ObjectLostError,
    ) as error:
        raise _DiedError(f"the worker that was at this died ({type(error).__name__})") from error
    except errors.RayTaskError as error:
        if isinstance(getattr(error, "cause", None), ModuleNotFoundError):
            raise StudyError(
                f"workers of the Ray cluster cannot import {error.cause.name}: install Mariotte {mariotte.__version__} "
                f"and Python {sys.version.split()[0]} on every node"
            ) from error
        raise
    except (errors.RuntimeEnvSetupError, errors.TaskUnschedulableError) as error:
        raise StudyError(f"the Ray cluster cannot run a branch: {' '.join(str(error).split())[:300]}") from error
