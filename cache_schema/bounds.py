"""How large the parts of a data file can be: the writer keeps to it, the reader refuses what does not.

A file that is small and unpacks to gigabytes is a trap, not a cache. What follows from manifest and commit record is
checked against them; but a stranger writes those too, so a row group has bounds of its own. Called by `shard`, `check`.
"""

from __future__ import annotations

from cache_schema.manifest import Manifest
from cache_schema.schema import TextRow

GROUP_VALUES = 1 << 22  # logits in a row group: 16 MiB decoded, what one random read costs
MAX_ROW_VALUES = 1 << 26  # of one row that is larger than that: decoding it takes about 3 GB
GROUP_TEXT_BYTES = 1 << 25  # of the text columns of a row group, or of one row
MAX_FOOTER_BYTES = 1 << 21  # about 800 row groups; a footer of lies takes 240 times its size in memory


def widest(manifest: Manifest) -> int:
    """The most numbers that a column has for a position."""
    return max(manifest.top_k, len(manifest.temperatures), 2)


def text_bytes(row: TextRow) -> int:
    """What the text columns of a row take unpacked: UTF-8, each after its length in four bytes."""
    return sum(4 + len(text.encode()) for text in (row.example_id, row.task, row.prompt, row.answer))


def most_numbers(name: str, manifest: Manifest, positions: int, rows: int) -> int:
    """How many numbers a column of a row group can have at most. positions: of the whole shard. rows: of the group."""
    per_position = {
        **dict.fromkeys(("answer_ids", "status", "top_logit"), 1),
        **dict.fromkeys(("slots", "id_excess", "height_low", "height_excess", "draws", "rank_excess"), manifest.top_k),
        **dict.fromkeys(("logsumexp", "log_tail"), len(manifest.temperatures)),
        "answer_offsets": 2,
        "rank_steps": -(-manifest.top_k // 4),
    }
    listed = manifest.vocab_size if name == "id_order" else 0
    positions = min(positions, MAX_ROW_VALUES // widest(manifest))
    return rows + listed + positions * per_position.get(name, 0)  # an empty list counts as one


def most_bytes(numbers: int) -> int:
    """What so many numbers can take unpacked: four bytes each, levels of a few bits, and the headers of pages."""
    return 6 * numbers + (1 << 16)
