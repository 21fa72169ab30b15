"""A throw-away language model with Qwen's vocabulary, trained on real texts: what cache sizes are measured on.

    python benchmarks/trained_lm.py --data FOLDER [--tokenizer FOLDER] [--work FOLDER] [--tokens 600000 6000000]

Random weights give random ids, which nothing compresses, and an undertrained model's 256 best are nearly a unigram
table, which everything does; so bytes are reported at several training levels, each with its perplexity. FOLDER of
--data has <task>/*.jsonl. GSM8K's test split is left out of the training: perplexity is measured on it, and caches are
made of it. One folder a level, `tokens-<n>`, as save_pretrained leaves it.

The softmax runs over the batch's own ids and a sample of all others, each logit less the logarithm of how many times
the sample holds its id on average (Jean et al. 2015, arXiv 1412.2007): 151,936 columns for every token take too long.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, LENGTH, BATCH, SAMPLES = 151_936, 256, 8, 4_096
HELD_OUT = ("gsm8k", "test.jsonl")


def texts(data: Path) -> Iterator[str]:
    """All strings of every row, joined; GSM8K as question and answer. The held-out file is not among them."""
    for path in sorted(data.glob("*/*.jsonl")):
        if path.parts[-2:] != HELD_OUT and path.parent.name != "tokenizers":
            for line in path.open(encoding="utf-8"):
                yield document(json.loads(line))


def document(row: dict[str, Any]) -> str:
    """A row as one text."""
    return "\n".join(value for key, value in row.items() if isinstance(value, str) and "id" not in key)


def token_stream(tokenizer: Any, documents: list[str]) -> np.ndarray:
    """All documents one after another, each ended by end-of-text."""
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return np.concatenate([[*ids, tokenizer.eos_token_id] for ids in encoded]).astype(np.int64)


def new_model() -> Any:
    """A small Qwen3 with the vocabulary of the large ones."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4_096,
            tie_word_embeddings=True,
        )
    )


def train(model: Any, stream: np.ndarray, levels: list[int], save: Any) -> None:
    """AdamW with a linear warm-up and a cosine to a tenth; `save(tokens)` at each level."""
    import torch
    from torch.nn import functional

    rng = np.random.default_rng(0)
    counts = np.bincount(stream, minlength=VOCABULARY).astype(np.float64) ** 0.75
    proposal_V = 0.75 * counts / counts.sum() + 0.25 / VOCABULARY
    cumulative_V, log_proposal_V = proposal_V.cumsum(), torch.from_numpy(np.log(proposal_V)).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    steps, started = max(levels) // (BATCH * LENGTH), time.monotonic()
    windows = np.concatenate(
        [rng.permutation(len(stream) // LENGTH - 1) for _ in range(1 + max(levels) // len(stream))]
    )
    for step in range(steps):
        rate = min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = 2e-3 * rate
        at = windows[step * BATCH % len(windows) :][:BATCH] * LENGTH
        ids_BL = torch.from_numpy(np.stack([stream[i : i + LENGTH + 1] for i in at]))
        sampled = np.searchsorted(cumulative_V, rng.random(SAMPLES) * cumulative_V[-1]).clip(max=VOCABULARY - 1)
        own = torch.unique(ids_BL[:, 1:])
        others = np.setdiff1d(sampled, own.numpy())
        columns = torch.cat([own, torch.from_numpy(others)])
        correction = torch.zeros(len(columns))  # of the samples: they stand for the ids that were not drawn
        expected = -torch.expm1(-SAMPLES * log_proposal_V[columns[len(own) :]].exp())
        correction[len(own) :] = expected.log()
        hidden_BLH = model.model(input_ids=ids_BL[:, :-1]).last_hidden_state
        logits_NC = hidden_BLH.flatten(0, 1) @ model.get_output_embeddings().weight[columns].T - correction
        loss = functional.cross_entropy(logits_NC, torch.searchsorted(own, ids_BL[:, 1:].flatten()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = (step + 1) * BATCH * LENGTH
        if (step + 1) % 20 == 0:
            print(
                f"{done:,} tokens, loss {loss.item():.3f}, {done / (time.monotonic() - started):,.0f} tok/s", flush=True
            )
        for level in levels:
            if done - BATCH * LENGTH < level <= done or (step + 1 == steps and level > done):
                save(level)


def perplexity(model: Any, stream: np.ndarray, windows: int = 64) -> float:
    """Of the full softmax over all 151,936 ids, on held-out text."""
    import torch
    from torch.nn import functional

    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(min(windows, len(stream) // LENGTH - 1)):
            ids = torch.from_numpy(stream[i * LENGTH : (i + 1) * LENGTH + 1])
            logits = model(input_ids=ids[None, :-1]).logits[0].float()
            total += functional.cross_entropy(logits, ids[1:], reduction="sum").item()
            count += len(ids) - 1
    return math.exp(total / count)


def main() -> int:
    """Train once, save at each level, say how good it is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="a Qwen tokenizer (DATA/tokenizers/qwen)")
    parser.add_argument("--work", type=Path, default=Path("runs/trained-lm"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[600_000, 6_000_000], help="the training levels")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.data / "tokenizers" / "qwen")
    stream = token_stream(tokenizer, list(texts(args.data)))
    np.random.default_rng(0).shuffle(blocks := stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH))
    stream = blocks.ravel()
    held_out = [document(json.loads(line)) for line in (args.data / "/".join(HELD_OUT)).open(encoding="utf-8")]
    held_out_stream = token_stream(tokenizer, held_out)
    print(
        f"{len(stream):,} tokens to train on, {len(np.unique(stream)):,} ids of {VOCABULARY:,} among them", flush=True
    )
    model = new_model()

    def save(level: int) -> None:
        folder = args.work / f"tokens-{level}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found = {"tokens": level, "perplexity": round(perplexity(model, held_out_stream), 2)}
        (folder / "level.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(found, flush=True)

    train(model, stream, sorted(args.tokens), save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
