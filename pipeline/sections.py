"""The sections of a recipe: every key typed, ranged and documented, with a check of what one section alone can tell.

`pipeline.recipe` puts them together into a `Recipe`, reads the YAML and checks what several sections must agree on.
"""

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Dtype = Literal["float32", "bfloat16", "float16"]
Alignment = Literal["boundary", "index"]


class Section(BaseModel):
    """Frozen, strict, and closed: no coercion of types, no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class TaskData(Section):
    """How much of one task is used, and its options. With `train: 0` neither teacher nor student reads it: unseen."""

    train: int | None = Field(
        None, ge=0, description="training examples, sampled with data.seed; null: all; 0: an unseen task, only scored"
    )
    eval: int | None = Field(None, ge=1, description="examples of each scored split, sampled with data.seed; null: all")
    options: dict[str, Any] = Field({}, description="options of the task file (hashed)")


class Data(Section):
    """The task collection."""

    tasks: dict[Name, TaskData] = Field(description="task name -> how much of it")
    dir: str | None = Field(None, description="a folder of <task>/{train,test}.jsonl instead of the Hub")
    train_limit: int | None = Field(None, ge=1, description="at most so many training examples over all tasks")
    eval_limit: int | None = Field(None, ge=1, description="at most so many examples of a scored split over all tasks")
    held_out: int = Field(0, ge=0, description="training rows kept out of the cache, to choose a checkpoint on")
    seed: int = Field(0, ge=0, description="seeds the samples and the held-out rows")

    @model_validator(mode="after")
    def _some_task(self) -> "Data":
        if not any(task.train != 0 for task in self.tasks.values()):
            raise ValueError("at least one task to train on is needed, for example {gsm8k: {}}")
        return self


class Teacher(Section):
    """What is cached: all of it is part of the cache's identity."""

    model: str = Field(description="a Hub name, a folder, or embedded:<name>")
    revision: str | None = Field(
        None, description="the Hub commit; null: the one the local Hub cache or the Hub resolves to"
    )
    kind: Literal["causal", "seq2seq"] = Field("causal", description="decoder alone, or encoder and decoder")
    engine: Literal["hf", "vllm"] = Field(
        "hf", description="what runs it: transformers, or vLLM for a decoder that needs several GPUs"
    )
    quantization: Literal["none", "nf4"] = Field(
        "none", description="nf4: 4-bit with double quantisation, by bitsandbytes"
    )
    dtype: Dtype = Field("bfloat16", description="of the weights and the body's arithmetic; the head runs in float32")
    shots: int = Field(8, ge=0, description="worked examples before the prompt")
    shot_seed: int = Field(0, ge=0, description="seeds their choice from the training rows")
    shot_policy: Literal["shared", "per_example"] = Field(
        "shared",
        description="shared: the same shots for all, taken out of the training rows; per_example: others for each",
    )
    thinking: bool | None = Field(
        None,
        description="the chat template's enable_thinking switch; null: not passed. Refused where no template reads it",
    )


class Cache(Section):
    """How the teacher's logits are stored: hashed, but for `dir`."""

    dir: str | None = Field(None, description="null: caches/<recipe name>-<fingerprint>")
    selector: Literal["topk", "sampled"] = Field(
        "topk",
        description="which logits of a position are kept. topk: the largest; sampled: those of ids drawn from the "
        "teacher's softmax at the first of `temperatures`, an unbiased estimate of it, for kl alone",
    )
    top_k: int = Field(256, ge=1, le=2**22, description="how many; sampled: how many draws, and so at most as many ids")
    sample_seed: int = Field(0, ge=0, description="sampled: seeds the draws of a position (hashed with sampled alone)")
    temperatures: list[Annotated[float, Field(ge=1e-6, le=1e6)]] = Field(
        [1.0],
        max_length=64,
        description="those with exact normalisers; sampled: ids are drawn at the first, the largest in use",
    )
    step: float = Field(0.015625, ge=2.0**-24, le=2.0**24, description="quantisation step of a logit, a power of two")
    codec: Literal["fine", "small"] = Field(
        "fine", description="fine: every rank to step/2; small: those 4 logits and more below the first to 4 steps"
    )
    store_ids: bool = Field(
        True, description="false: only for rank-ordered losses; that is the default of a seq2seq teacher"
    )
    shard_examples: int = Field(
        256, ge=1, le=2**20, description="examples in a shard: the unit of work and of loss when stopped"
    )

    @model_validator(mode="after")
    def _sane(self) -> "Cache":
        mantissa = self.step.hex().split("p")[0]
        if mantissa != "0x1.0000000000000":
            raise ValueError(f"step {self.step} is not a power of two (0.015625 is 2**-6)")
        if not self.temperatures or len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures {self.temperatures} must be one or more different numbers")
        if self.selector == "sampled" and not self.store_ids:
            raise ValueError("selector is sampled, whose draws mean nothing without ids; set cache.store_ids=true")
        return self


class Lora(Section):
    """The adapter (Hu et al. 2021, arXiv 2106.09685), by peft."""

    r: int = Field(16, ge=1, le=4096, description="rank")
    alpha: int = Field(32, ge=1, le=2**20, description="the update is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    targets: str | list[str] = Field("all-linear", description="module names, or all-linear (never the head)")


class Student(Section):
    """A model to train."""

    model: str = Field(description="a Hub name, a folder, or embedded:<name>")
    revision: str | None = Field(None, description="the Hub commit")
    dtype: Dtype = Field("bfloat16", description="of the frozen weights; the adapter is float32")
    lora: Lora = Field(Lora())


KEPT_APART = ("trackers",)
"""Keys of `train` that decide where numbers are shown, and none of them."""


class Train(Section):
    """Stage 2. A step is an optimizer step on `batch_size` examples, whatever the number of processes."""

    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(32, ge=1, description="examples in a step, over all processes")
    micro_batch_size: int = Field(8, ge=1, description="examples in one forward pass of one process")
    lr: float = Field(2.0e-4, gt=0, description="peak learning rate")
    warmup_steps: int = Field(50, ge=0, description="linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="after the warm-up, to zero at the last step"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    save_every: int = Field(200, ge=1, description="steps between checkpoints; the last step is always one")
    seed: int = Field(0, ge=0, description="seeds the adapter, the order and the dropout")
    repeats: int = Field(1, ge=1, description="every arm is trained so often, with seed, seed + 1, ...")
    alignment: Alignment = Field(
        "boundary",
        description="which teacher position a student position is compared with where tokenizers differ (uld). "
        "boundary: the one that has read exactly the same answer text; index: the one of the same number",
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        ["tensorboard"], description="where the metrics are shown besides metrics.jsonl (no part of an arm's identity)"
    )


class Needs(NamedTuple):
    """What a loss reads of the cache beyond its text."""

    teacher: bool = True  # rows of the teacher at all
    ids: bool = False  # their token ids: the student must have the teacher's tokenizer, the cache must store them
    largest: bool = False  # the largest logits, so drawn ones will not do
    temperature: bool = False  # `temperature` divides logits


LOSSES = {
    "ce": Needs(teacher=False),
    "logit_mse": Needs(ids=True, largest=True),
    "kl": Needs(ids=True, temperature=True),
    "uld": Needs(largest=True, temperature=True),
}
"""Every loss component by its key in an arm. The formulas are stage 2's (stage2_student/NEW_LOSS.md)."""


class Arm(Section):
    """One way to train the student: weights of the loss components; those left out are zero."""

    ce: float = Field(0.0, ge=0, description="cross-entropy with the answer")
    logit_mse: float = Field(0.0, ge=0, description="squared error to the teacher's logits at its top-K ids")
    kl: float = Field(
        0.0, ge=0, description="forward KL on the top K and one tail bucket; sampled: an estimate of the full one"
    )
    uld: float = Field(0.0, ge=0, description="L1 distance of rank-ordered probabilities; vocabularies may differ")
    temperature: float = Field(1.0, gt=0, description="of kl and uld; must be one of cache.temperatures")
    alignment: Alignment | None = Field(None, description="of uld; null: train.alignment")

    @model_validator(mode="after")
    def _some_loss(self) -> "Arm":
        if not self.weights:
            raise ValueError("an arm needs a loss with a weight above zero, for example {ce: 1.0}")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Loss component -> weight, of those above zero, in the order of `LOSSES`."""
        return {name: getattr(self, name) for name in LOSSES if getattr(self, name) > 0}

    @property
    def needs_teacher(self) -> bool:
        """Whether the cache's numbers are read, or its text alone."""
        return any(LOSSES[name].teacher for name in self.weights)

    @property
    def needs_ids(self) -> bool:
        """Whether the teacher's token ids are read: the student must share its tokenizer."""
        return any(LOSSES[name].ids for name in self.weights)

    @property
    def need_largest(self) -> list[str]:
        """The losses of this arm that take the teacher's largest logits, and no drawn ones."""
        return [name for name in self.weights if LOSSES[name].largest]

    @property
    def has_temperature(self) -> bool:
        """Whether a loss of this arm divides logits by `temperature`."""
        return any(LOSSES[name].temperature for name in self.weights)


class Reference(Section):
    """A model that is scored as it is, beside the students."""

    model: str = Field(description="a Hub name, a folder, or embedded:<name>; decoder or encoder-decoder")
    revision: str | None = Field(None, description="the Hub commit")
    dtype: Dtype = Field("bfloat16", description="of the weights")
    quantization: Literal["none", "nf4"] = Field("none", description="nf4: 4-bit, for what does not fit otherwise")


class Metrics(Section):
    """How the metrics that leave a choice are computed. Kept in the results beside every number."""

    rouge_stemmer: bool = Field(True, description="Porter stemming before ROUGE counts (rouge-score's own default: no)")
    bert_score_model: str = Field("FacebookAI/roberta-large", description="a Hub name or a folder")
    bert_score_revision: str | None = Field(None, description="the Hub commit")
    bert_score_layer: int = Field(17, ge=1, description="hidden layer that is compared; 17 is roberta-large's")
    spacy_model: str | None = Field(
        None, description="a trained spaCy pipeline by name or path; null: blank English with lookup lemmas"
    )
    code_timeout_s: float = Field(10.0, gt=0, description="wall-clock limit of one problem's tests in the sandbox")
    code_memory_mb: int = Field(512, ge=64, description="memory limit there")


class Eval(Section):
    """Stage 3. Changes no cached number and no adapter."""

    engine: Literal["hf", "vllm"] = Field("hf", description="what generates")
    splits: list[Literal["train", "validation", "test"]] = Field(["test"], min_length=1, description="what is scored")
    baselines: list[Literal["zero_shot", "few_shot"]] = Field(
        ["zero_shot", "few_shot"], description="the untouched student, without and with the worked examples"
    )
    references: dict[Name, Reference] = Field({}, description="row of the results -> a model scored as it is")
    shots: int = Field(
        0, ge=0, description="worked examples before unseen tasks' prompts, scored with and without them; 0: without"
    )
    metrics: Metrics = Metrics()
    max_new_tokens: int = Field(400, ge=1, description="where a generation is cut; such answers are counted")
    batch_size: int = Field(64, ge=1, description="prompts generated together (hf)")
    curve_limit: int | None = Field(
        None,
        ge=1,
        description="score all but the headline checkpoints on the first so many examples; null: on all",
    )
    select: Literal["last", "held_out"] = Field(
        "last",
        description="the checkpoint in an arm's headline row: the last, or the best on data.held_out rows",
    )


class Runtime(Section):
    """Where and how it runs: provenance, never identity."""

    python: dict[Literal["stage1_teacher", "stage2_student", "stage3_eval"], str] = Field(
        {}, description="another interpreter for a stage (vLLM in an environment of its own)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = Field(
        None, description="stage 1 on hf: how accelerate spreads a teacher's layers over all GPUs; null: one device"
    )
    tensor_parallel: int = Field(1, ge=1, description="stage 1 on vllm: GPUs that share every layer of the teacher")
    batch_tokens: int = Field(
        4096, ge=1, description="stage 1: padded tokens in a batch, encoder's and decoder's; not the shared context"
    )
    processes: int = Field(1, ge=1, description="stage 2: processes (one a GPU), started through torchrun when above 1")
    copies: str = Field(
        "~/.cache/logitbank", description="where data files of a cache at a URL are kept while they are read"
    )
    copies_gb: float = Field(64.0, gt=0, description="how much to keep there; what was used longest ago goes first")
    executor: str = Field(
        "local",
        description="stages 1 and 3: local; ray, a cluster made on this machine or the one that runs here or that "
        "RAY_ADDRESS names; or ray://HOST:PORT",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="ray: how many, each with its own model; null: one a GPU, or, without any, one a machine",
    )

    @field_validator("executor")
    @classmethod
    def _known_executor(cls, executor: str) -> str:
        if not re.fullmatch(r"local|ray|ray://[^\s:/]+:\d+", executor):
            raise ValueError(f"expected local, ray or ray://HOST:PORT, found {executor!r}")
        return executor
