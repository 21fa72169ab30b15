"""When a run on a cluster ends, and what it says: the real `Cluster`, on a toy in Ray's place that runs everything in
this process and never gives some actors a place."""

import time
from types import SimpleNamespace

import pytest

from pipeline import cluster as cluster_module
from pipeline import stopping
from pipeline.cluster import Cluster
from pipeline.errors import RunError
from pipeline.handout import Handout, Outcome
from pipeline.recipe import load_recipe


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class ToyRay:
    """The calls of Ray that `Cluster` makes. An actor from `places` on is never placed: its calls return nothing."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, places: int = 99) -> None:
        self.places, self.actors, self.killed = places, 0, []

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def remote(self, **options):
        return lambda kind: SimpleNamespace(remote=lambda *arguments: self.actor(kind(*arguments)))

    def actor(self, worker):
        number, self.actors = self.actors, self.actors + 1
        worker.number = number
        call = lambda name: SimpleNamespace(remote=lambda *a: (number, lambda: getattr(worker, name)(*a)))  # noqa: E731
        return SimpleNamespace(number=number, **{name: call(name) for name in ("start", "work", "finish", "progress")})

    def wait(self, calls, num_returns=1, timeout=0.0):
        ready = [call for call in calls if call[0] < self.places and getattr(call[1], "ready", lambda: True)()]
        time.sleep(0 if ready else min(timeout, 0.001))
        return ready[:num_returns], []

    def get(self, call):
        return call[1]()

    def kill(self, actor):
        self.killed.append(actor.number)


class ToyWorker:
    """Does a unit at once. The first of them may be refused, or fail at everything."""

    refused, fails = "", False

    def start(self):
        return self.refused if self.number == 0 else ""

    def work(self, unit, ours, extra):
        assert not (self.refused and self.number == 0), "it was started"
        if self.fails and self.number == 0:
            return [Outcome(unit, "failed", "cannot", "cannot")]
        return [Outcome(unit, "done")]

    def finish(self):
        return []

    def progress(self):
        return {}


@pytest.fixture
def run(monkeypatch):
    """A function: some units on two workers of this kind, and again with the same workers; the handouts."""
    recipe = load_recipe("pocket", ["runtime.workers=2", "runtime.executor=ray"])
    monkeypatch.setattr(cluster_module, "_POLL_S", 0.001)
    monkeypatch.setattr(cluster_module, "_NO_WORKER_S", 0.2)

    def run(ray, worker, runs=1):
        monkeypatch.setattr(cluster_module, "connect", lambda executor: (ray, False))
        handouts = [Handout(range(8)) for _ in range(runs)]
        with Cluster(recipe, worker, ()) as cluster:
            for handout in handouts:
                cluster.run(handout, lambda: range(8), lambda unit: 1, lambda done: None)
        return handouts

    return run


def test_all_units_are_done_and_the_workers_ended(run):
    ray = ToyRay()
    (handout,) = run(ray, ToyWorker)
    assert sorted(handout.done) == list(range(8)) and ray.killed == [0, 1]


def test_asked_to_stop_it_hands_out_no_more_and_has_written_what_was_begun(run, monkeypatch):
    monkeypatch.setattr(stopping, "_state", stopping._State())
    begun, told = [], []

    class Late(ToyWorker):
        """Tells of a unit with the next one, as stage 1 does."""

        kept = None

        def work(self, unit, ours, extra):
            begun.append(unit)
            if len(begun) == 3:
                stopping.ask()
            tell, self.kept = self.kept, unit
            return self.tell(tell)

        def finish(self):
            tell, self.kept = self.kept, None
            return self.tell(tell)

        def tell(self, unit):
            told.extend([] if unit is None else [unit])
            return [] if unit is None else [Outcome(unit, "done")]

    ray = ToyRay()
    with pytest.raises(stopping.Stopped):
        run(ray, Late)
    assert 3 <= len(begun) <= 4 and sorted(told) == sorted(begun) and ray.killed == [0, 1]


def test_where_the_last_worker_is_given_up_and_the_other_has_no_place_it_ends(run):
    """It waited for ever: a worker that gets no more work counted as one that could do it."""
    broken = type("Broken", (ToyWorker,), {"fails": True})
    with pytest.raises(RunError, match=r"no worker could start in 0 s; .*worker 0 was given no more work: 3 in a row"):
        run(ToyRay(places=1), broken)


def test_without_a_place_for_anybody_it_ends(run):
    with pytest.raises(RunError, match=r"no worker could start in 0 s; expected room for \{'num_cpus': 1\}"):
        run(ToyRay(places=0), ToyWorker)


def test_a_model_may_take_longer_to_load_than_a_place_to_be_found(run):
    """The first call of each worker, its start, takes a second: five times the limit."""

    class Slow(ToyRay):
        def wait(self, calls, num_returns=1, timeout=0.0):
            self.first = getattr(self, "first", time.monotonic())
            if timeout and time.monotonic() - self.first < 1:  # timeout 0 asks after progress, which is answered
                time.sleep(0.001)
                return [], []
            return super().wait(calls, num_returns, timeout)

    (handout,) = run(Slow(), ToyWorker)
    assert sorted(handout.done) == list(range(8))


def test_a_worker_that_was_refused_is_given_nothing_in_the_next_run_either(run):
    refused = type("Refused", (ToyWorker,), {"refused": "on host: no such data"})
    first, second = run(ToyRay(), refused, runs=2)
    for handout in (first, second):
        assert sorted(handout.done) == list(range(8)) and handout.given_up == {0: "on host: no such data"}


@pytest.mark.parametrize("error", [RayError("the head is gone"), ConnectionError("the head is gone")])
def test_a_cluster_that_is_lost_is_said(run, error):
    class Lost(ToyRay):
        def wait(self, calls, num_returns=1, timeout=0.0):
            raise error

        def kill(self, actor):
            raise error

    with pytest.raises(RunError, match=r"the Ray cluster was lost: the head is gone; see that it runs"):
        run(Lost(), ToyWorker)


def test_a_cluster_that_refuses_us_is_said(monkeypatch):
    """A wrong token is an error of Ray's own kind."""
    ray = pytest.importorskip("ray")

    def refuse(*_, **__):
        raise ray.exceptions.AuthenticationError(
            "Token authentication is enabled but no token was found. " + "See the pages. " * 40
        )

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(RunError, match=r"no connection to the Ray cluster at ray://head:1: .*no token was found"):
        cluster_module.connect("ray://head:1")
