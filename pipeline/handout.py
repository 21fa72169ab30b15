"""Who works at what, and what became of it: the bookkeeping of every executor. Called by stage 1, stage 3, `cluster`.

A unit is a shard of stage 1 or a condition of stage 3; a worker is this process or an actor on a cluster. An error in
one unit is kept with its reason and the other units go on; a worker of which the last few units failed alike has
something wrong of its own and gets no more. Nothing here runs anything, so its rules are tested without a cluster.
"""

import re
import traceback
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

Unit = int | str
SAME_IN_A_ROW = 3  # failures of a worker: as many say that it is the worker, the disk or the recipe
DEATHS = 3  # of workers at one unit, or of one worker without anything done in between: then no more are tried


class Outcome(NamedTuple):
    """What became of a unit, as a worker tells it.

    state: done; failed, for `reason`; taken by somebody else, so far as one can tell; or stop, where `reason` concerns
    every unit. kind: what two failures must share to count as the same.
    """

    unit: Unit
    state: Literal["done", "failed", "taken", "stop"]
    reason: str = ""
    kind: str = ""


def failed(unit: Unit, error: BaseException) -> Outcome:
    """The outcome of an exception: its text with the notes that were left on it."""
    text = str(error).strip() or type(error).__name__
    if not type(error).__module__.startswith(("pipeline", "cache_schema", "stage")):
        *_, last = traceback.extract_tb(error.__traceback__) or [None]
        text = f"{type(error).__name__}: {text}" + (f" (at {Path(last.filename).name}:{last.lineno})" if last else "")
    notes = getattr(error, "__notes__", [])
    return Outcome(unit, "failed", "; ".join([text, *notes]), type(error).__name__ + re.sub(r"\d+", "#", str(error)))


class Handout:
    """The units of one run, in the order they are handed out."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self._waiting: deque[Unit] = deque(units)
        self._in_work: dict[Unit, int] = {}
        self._taken: list[Unit] = []
        self._reasons: dict[Unit, str] = {}
        self._tried: dict[Unit, set[int]] = {}
        self._row: dict[int, list[Outcome]] = {}
        self._deaths: Counter[Unit] = Counter()
        self._deaths_in_a_row: Counter[int] = Counter()
        self.done: list[Unit] = []
        self._summed = 0, 0  # how many of these are in the sum of their sizes, and the sum
        self.ours: set[Unit] = set()
        self.given_up: dict[int, str] = {}

    # -- handing out

    def next(self, worker: int) -> Unit | None:
        """A unit for this worker, None where there is none for it now."""
        if worker in self.given_up:
            return None
        unit = next((u for u in self._waiting if worker not in self._tried.get(u, ())), None)
        if unit is not None:
            self._waiting.remove(unit)
            self._in_work[unit] = worker
        return unit

    def of(self, worker: int) -> list[Unit]:
        """The units in this worker's hands."""
        return [unit for unit, holder in self._in_work.items() if holder == worker]

    def suspect(self, worker: int) -> bool:
        """Whether to have this worker finish what it has before it gets more: a unit that it has, or the next one, has
        seen a worker die, and no other unit shall be lost with it again."""
        mine = self.of(worker)
        following = [self._waiting[0]] if self._waiting else []
        return bool(mine) and any(self._deaths[unit] for unit in [*mine, *following])

    @property
    def waiting(self) -> list[Unit]:
        """Units that nobody works at."""
        return list(self._waiting)

    @property
    def taken(self) -> list[Unit]:
        """Units that others have claimed."""
        return list(self._taken)

    def over(self, workers: Collection[int]) -> bool:
        """Whether nothing is in work or claimed by others, and none of these workers could be given anything."""
        left = set(workers) - self.given_up.keys()
        takeable = any(left - self._tried.get(unit, set()) for unit in self._waiting)
        return not (self._in_work or self._taken or takeable)

    def narrow(self, missing: Collection[Unit]) -> None:
        """Do not hand out what others have done: `missing` are the units that nobody has."""
        self.done += [unit for unit in self._waiting if unit not in missing]
        self._waiting = deque(unit for unit in self._waiting if unit in missing)

    def offer_again(self, missing: Collection[Unit]) -> None:
        """Hand out what others had claimed, unless they have done it: `missing` are the units that nobody has."""
        self.done += [unit for unit in self._taken if unit not in missing]
        self._waiting += [unit for unit in self._taken if unit in missing]
        self._taken = []

    def size_done(self, size: Callable[[Unit], int]) -> int:
        """The sum of the sizes of what is done; each is added once, since it is asked for after every batch."""
        count, total = self._summed
        total += sum(map(size, self.done[count:]))
        self._summed = len(self.done), total
        return total

    # -- what became of it

    def settle(self, worker: int, outcome: Outcome, alone: bool = True) -> None:
        """Take down an outcome. alone: no other worker could try what this one fails at.

        Raises nothing for `stop`, which is the caller's to raise.
        """
        if self._in_work.pop(outcome.unit, None) is None:
            return
        if outcome.state == "taken":
            self._taken.append(outcome.unit)
        elif outcome.state == "done":
            self.done.append(outcome.unit)
            self._reasons.pop(outcome.unit, None)
            self._row[worker] = []
            self._deaths_in_a_row[worker] = 0
        else:
            self._fail(worker, outcome, alone)

    def _fail(self, worker: int, outcome: Outcome, alone: bool) -> None:
        self._reasons[outcome.unit] = outcome.reason
        self._tried.setdefault(outcome.unit, set()).add(worker)
        row = self._row.setdefault(worker, [])
        if row and row[-1].kind != outcome.kind:
            row.clear()
        row.append(outcome)
        if len(row) == SAME_IN_A_ROW:
            self.give_up(worker, f"{SAME_IN_A_ROW} in a row failed alike: {outcome.reason}")
            if not alone:  # it may have been the worker: let another try them
                self._waiting.extend(failure.unit for failure in row)

    def give_up(self, worker: int, why: str) -> None:
        """This worker gets nothing more."""
        self.given_up[worker] = why

    def lost(self, worker: int, why: str, missing: Collection[Unit]) -> None:
        """The worker died. What it had in work is handed out again, next, unless it had been finished."""
        for unit in reversed(self.of(worker)):
            del self._in_work[unit]
            if unit not in missing:
                self.done.append(unit)
                continue
            self._deaths[unit] += 1
            self.ours.add(unit)
            if self._deaths[unit] == DEATHS:
                self._reasons[unit] = f"{DEATHS} workers died at it, the last one of: {why}"
            else:
                self._waiting.appendleft(unit)
        self._deaths_in_a_row[worker] += 1
        if self._deaths_in_a_row[worker] == DEATHS:
            self.give_up(worker, f"it died {DEATHS} times without finishing anything, at last of: {why}")

    # -- the end

    @property
    def failures(self) -> dict[Unit, str]:
        """Unit -> why, of those that failed at last. Read it at the end: another worker may still mend one."""
        return dict(sorted(self._reasons.items(), key=lambda item: str(item[0]).zfill(12)))

    @property
    def untried(self) -> list[Unit]:
        """What nobody was left to try."""
        return [unit for unit in self._waiting if unit not in self._reasons]

    def report(self, name: Callable[[Unit], str]) -> list[str]:
        """Lines for the end: what failed and why, and what was not tried. Equal reasons are told once."""
        lines: list[str] = []
        told: dict[str, str] = {}
        for unit, reason in self.failures.items():
            same = told.setdefault(reason, name(unit))
            lines.append(f"{name(unit)} failed: {reason if same == name(unit) else 'as ' + same}")
        lines += [f"worker {worker} was given no more work: {why}" for worker, why in self.given_up.items()]
        if self.untried:
            lines.append(f"not tried: {', '.join(map(name, self.untried[:10]))}{', ...' * (len(self.untried) > 10)}")
        return lines
