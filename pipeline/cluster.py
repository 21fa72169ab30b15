"""Workers on a Ray cluster: started, given units, watched, replaced when they die. Called by the stages' executors.

Every worker is an actor with a model of its own. It is made of plain values (the recipe as JSON), writes its results
itself, and answers with `Outcome`s, so no weight and no result passes through Ray. What is handed out, and what is
tried again, is decided by `handout`. Only this module imports ray.
"""

import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from cache_schema.errors import CacheError
from pipeline import stopping
from pipeline.errors import RunError, UserError, first_line
from pipeline.handout import Handout, Outcome, Unit
from pipeline.recipe import Recipe

_POLL_S = 0.5
_LOOK_AGAIN_S = 2.0  # at units that others have claimed
_NO_WORKER_S = 600.0  # without a place for a single worker; loading a model may take as long as it likes
_OBJECT_STORE_BYTES = 100 * 2**20  # of a cluster made here: nothing large passes through it


class Worker(Protocol):
    """What runs on the cluster. Its class must be importable there, its constructor cheap."""

    def start(self) -> str:
        """Load what is needed; "" or what is wrong. The worker is then given nothing."""
        ...

    def work(self, unit: Unit, ours: bool, extra: Any) -> list[Outcome]:
        """Do a unit; what became of it and of those before it, so far as it is known. See `Handout`."""
        ...

    def finish(self) -> list[Outcome]:
        """What became of all units, once it is known."""
        ...

    def progress(self) -> dict[Unit, int]:
        """How far the units are whose outcome is not told; called while the others run, `start` too."""
        ...


def started(folder: str, load: Callable[[], None]) -> str:
    """What `Worker.start` answers of a load, with relative paths beginning at the driver's folder."""
    with suppress(OSError):  # a machine without that folder serves a recipe without relative paths
        os.chdir(folder)
    try:
        load()
    except (UserError, CacheError) as error:
        return f"on {socket.gethostname()}: {error}"
    except Exception:
        return f"on {socket.gethostname()}: {traceback.format_exc()}"
    return ""


@dataclass
class _Slot:
    """One worker, and the one that takes its place when it dies. doing: the call in progress, start, work or finish.
    placed: it has answered, so it has a place on the cluster. refused: what was wrong at its start."""

    number: int
    actor: Any = None
    doing: str = ""
    call: Any = None
    placed: bool = False
    refused: str = ""
    poll: Any = None
    progress: dict[Unit, int] = field(default_factory=dict)


class Cluster:
    """A context: a connection to a cluster, and the workers there.

    gpus: of one worker; None: all of a machine's. Raises RunError where Ray is missing or no cluster can be reached.
    """

    def __init__(self, recipe: Recipe, worker: type, arguments: tuple[Any, ...], gpus: int | None = 1) -> None:
        self._runtime, self._worker, self._arguments, self._gpus = recipe.runtime, worker, arguments, gpus
        self._ray: Any = None
        self._connected = False
        self._slots: list[_Slot] = []
        self._options: dict[str, Any] = {}

    def __enter__(self) -> "Cluster":
        self._ray, self._connected = connect(self._runtime.executor)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        count, self._options = placement(nodes, self._runtime.device, self._runtime.workers, self._gpus)
        print(f"{count} workers on a Ray cluster of {len(nodes)} machines, each with {self._options}", flush=True)
        self._slots = [_Slot(number) for number in range(count)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slot in self._slots:
            if slot.actor is not None:
                with suppress(self._ray.exceptions.RayError, ConnectionError):  # the cluster itself may be gone
                    self._ray.kill(slot.actor)
        if self._connected:
            self._ray.shutdown()

    def run(
        self,
        handout: Handout,
        missing: Callable[[], Collection[Unit]],
        size: Callable[[Unit], int],
        show: Callable[[int], None],
        extra: Callable[[Unit], Any] = lambda unit: None,
    ) -> None:
        """Have the units done, until each is, or has failed, or there is nobody left to try it.

        missing: the units that are not done, by whomever. size: of a unit, in what `show` and `progress` count. extra:
        what a worker must know of a unit beside its name. Raises RunError for what concerns all units.
        """
        for slot in self._slots:
            if slot.refused:  # in an earlier run: it has loaded nothing
                handout.give_up(slot.number, slot.refused)
        try:
            with stopping.deferred("what the workers have in work is done"):
                self._run(handout, missing, size, show, extra)
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            raise RunError(
                f"runtime.executor is {self._runtime.executor}: the Ray cluster was lost: {first_line(error)}; see "
                "that it runs (`ray status` there) and run the same command: what was finished is kept"
            ) from None
        if not handout.done and len(handout.given_up) == len(self._slots) and not handout.failures:
            raise RunError(f"none of {len(self._slots)} workers could start; worker 0: {handout.given_up[0]}")

    def _run(
        self,
        handout: Handout,
        missing: Callable[[], Collection[Unit]],
        size: Callable[[Unit], int],
        show: Callable[[int], None],
        extra: Callable[[Unit], Any],
    ) -> None:
        looked = last_placed = time.monotonic()
        while not handout.over({slot.number for slot in self._slots}):
            if stopping.requested() and not any(handout.of(slot.number) for slot in self._slots):
                return
            self._hand_out(handout, extra)
            calls = {slot.call: slot for slot in self._slots if slot.call is not None}
            if not calls:
                time.sleep(_POLL_S)
            for call in self._ray.wait(list(calls), num_returns=1, timeout=_POLL_S)[0] if calls else []:
                self._returned(calls[call], handout, missing)
            now = time.monotonic()
            if any(slot.placed and slot.number not in handout.given_up for slot in self._slots):
                last_placed = now
            elif now - last_placed > _NO_WORKER_S:
                raise RunError(self._no_place(handout))
            if handout.taken and now - looked > _LOOK_AGAIN_S:
                handout.offer_again(missing())
                looked = now
            self._poll()
            show(handout.size_done(size) + self._in_progress(handout))

    def _no_place(self, handout: Handout) -> str:
        given_up = [f"; worker {number} was given no more work: {why}" for number, why in handout.given_up.items()]
        return (
            f"runtime.executor is {self._runtime.executor}: no worker could start in {_NO_WORKER_S:.0f} s; expected "
            f"room for {self._options} (see `ray status`); --set runtime.workers=N for smaller ones{''.join(given_up)}"
        )

    def _hand_out(self, handout: Handout, extra: Callable[[Unit], Any]) -> None:
        """Something to do for every worker that does nothing."""
        for slot in self._slots:
            if slot.call is not None or slot.number in handout.given_up:
                continue
            if stopping.requested():
                if handout.of(slot.number):
                    slot.doing, slot.call = "finish", slot.actor.finish.remote()
            elif slot.actor is None:
                settings = {"max_restarts": 0, "max_concurrency": 2, "scheduling_strategy": "SPREAD"}
                slot.actor = self._ray.remote(**self._options, **settings)(self._worker).remote(*self._arguments)
                slot.doing, slot.call = "start", slot.actor.start.remote()
            elif not handout.suspect(slot.number) and (unit := handout.next(slot.number)) is not None:
                slot.doing, slot.call = "work", slot.actor.work.remote(unit, unit in handout.ours, extra(unit))
            elif handout.of(slot.number):
                slot.doing, slot.call = "finish", slot.actor.finish.remote()

    def _returned(self, slot: _Slot, handout: Handout, missing: Callable[[], Collection[Unit]]) -> None:
        """Take down what a call came to."""
        errors, call, slot.call = self._ray.exceptions, slot.call, None
        try:
            result = self._ray.get(call)
        except errors.RayTaskError as error:  # an error that the worker did not expect: a bug
            handout.give_up(slot.number, first_line(error.cause if error.cause is not None else error))
            self._lost(slot, handout, missing, str(error))
        except errors.RayError as error:
            self._lost(slot, handout, missing, first_line(error))
        else:
            if slot.doing == "start":
                slot.placed, slot.refused = True, result
                if result:
                    handout.give_up(slot.number, result)
                return
            alone = len(handout.given_up) >= len(self._slots) - 1
            for outcome in result:
                if outcome.state == "stop":
                    raise RunError(outcome.reason)
                handout.settle(slot.number, outcome, alone)

    def _lost(self, slot: _Slot, handout: Handout, missing: Callable[[], Collection[Unit]], why: str) -> None:
        units = ", ".join(map(str, handout.of(slot.number))) or "nothing"
        handout.lost(slot.number, why, missing())
        print(f"worker {slot.number} died with {units} in work: {why}", flush=True)
        self._ray.kill(slot.actor)
        slot.actor, slot.poll, slot.progress, slot.placed = None, None, {}, False

    def _poll(self) -> None:
        """Ask every worker how far it is, and one that starts whether it has a place. Waits for no answer."""
        for slot in self._slots:
            if slot.actor is None or slot.doing not in (("work",) if slot.placed else ("start",)):
                continue
            if slot.poll is None:
                slot.poll = slot.actor.progress.remote()
            elif self._ray.wait([slot.poll], timeout=0)[0]:
                poll, slot.poll = slot.poll, None
                try:
                    slot.progress, slot.placed = self._ray.get(poll), True
                except self._ray.exceptions.RayError:
                    slot.progress = {}  # its death will show in its call

    def _in_progress(self, handout: Handout) -> int:
        return sum(slot.progress.get(unit, 0) for slot in self._slots for unit in handout.of(slot.number))


def connect(executor: str) -> tuple[Any, bool]:
    """(the ray module, whether the connection is ours to close). Raises RunError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its new behaviour, and no warning of the old one
    try:
        import ray
    except ImportError:
        raise RunError(
            f"runtime.executor is {executor}, but Ray is not installed here; pip install 'logitbank[ray]', or work in "
            "this process: --executor local"
        ) from None
    if ray.is_initialized():
        return ray, False
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    on_term = signal.getsignal(signal.SIGTERM)  # which Ray replaces
    try:
        if executor != "ray":
            ray.init(executor, **quiet)
        elif found := _cluster_here():
            ray.init(found, **quiet)
        else:
            ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        where = executor if executor != "ray" else os.environ.get("RAY_ADDRESS", "this machine")
        text = " ".join(str(error).split())
        text = text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
        raise RunError(
            f"runtime.executor is {executor}: no connection to the Ray cluster at {where}: {text}; see that it runs "
            "(`ray status` there) with this release of Ray, or work in this process: --executor local"
        ) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_term)
    return ray, True


def _cluster_here() -> str | None:
    """The address in RAY_ADDRESS, or that of `ray start` on this machine; None where there is neither.

    Asked for "auto", Ray would take any cluster that runs here: another program's, which ends when that does. And where
    nobody answers it ends the process after a while, so that is looked at here. Raises ConnectionError.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        if address.count(":") == 1 and not _answers(address):
            raise ConnectionError("nobody answers there")
        return address
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 (Ray's own default)
    with suppress(OSError):
        address = (Path(folder) / "ray" / "ray_current_cluster").read_text(encoding="utf-8").strip()
        return address if _answers(address) else None  # what is left of one that was killed
    return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def placement(
    nodes: list[dict[str, float]], device: str, workers: int | None, gpus: int | None
) -> tuple[int, dict[str, float]]:
    """(how many workers, the resources of one). nodes: the resources of each machine.

    With GPUs a worker takes `gpus` of them. Without any it takes a whole machine, since torch spreads a batch over all
    cores and every worker holds a model of its own; `workers` divides the cores instead.
    """
    cores = [int(node.get("CPU", 0)) for node in nodes]
    if device != "cpu" and (found := [int(node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1]):
        each = min(found) if gpus is None else gpus
        return workers or max(1, sum(count // each for count in found)), {"num_cpus": 1, "num_gpus": each}
    count = workers or len(nodes)
    return count, {"num_cpus": max(1, min([c for c in cores if c] or [1]) if workers is None else sum(cores) // count)}
