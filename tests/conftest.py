"""Shared by all tests: how often a promise was tried. `benchmarks/promises.py` makes the tables of it.

@pytest.mark.promise(promised.TORN)
def test_flipped_bits(tried): ...; tried(1476, "flipped bits")
"""

from collections.abc import Callable

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test says which promise it proves even where it is skipped."""
    if (promise := item.get_closest_marker("promise")) is not None:
        item.user_properties.append(("promise", promise.args[0]))


@pytest.fixture
def tried(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[[int, str], None]:
    """`tried(count, what)`: count of `what` were tried, and none was lost; call it once all of them have held."""
    assert request.node.get_closest_marker("promise"), "a test that counts what it tried says which promise it proves"

    def tried(count: int, what: str) -> None:
        assert count > 0, f"no {what} tried"
        record_property("tried", f"{count} {what}")

    return tried
