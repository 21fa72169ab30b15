"""What the cache, the students and the sandbox promise: a test that proves one of these is marked with it.

    @pytest.mark.promise(promised.TORN)
    def test_flipped_bits(tried): ...; tried(1476, "flipped bits")

`benchmarks/promises.py` runs them all and makes the tables, in this order.
"""

CRASH = "A crash at any system call leaves the old or the new state, never a third"
EQUAL = "A crashed and resumed cache or student equals an uninterrupted one, byte for byte"
TORN = (
    "A torn or altered file is never read as data; "
    "the shard is named, repair sets aside only it, stage 1 redoes only it"
)
REFUSED = "No space, no permission, read-only: an error in bounded time, nothing half published"
ONE_WINNER = "Two writers on one cache: each shard has one winner, the loser goes on or leaves clean"
STALE = "A stale teacher, tokenizer, template, shot, K, temperature, data row: refused, with the field named"
SAME_BATCHES = "Resume on another number of processes trains on the same global batches"
POISONED = "Poisoned examples are quarantined with a reason; written + quarantined = input"
STRANGE_CACHE = "A cache from a stranger cannot run code, read outside its folder or exhaust memory"
STRANGE_MODEL = "An adapter or model folder from a stranger cannot run code"
SANDBOX = "Generated code cannot write outside its folder, reach the network, outlive its limit or forge a pass"
DEAD_WORKER = "A worker that dies on another machine loses its shard in work only"
ALL = (
    CRASH,
    EQUAL,
    TORN,
    REFUSED,
    ONE_WINNER,
    STALE,
    SAME_BATCHES,
    POISONED,
    STRANGE_CACHE,
    STRANGE_MODEL,
    SANDBOX,
    DEAD_WORKER,
)
