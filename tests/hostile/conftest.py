"""Shared by the tests of hostile caches: an honest cache to forge from, and a child with limits to read forgeries."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jail import Jail
from strangers import Toy


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed cache of three shards; not to be changed."""
    return Toy().build(tmp_path_factory.mktemp("honest") / "cache")


@pytest.fixture
def forge(honest: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of it, to be changed at will."""

    def copy() -> Path:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        return Path(shutil.copytree(honest, tmp_path / "cache"))

    return copy


@pytest.fixture(scope="module")
def jail() -> Iterator[Jail]:
    """Reads caches in children with limited memory and time."""
    with Jail() as jail:
        yield jail
