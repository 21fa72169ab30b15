"""Identity and plan of a cache: `manifest.json`, written once before the first shard, never changed.

Called by stage 1 (which plans a cache), by the reader and by `pipeline` (which names cache folders by fingerprint).
`identity` is everything that decides what a stored number means; the fingerprint is its hash. `provenance` is how it
came about; two caches that differ only there hold the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from cache_schema import jsondoc
from cache_schema.errors import (
    DamagedDocument,
    Difference,
    FingerprintMismatch,
    InvalidManifest,
    NotACache,
    PlanMismatch,
    shown,
)
from cache_schema.layout import MANIFEST, VOCABULARY
from cache_schema.schema import SCHEMA_VERSION
from cache_schema.store import Store

MOST_BYTES = 8 << 20  # of manifest.json: an identity with its template and shots takes kilobytes
VOCABULARY_MOST_BYTES = 64 << 20  # Qwen's 151,936 texts take 2.5 MB
# What a reader will hold for the sake of a manifest alone, before it has seen a row.
MAX_VOCABULARY = 1 << 22  # the largest in use have a million
MAX_EXAMPLES_OF_SHARD = 1 << 20
MAX_SHARDS = 1 << 18  # sealed.json holds a record of each
MAX_TEMPERATURES = 64
STEPS = (2.0**-24, 2.0**24)
TEMPERATURES = (1e-6, 1e6)
CODECS = ("fine", "small")  # every rank to step / 2; a coarser tail
SELECTORS = ("topk", "sampled")  # the K largest logits; K draws from the softmax at the first temperature


def fingerprint_of(identity: dict[str, Any]) -> str:
    """SHA-256, in hex, of the canonical JSON of an identity.

    Raises ValueError, naming the place, on anything without a stable identity (see `jsondoc.canonical`).
    """
    if type(identity) is not dict:
        raise ValueError(f"an identity is a dict, found {shown(identity)}")
    return hashlib.sha256(jsondoc.canonical(identity)).hexdigest()


def vocabulary_sha256(vocabulary: Sequence[str | None]) -> str:
    """SHA-256 of `vocabulary.json`: equal hashes mean the same tokenizer, as far as ids and texts go."""
    return hashlib.sha256(vocabulary_bytes(vocabulary)).hexdigest()


def vocabulary_bytes(vocabulary: Sequence[str | None]) -> bytes:
    """The content of `vocabulary.json`: a canonical JSON list, token id to token text, null for an id without one."""
    return jsondoc.canonical(list(vocabulary)) + b"\n"


@dataclass(frozen=True)
class Manifest:
    """One field per line of the plan. Build it with `create`; a field out of range is an InvalidManifest."""

    schema_version: int
    fingerprint: str  # of identity
    identity: dict[str, Any]  # hashed
    provenance: dict[str, Any]  # not hashed: where, when, with which batches
    selector: str  # how the K ids of a position were chosen; one of SELECTORS
    top_k: int  # K, the ids kept of a position or, for `sampled`, its draws: ids drawn again share a slot
    vocab_size: int  # V, the width of the teacher's output; K <= V
    temperatures: tuple[float, ...]  # the T of logsumexp and log_tail
    step: float  # logit units of a level; a power of two
    codec: str  # one of CODECS
    store_ids: bool  # whether token_ids are kept
    examples: int  # input examples, quarantined ones included
    shard_examples: int  # input examples a shard; shard i holds i * shard_examples and on, the last may be short
    vocabulary_sha256: str

    @classmethod
    def create(
        cls,
        *,
        identity: dict[str, Any],
        provenance: dict[str, Any],
        selector: str = "topk",
        top_k: int,
        vocab_size: int,
        temperatures: Sequence[float],
        step: float,
        codec: str = "fine",
        store_ids: bool,
        examples: int,
        shard_examples: int,
        vocabulary_sha256: str,
    ) -> Manifest:
        """A manifest of this schema version, its fingerprint computed from `identity`."""
        return cls(
            schema_version=SCHEMA_VERSION,
            fingerprint=fingerprint_of(identity),
            identity=identity,
            provenance=provenance,
            selector=selector,
            top_k=top_k,
            vocab_size=vocab_size,
            temperatures=tuple(temperatures),
            step=step,
            codec=codec,
            store_ids=store_ids,
            examples=examples,
            shard_examples=shard_examples,
            vocabulary_sha256=vocabulary_sha256,
        )

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, expected: str) -> None:
            if not holds:
                raise InvalidManifest(f"{name} is {shown(getattr(self, name))}; expected {expected}")

        def whole(value: object, low: int, high: float = math.inf) -> bool:
            return type(value) is int and low <= value <= high

        def within(value: object, bounds: tuple[float, float]) -> bool:
            return type(value) is float and bounds[0] <= value <= bounds[1]

        check("schema_version", self.schema_version == SCHEMA_VERSION, str(SCHEMA_VERSION))
        check("fingerprint", self.fingerprint == fingerprint_of(self.identity), "the hash of the identity")
        jsondoc.canonical(self.provenance)
        check("selector", self.selector in SELECTORS, f"one of {', '.join(SELECTORS)}")
        check("vocab_size", whole(self.vocab_size, 1, MAX_VOCABULARY), f"1 to {MAX_VOCABULARY}")
        check("top_k", whole(self.top_k, 1, self.vocab_size), f"1 to the vocabulary's {self.vocab_size}")
        sound = 0 < len(self.temperatures) <= MAX_TEMPERATURES and all(
            within(t, TEMPERATURES) for t in self.temperatures
        )
        distinct = sound and len(set(self.temperatures)) == len(self.temperatures)
        check("temperatures", distinct, f"1 to {MAX_TEMPERATURES} distinct floats of 1e-6 to 1e6")
        power = within(self.step, STEPS) and math.frexp(self.step)[0] == 0.5
        check("step", power, "a power of two, as 0.015625, of 2**-24 to 2**24")
        check("codec", self.codec in CODECS, f"one of {', '.join(CODECS)}")
        check("store_ids", type(self.store_ids) is bool, "true or false")
        check("store_ids", self.store_ids or not self.sampled, "true: draws mean nothing without ids")
        check("shard_examples", whole(self.shard_examples, 1, MAX_EXAMPLES_OF_SHARD), f"1 to {MAX_EXAMPLES_OF_SHARD}")
        most = MAX_SHARDS * self.shard_examples
        check("examples", whole(self.examples, 1, most), f"1 to {most}: more need a larger shard_examples")
        check("vocabulary_sha256", jsondoc.is_sha256(self.vocabulary_sha256), "64 hexadecimal digits")

    @property
    def shards(self) -> int:
        """How many shards the plan has."""
        return -(-self.examples // self.shard_examples)

    @property
    def stores_tail(self) -> bool:
        """Whether there is anything outside the top K, and a sum of it is kept."""
        return self.top_k < self.vocab_size and not self.sampled

    @property
    def sampled(self) -> bool:
        """Whether ids were drawn, so that a position's numbers estimate its distribution without bias."""
        return self.selector == "sampled"

    def examples_of(self, shard: int) -> range:
        """The input examples planned into a shard."""
        return range(shard * self.shard_examples, min((shard + 1) * self.shard_examples, self.examples))

    def stage1_command(self, location: str) -> str:
        """What to type to complete this cache, where it lies now; the recipe's name is provenance. Of the command that
        made it nothing else is repeated: it may be a stranger's."""
        recipe = str(self.provenance.get("recipe", "NAME"))
        named = shlex.quote(recipe) if recipe.isprintable() else "NAME"
        return f"python -m stage1_teacher --recipe {named} --set {shlex.quote(f'cache.dir={location}')}"

    def dump(self) -> bytes:
        """The bytes of `manifest.json`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "schema_version"}
        return jsondoc.dump("manifest", {**values, "temperatures": list(self.temperatures)})

    @classmethod
    def load(cls, store: Store) -> Manifest:
        """Read `manifest.json` of a cache.

        Raises NotACache when there is none, DamagedDocument, UnknownVersion or InvalidManifest when it is no good.
        """
        try:
            doc = jsondoc.load(store, MANIFEST, "manifest", MOST_BYTES)
        except FileNotFoundError:
            exists = "the folder has no manifest.json" if store.exists() else "no such folder"
            raise NotACache(
                f"there is no cache at {store.location}: {exists}\n"
                "  next: `python -m stage1_teacher --recipe NAME` makes the cache of a recipe"
            ) from None
        except NotADirectoryError:
            raise NotACache(f"there is no cache at {store.location}: it is a file; expected a folder") from None
        try:
            manifest = cls(
                schema_version=SCHEMA_VERSION,
                fingerprint=doc.take("fingerprint", str),
                identity=doc.take("identity", dict),
                provenance=doc.take("provenance", dict),
                selector=doc.take("selector", str),
                top_k=doc.take("top_k", int),
                vocab_size=doc.take("vocab_size", int),
                temperatures=tuple(doc.take("temperatures", list)),
                step=doc.take("step", float),
                codec=doc.take("codec", str),
                store_ids=doc.take("store_ids", bool),
                examples=doc.take("examples", int),
                shard_examples=doc.take("shard_examples", int),
                vocabulary_sha256=doc.take("vocabulary_sha256", str),
            )
        except InvalidManifest as error:
            raise InvalidManifest(f"{store.path(MANIFEST)}: {error}") from None
        doc.done()
        return manifest

    def expect_identity(self, store: Store, asked: dict[str, Any]) -> None:
        """Raise FingerprintMismatch, listing the fields that differ, unless `asked` is this cache's identity."""
        fingerprint = fingerprint_of(asked)
        if fingerprint != self.fingerprint:
            found = list(differences(self.identity, asked))
            raise FingerprintMismatch(store.location, self.fingerprint, fingerprint, found)

    def expect_plan(self, store: Store, asked: Manifest) -> None:
        """Raise unless `asked` is the same plan of the same identity. Provenance may differ."""
        self.expect_identity(store, asked.identity)
        mine, theirs = (
            {f.name: getattr(m, f.name) for f in fields(m) if f.name not in ("identity", "provenance")}
            for m in (self, asked)
        )
        if mine != theirs:
            raise PlanMismatch(store.location, list(differences(mine, theirs)))


_ABSENT = object()


def differences(cached: Any, asked: Any, place: str = "") -> list[Difference]:
    """The leaves at which two JSON values differ, by dotted name, sorted."""
    if isinstance(cached, dict) and isinstance(asked, dict):
        found = []
        for key in sorted(cached.keys() | asked.keys()):
            inner = f"{place}.{key}" if place else key
            found += differences(cached.get(key, _ABSENT), asked.get(key, _ABSENT), inner)
        return found
    if type(cached) is type(asked) and cached == asked:
        return []
    return [Difference(place, _json(cached), _json(asked))]


def _json(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:48]} ... {text[-47:]}"


def load_vocabulary(store: Store, manifest: Manifest) -> list[str | None]:
    """Token id to token text, from `vocabulary.json`; checked against the manifest's hash."""
    try:
        data = jsondoc.read(store, VOCABULARY, VOCABULARY_MOST_BYTES)
    except FileNotFoundError:
        raise DamagedDocument(store, VOCABULARY, "it is gone") from None
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.vocabulary_sha256:
        raise DamagedDocument(store, VOCABULARY, f"its SHA-256 is {found}, expected {manifest.vocabulary_sha256}")
    vocabulary = jsondoc.parse(store, VOCABULARY, data)
    if not isinstance(vocabulary, list) or len(vocabulary) != manifest.vocab_size:
        raise DamagedDocument(store, VOCABULARY, f"expected a list of {manifest.vocab_size} token texts, one an id")
    if not all(text is None or type(text) is str for text in vocabulary):
        raise DamagedDocument(store, VOCABULARY, "expected texts and nulls alone")
    return vocabulary
