"""A cache as a data set that others can load, with a card in the Hub's format. Called by `pipeline.commands.export`.

What is handed over is the cache itself, byte for byte, with a README.md beside it: `python -m cache_schema verify`,
`CacheReader` and `datasets.load_dataset` all read it.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_schema import layout
from cache_schema.copies import Copies
from cache_schema.manifest import MOST_BYTES, VOCABULARY_MOST_BYTES
from cache_schema.reader import CacheReader
from cache_schema.record import SEAL_MOST_BYTES, CommitRecord
from cache_schema.store import Store, open_store
from pipeline.errors import RunError
from pipeline.fingerprint import Experiment
from pipeline.handover import whole_folder
from pipeline.progress import progress
from pipeline.recipe import Recipe
from pipeline.tasks import HubSource, get_task

if TYPE_CHECKING:
    import pyarrow as pa

CARD = "README.md"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_DOCUMENTS = {
    layout.MANIFEST: MOST_BYTES,
    layout.VOCABULARY: VOCABULARY_MOST_BYTES,
    layout.SEALED: SEAL_MOST_BYTES,
}


def export_cache(recipe: Recipe, to: Path, load_from: str) -> None:
    """Copy a recipe's sealed cache to `to`, with its card. load_from: what the card's example loads.

    Raises CacheError where there is no whole cache of this recipe, RunError where `to` is not free or a file is not
    what its record says.
    """
    experiment = Experiment(recipe)
    reader = experiment.open_cache()
    store = open_store(reader.location, Copies(recipe.runtime.copies, int(recipe.runtime.copies_gb * 1e9)))
    with (
        whole_folder(to) as folder,
        progress("copying the cache", len(reader.records), "shards") as bar,
    ):
        (folder / layout.SHARDS).mkdir()
        for name, most in _DOCUMENTS.items():
            (folder / name).write_bytes(store.read(name, most))
        for record in reader.records:
            (folder / layout.record(record.shard)).write_bytes(record.dump(reader.manifest.fingerprint))
            _copy(store, record, folder / layout.data(record.file))
            bar.advance()
        schema = _schema(folder / layout.data(reader.records[0].file))
        (folder / CARD).write_text(card(recipe, reader, schema, load_from), encoding="utf-8")


def card(recipe: Recipe, reader: CacheReader, schema: "pa.Schema", load_from: str) -> str:
    """The text of README.md: the Hub's metadata block, then what is in the cache and how to read it."""
    from huggingface_hub import DatasetCardData

    manifest, totals = reader.manifest, reader.totals()
    data = DatasetCardData(
        pretty_name=f"Teacher logits of {recipe.name}",
        tags=["logitbank", "distillation", "logits"],
        task_categories=["text-generation"],
        source_datasets=sorted({s.path for task in recipe.trained_tasks if (s := hub_source(recipe, task))}) or None,
        size_categories=[next((name for most, name in _SIZES if len(reader) < most), "n>1M")],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": f"{layout.SHARDS}/*.parquet"}]}],
        dataset_info={"features": features(schema)},  # sizes only with those of Arrow, or `datasets` warns of the block
    )
    tail = "" if manifest.store_ids else " No ids: the levels alone, by rank."
    lines = [
        f"# Teacher logits of `{recipe.name}`",
        f"For every answer token of {len(reader):,} examples, {manifest.top_k} logits of {recipe.teacher.model}"
        f"{f' at {recipe.teacher.revision}' if recipe.teacher.revision else ''} and the exact normalisers, so that a "
        "student can be distilled without running the teacher. **Row t of a list is the distribution that predicts "
        "answer token t.** Made by logitbank; format version "
        f"{manifest.schema_version}, whose `cache_schema/FORMAT.md` gives the formula from these integers to logits.",
        "## Load it",
        f'```python\nfrom datasets import load_dataset\n\nrows = load_dataset("{load_from}", split="train")\n'
        'print(rows[0]["prompt"], len(rows[0]["answer_ids"]))\n```',
        "Decoded, with every byte checked: `CacheReader.open(folder)` of the package `cache_schema`; "
        "`python -m cache_schema verify FOLDER` checks all of it.",
        "## What is in it",
        f"- examples: {totals.examples}\n- positions: {totals.positions}\n"
        f"- {totals.bytes:,} bytes in {len(reader.records)} shards, {totals.bytes_per_position:.1f} a position\n"
        f"- vocabulary {manifest.vocab_size:,}; selector `{manifest.selector}`, K = {manifest.top_k}; temperatures "
        f"{', '.join(f'{t:g}' for t in manifest.temperatures)}; codec `{manifest.codec}`, step {manifest.step:g}; "
        f"largest error of a decoded logit {totals.codec_error_max:.3g}.{tail}\n"
        f"- the worked examples before each prompt: {recipe.teacher.shots}",
        "## Where it comes from",
        f"- fingerprint `{manifest.fingerprint}`: the hash of all that decides what a stored number means "
        "(`identity` in manifest.json)\n"
        + "\n".join(f"- data: {_source(recipe, task)}" for task in recipe.trained_tasks)
        + f"\n- teacher: {recipe.teacher.model}, {recipe.teacher.dtype}, quantization {recipe.teacher.quantization}, "
        f"engine {recipe.teacher.engine}",
        "## Limits",
        "Prompts and answers are those data sets' texts, under their licences; the logits are the teacher's, under "
        "its licence. Only the kept ids have logits; the mass of all others is in `log_tail`. "
        "Nothing here is a test split.",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"


def features(schema: "pa.Schema") -> list[dict[str, Any]]:
    """The columns of a data file as the Hub's metadata names them."""
    import pyarrow as pa

    def kind(of: "pa.DataType") -> str:
        return {"float": "float32"}.get(str(of), str(of))

    return [
        {"name": field.name, "list": kind(field.type.value_type)}
        if pa.types.is_list(field.type)
        else {"name": field.name, "dtype": kind(field.type)}
        for field in schema
    ]


def _schema(file: Path) -> "pa.Schema":
    import pyarrow.parquet as pq

    return pq.read_schema(file)


def _copy(store: Store, record: CommitRecord, to: Path) -> None:
    """One data file, believed only if its hash is the recorded one."""
    import hashlib

    try:
        with store.open_data(record.file, record.sha256, record.bytes) as source, to.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        with to.open("rb") as copied:
            found = hashlib.file_digest(copied, "sha256").hexdigest()
        if found != record.sha256:
            raise ValueError(f"its SHA-256 is {found}, its commit record says {record.sha256}")
    except ValueError as error:
        raise RunError(
            f"{store.path(layout.data(record.file))}: {error}\n  next: python -m cache_schema repair {store.location}"
        ) from None


def hub_source(recipe: Recipe, task: str) -> HubSource | None:
    """The Hub's data set that a task's rows were read from; None where a task makes its own, or `data.dir` has them:
    what lies in a folder may be anything of that form."""
    source = get_task(task).source
    return source if recipe.data.dir is None and isinstance(source, HubSource) else None


def _source(recipe: Recipe, task: str) -> str:
    source, own = get_task(task).source, hub_source(recipe, task)
    where = f"{own.path} on the Hugging Face Hub" if own is not None else "made by the task itself"
    if own is None and isinstance(source, HubSource):
        where = f"rows from a folder, in the form of {source.path}"
    return f"`{task}`, training split, {where}"
