"""Claims: hints that keep two processes from computing the same shard. Called by the writer.

A claim decides nothing. When two processes do claim one shard (a clock that is off, two that take over a dead one's
claim at the same moment), the work is done twice and the commit record decides.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from cache_schema import layout
from cache_schema.store import Store

STALE_AFTER_S = 900.0


class Claims:
    """This process's claims in one cache. Claim again to renew: when the file was written last is the heartbeat."""

    def __init__(self, store: Store, stale_after_s: float = STALE_AFTER_S) -> None:
        self._store = store
        self._stale_after_s = stale_after_s
        self._me: dict[str, object] = {"host": _host(), "pid": os.getpid()}
        self._renewed: dict[int, float] = {}  # shard -> when we claimed it last

    def claim(self, shard: int) -> bool:
        """Claim a shard, or renew a claim; False while somebody else, alive as far as we know, has it.

        Raises OSError.
        """
        name, mine = layout.claim(shard), json.dumps(self._me).encode()
        if not self._store.create(name, mine):  # whole or not at all: an empty claim would seem to be somebody's
            if not self._renewable(name):
                return False
            self._store.publish(name, mine)
        self._renewed[shard] = time.monotonic()
        return True

    def fresh(self, shard: int) -> bool:
        """Whether a claim of ours was renewed so lately that it need not be written again."""
        renewed = self._renewed.get(shard)
        return renewed is not None and time.monotonic() - renewed < self._stale_after_s / 30

    def release(self, shard: int) -> None:
        """Give a shard up, if it is ours."""
        self._renewed.pop(shard, None)
        name = layout.claim(shard)
        if self._holder(name) == self._me:
            self._store.remove(name)

    def _renewable(self, name: str) -> bool:
        """Ours; or silent for too long; or of a process of this machine that is gone."""
        holder = self._holder(name)
        if holder == self._me:
            return True
        try:
            silent_s = self._store.age_s(name)
        except FileNotFoundError:
            return True
        if silent_s > self._stale_after_s:
            return True
        return holder is not None and holder["host"] == self._me["host"] and not _alive(holder["pid"])

    def _holder(self, name: str) -> dict[str, object] | None:
        """Who wrote a claim; None when it is gone or not a claim of ours."""
        with suppress(OSError, ValueError):
            holder = json.loads(self._store.read(name, 4096))
            if isinstance(holder, dict) and holder.keys() == {"host", "pid"}:
                return holder
        return None


def _host() -> str:
    """This machine, or this container of it: those that share a name do not share the numbers of their processes."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _alive(pid: object) -> bool:
    if type(pid) is not int or pid <= 0:  # 0 and below name process groups, to kill(2)
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
