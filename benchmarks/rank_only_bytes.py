"""Bytes a position of an encoder-decoder's cache, with token ids and without: what a rank-ordered loss saves.

    python benchmarks/rank_only_bytes.py --data FOLDER --tokenizer FOLDER [--work FOLDER] [--rows 100]

The flan-uld recipe's stage 1 (K = 256, step 1/64, 4 bits) on real rows of its eight tasks, twice. The texts, the T5
tokenizer and the vocabulary of 32,128 are real. The model is small and random, shaped so that its distributions are
peaked and its frequent pieces frequent, which is what decides how ids and logits compress; the last line says how
peaked. FOLDER of --data has <task>/train.jsonl of every task; FOLDER of --tokenizer has T5's tokenizer.
"""

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

VOCABULARY, WIDTH = 32_128, 64
GROUPS = {
    **dict.fromkeys(("id_order", "slots", "id_excess"), "ids and logits"),
    **dict.fromkeys(("height_low", "height_excess", "rank_steps", "rank_excess"), "ids and logits"),
    **dict.fromkeys(("top_logit", "logsumexp", "log_tail"), "top logits and normalisers"),
    **dict.fromkeys(("example_id", "task", "prompt", "answer"), "text"),
}


def make_model(folder: Path, tokenizer_folder: Path) -> None:
    """A T5 of FLAN's shape with its tokenizer beside it, as save_pretrained leaves them.

    One coordinate of every embedding is large, so that it is about constant in the hidden states; the head multiplies
    it with a Zipf prior over ids, which SentencePiece sorted by frequency. The other coordinates are noise that differs
    from position to position, louder for some ids than for others, so that a few stand out at each.
    """
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_ff=2 * WIDTH,
        d_kv=WIDTH // 4,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    model: Any = T5ForConditionalGeneration(config)
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.shared.weight[:, 0] = WIDTH**0.5
        head_VH = 0.12 * torch.randn(VOCABULARY, WIDTH) * (0.6 * torch.randn(VOCABULARY, 1)).exp()
        head_VH[:, 0] = -0.2 * torch.arange(1, VOCABULARY + 1).log()
        model.lm_head.weight = torch.nn.Parameter(head_VH)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)


def stage1(args: argparse.Namespace, store_ids: bool) -> Path:
    """Fill one of the two caches; its folder."""
    from pipeline.recipe import load_recipe

    cache = args.work / ("with-ids" if store_ids else "without-ids")
    settings = {
        "data.dir": args.data,
        "teacher.model": args.work / "model",
        "cache.dir": cache,
        "cache.store_ids": str(store_ids).lower(),
    }
    settings |= {f"data.tasks.{task}.train": args.rows for task in load_recipe("flan-uld").trained_tasks}
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    subprocess.run([sys.executable, "-m", "stage1_teacher", "--recipe", "flan-uld", *overrides], check=True)
    return cache


def bytes_by_group(reader: Any) -> Counter[str]:
    """Compressed bytes of the data files by group of columns; footers and the small columns are the rest."""
    import pyarrow.parquet as pq

    found: Counter[str] = Counter()
    for record in reader.records:
        metadata = pq.read_metadata(Path(reader.location) / "shards" / record.file)
        for group in range(metadata.num_row_groups):
            for i in range(metadata.num_columns):
                column = metadata.row_group(group).column(i)
                found[GROUPS.get(column.path_in_schema.split(".")[0], "rest")] += column.total_compressed_size
    found["rest"] += reader.totals().bytes - found.total()
    return found


def report(with_ids: Path, without_ids: Path) -> None:
    """Both caches side by side, in bytes for each usable position."""
    import numpy as np

    from cache_schema.reader import CacheReader
    from cache_schema.schema import RANKED

    readers = [CacheReader.open(with_ids), CacheReader.open(without_ids)]
    positions = readers[0].totals().positions.written
    assert readers[1].totals().positions.written == positions
    groups = [bytes_by_group(reader) for reader in readers]
    print(f"\n| bytes a position ({positions:,} usable) | with ids | without |\n| --- | ---: | ---: |")
    for name in ("ids and logits", "top logits and normalisers", "text", "rest"):
        print(f"| {name} | {groups[0][name] / positions:.1f} | {groups[1][name] / positions:.1f} |")
    whole = [group.total() / positions for group in groups]
    bare = [(group.total() - group["text"]) / positions for group in groups]
    print(f"| all | {whole[0]:.1f} | {whole[1]:.1f} |\n| all but text | {bare[0]:.1f} | {bare[1]:.1f} |\n")
    print(f"Without ids {whole[1] / whole[0]:.3f} of the cache is left, text aside {bare[1] / bare[0]:.3f}.")
    rows = [row for row in readers[1].rows(RANKED) if (row.status == 0).any()]
    usable = [row.status == 0 for row in rows]
    top = np.concatenate([(r.top_logit[u] / 1.2 - r.logsumexp[u, 0]) for r, u in zip(rows, usable, strict=True)])
    tail = np.concatenate([(r.log_tail[u, 0] - r.logsumexp[u, 0]) for r, u in zip(rows, usable, strict=True)])
    print(
        f"Mean probability of rank 0: {np.exp(top).mean():.2f}; beyond rank 255: {np.exp(tail).mean():.3f} (T = 1.2)."
    )


def main() -> int:
    """Make the model once, fill both caches, compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/rank-only-bytes"))
    parser.add_argument("--rows", type=int, default=100, help="training rows a task (100)")
    args = parser.parse_args()
    if not (args.work / "model" / "config.json").is_file():
        make_model(args.work / "model", args.tokenizer)
    report(stage1(args, store_ids=True), stage1(args, store_ids=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
