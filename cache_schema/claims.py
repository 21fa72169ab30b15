"""Claims: hints that keep two processes from computing the same shard. Called by the writer.

A claim decides nothing. When two processes do claim one shard (a clock that is off, two that take over a dead one's
claim at the same moment), the work is done twice and the commit record decides. So nothing here is flushed to disk.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from cache_schema.layout import Layout

STALE_AFTER_S = 900.0


class Claims:
    """This process's claims in one cache. Claim again to renew: the file's modification time is the heartbeat."""

    def __init__(self, layout: Layout, stale_after_s: float = STALE_AFTER_S) -> None:
        self._layout = layout
        self._stale_after_s = stale_after_s
        self._me = {"host": socket.gethostname(), "pid": os.getpid()}

    def claim(self, shard: int) -> bool:
        """Claim a shard, or renew a claim; False while somebody else, alive as far as we know, has it."""
        path = self._layout.claim(shard)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
        temporary.write_bytes(json.dumps(self._me).encode())
        try:
            os.link(temporary, path)  # whole or not at all: an empty claim would seem to be somebody's
        except FileExistsError:
            if not self._renewable(path):
                return False
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def release(self, shard: int) -> None:
        """Give a shard up, if it is ours."""
        path = self._layout.claim(shard)
        if self._holder(path) == self._me:
            path.unlink(missing_ok=True)

    def _renewable(self, path: Path) -> bool:
        """Ours; or silent for too long; or of a process of this machine that is gone."""
        holder = self._holder(path)
        if holder == self._me:
            return True
        try:
            silent_s = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return True
        if silent_s > self._stale_after_s:
            return True
        return holder is not None and holder["host"] == self._me["host"] and not _alive(holder["pid"])

    @staticmethod
    def _holder(path: Path) -> dict[str, object] | None:
        """Who wrote a claim; None when it is gone or half written."""
        with suppress(OSError, ValueError):
            holder = json.loads(path.read_bytes())
            if isinstance(holder, dict) and holder.keys() == {"host", "pid"}:
                return holder
        return None


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
