"""Bytes a position of caches of a trained model: K = 256 of 151,936 ids, step 1/64, whole data files, text included.

    python benchmarks/cache_bytes.py [--data FOLDER] [--models FOLDER] [--work FOLDER] [--rows 264] [--out FILE]

Random weights give random ids, and an undertrained model's 256 best are nearly a unigram table, so the teachers are
the training levels that `python benchmarks/trained_lm.py` left, each with its perplexity. The rows are GSM8K's test
split, which they have not seen, in the place of the training rows of the gsm8k-qwen3 recipe; its stage 1 runs once a
level. The cache is then written with either codec, and once without ids, as a rank-ordered loss needs it.

Held against what others write: int32 ids and float16 logits as they are, 6 bytes of 256 ranks; and the codec that
DistillKit recommends, 632 bytes as published, whose ids cannot be left out and whose logits are a fitted polynomial.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from harness import Row, data_folder, finish

from cache_schema.manifest import Manifest
from cache_schema.reader import CacheReader
from cache_schema.schema import TEXT_COLUMNS, CacheRow, QuarantinedExample
from cache_schema.writer import CacheWriter

RAW, DISTILLKIT = 256 * 6, 632
KINDS = {  # name -> what differs from the recipe's manifest, and the goal
    "fine": ({}, "<= 420"),
    "small": ({"codec": "small"}, ""),
    "rank-only": ({"store_ids": False}, "<= 90"),
}
SHARES = {
    **dict.fromkeys(("slots", "id_excess", "height_excess", "rank_steps", "rank_excess"), "ids and levels"),
    "height_low": "low bits of levels",
    "id_order": "order of ids",
    **dict.fromkeys(("top_logit", "logsumexp", "log_tail"), "top logits and normalisers"),
    **dict.fromkeys(("answer_ids", "answer_start", "answer_offsets", "status"), "answer tokens"),
    **dict.fromkeys(TEXT_COLUMNS, "text"),
}


def levels(models: Path, data: Path) -> list[tuple[Path, float]]:
    """The folders of the trained models, least trained first, with their perplexities; ends the script without two."""
    found = [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in models.glob("tokens-*/level.json")]
    if len(found) < 2:
        print(
            f"skipped: it needs two levels of a trained model in {models}, found {len(found)}; they are made by "
            f"python benchmarks/trained_lm.py --data {data} --work {models}"
        )
        sys.exit(0)
    return [(folder, level["perplexity"]) for folder, level in sorted(found, key=lambda item: item[1]["tokens"])]


def capture(model: Path, data: Path, work: Path, rows: int) -> tuple[Manifest, list[str | None], list[CacheRow], list]:
    """What the recipe's stage 1 hands to its writer: manifest, vocabulary, rows, quarantined examples."""
    from pipeline.fingerprint import Experiment
    from pipeline.recipe import load_recipe
    from stage1_teacher.capture import Capture
    from stage1_teacher.plan import planned
    from stage1_teacher.teacher import load_teacher

    held_out = work / "data" / "gsm8k"
    held_out.mkdir(parents=True, exist_ok=True)
    lines = (data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name in ("train", "test"):
        (held_out / f"{name}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    settings = {"teacher.model": model, "students.qwen3.model": model, "data.dir": held_out.parent}
    settings |= {"teacher.dtype": "float32", "teacher.thinking": "null", "cache.shard_examples": rows}
    experiment = Experiment(load_recipe("gsm8k-qwen3", [f"{key}={value}" for key, value in settings.items()]))
    manifest, vocabulary = planned(experiment, ["benchmarks/cache_bytes.py"])
    stage1 = Capture.of(experiment, load_teacher(experiment.recipe, lambda: 0))
    return manifest, vocabulary, *stage1.shard(experiment.training_set.cached)


def write(
    folder: Path,
    manifest: Manifest,
    vocabulary: Sequence[str | None],
    rows: Sequence[CacheRow],
    quarantined: Sequence[QuarantinedExample],
) -> CacheReader:
    """A sealed cache in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    writer = CacheWriter.open(folder, manifest, vocabulary)
    writer.commit(0, rows if manifest.store_ids else [replace(row, token_ids=None) for row in rows], quarantined, {})
    writer.seal()
    return CacheReader.open(folder)


def bytes_by_share(reader: CacheReader) -> Counter[str]:
    """Compressed bytes of the data files by group of columns; the footers are the rest."""
    found: Counter[str] = Counter()
    for record in reader.records:
        metadata = pq.read_metadata(Path(reader.location) / "shards" / record.file)
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                name = SHARES.get(column.path_in_schema.partition(".")[0], "empty columns")
                found[name] += column.total_compressed_size
    found["footers"] = reader.totals().bytes - found.total()
    return found


def main() -> None:
    """Capture each level once, write it in each way, weigh it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder with gsm8k/test.jsonl")
    parser.add_argument("--models", type=Path, default=Path("runs/trained-lm"), help="what trained_lm.py has made")
    parser.add_argument("--work", type=Path, default=Path("runs/cache-bytes"), help="where the caches are left")
    parser.add_argument("--rows", type=int, default=264, help="rows, the eight worked examples among them")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data = data_folder(args.data)
    table, conditions = [], {}
    for model, perplexity in levels(args.models, data):
        manifest, vocabulary, rows, quarantined = capture(model, data, args.work, args.rows)
        gaps = np.concatenate([row.top_logit - row.logits[:, -1] for row in rows])
        top = np.concatenate([np.exp(row.top_logit - row.logsumexp[:, 0]) for row in rows])
        ids = np.unique(np.concatenate([row.token_ids.ravel() for row in rows if row.token_ids is not None]))
        conditions[model.name] = (
            f"perplexity {perplexity}; {len(top):,} positions, mean probability of rank 0 {top.mean():.2f}, "
            f"rank 255 {gaps.mean():.1f} logits below it, {len(ids):,} ids among the ranks"
        )
        for kind, (changes, goal) in KINDS.items():
            made = write(
                args.work / f"{model.name}-{kind}", replace(manifest, **changes), vocabulary, rows, quarantined
            )
            totals, shares = made.totals(), bytes_by_share(made)
            weights = ", ".join(f"{name} {size / totals.positions.written:.1f}" for name, size in shares.most_common())
            what = f"bytes a position, {kind}, perplexity {perplexity:.0f}"
            against = f"raw {RAW}, DistillKit {DISTILLKIT}" if changes != {"store_ids": False} else "DistillKit's 632"
            note = f"{weights}; logits off by {totals.codec_error_max:g} at most"
            table.append(Row.single(what, against, totals.bytes_per_position, goal, "bytes", note))
    conditions["rows"] = f"{args.rows} of GSM8K's test split, 8 of them worked examples; K = 256, step 1/64"
    finish("cache_bytes", table, conditions, args.out)


if __name__ == "__main__":
    main()
