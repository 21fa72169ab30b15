"""Shared by all tests: how often a promise was tried. `benchmarks/promises.py` makes the README's table of it.

@pytest.mark.promise("A torn or altered file is never read as data")
def test_flipped_bits(tried): ...; tried(1476, "flipped bits")
"""

from collections.abc import Callable

import pytest


@pytest.fixture
def tried(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[[int, str], None]:
    """`tried(count, what)`: count of `what` were tried, and none was lost; call it once all of them have held."""
    promise = request.node.get_closest_marker("promise")
    assert promise is not None, "a test that counts what it tried says which promise it proves"
    record_property("promise", promise.args[0])

    def tried(count: int, what: str) -> None:
        assert count > 0, f"no {what} tried"
        record_property("tried", f"{count} {what}")

    return tried
