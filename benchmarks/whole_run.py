"""A whole first run of the published experiment, stages 1 and 2, against the same run with an online teacher.

    python benchmarks/whole_run.py [--model mid] [--device cpu] [--data FOLDER] [--rounds 3]

Nobody runs it 1,000 steps for this: it is put together from rates measured side by side, round by round,

    first run      7,465 examples / stage 1's examples per second + 1,000 steps from the cache
    further run    1,000 steps from the cache: another student, or another arm
    online run     1,000 steps with the teacher reading along, as published and at best (see stage2_cost.py)

each step of 32 examples (a step of fewer, where that is too much for the machine, is scaled). Loading models is in
none of them. The worked examples are read once in stage 1, which is left out as well: one forward of 1,200 tokens.
"""

from argparse import Namespace
from typing import Any

import stand_ins
from harness import Row, side_by_side
from stage1_cost import Teaching
from stage2_cost import Training

EXAMPLES, STEPS, BATCH = 7_465, 1_000, 32
FIRST = {"as published": "<= 0.65", "best": ""}
FURTHER = {"as published": "<= 0.62", "best": ""}


def measure(name: str, args: Namespace) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one model, and its conditions: the rates and what was made of them."""
    training, teaching = Training(name, args), Teaching(name, args, None)
    steps = training.steps()
    online = {kind: steps[f"online, {kind}"] for kind in FIRST}
    times = side_by_side({"stage 1": teaching.stage1(), "distill": steps["distill"], **online}, args.rounds)

    def steps_s(kind: str) -> list[float]:
        return [STEPS * BATCH / training.batch_size * seconds for seconds in times[kind]]

    stage1_s = [EXAMPLES / teaching.examples * seconds for seconds in times["stage 1"]]
    further_s = steps_s("distill")
    first_s = [a + b for a, b in zip(stage1_s, further_s, strict=True)]
    rows = []
    for kind in FIRST:
        against, online_s = f"the run with an online teacher, {kind}", steps_s(kind)
        rows.append(Row.of_times(f"first run, stages 1 and 2 ({name})", against, first_s, online_s, FIRST[kind]))
        rows.append(Row.of_times(f"every further student ({name})", against, further_s, online_s, FURTHER[kind]))
    middle = {"stage 1": stage1_s, "1,000 steps, distill": further_s} | {
        f"1,000 steps, online, {kind}": steps_s(kind) for kind in FIRST
    }
    return rows, stand_ins.describe(training.experiment) | {
        "seconds": {what: round(sorted(found)[len(found) // 2], 1) for what, found in middle.items()},
        "arithmetic": f"first = {EXAMPLES:,} / (examples/s) + {STEPS:,} * step; online = {STEPS:,} * online step",
        "measured on": f"{teaching.examples} examples, and steps of {training.batch_size} scaled to {BATCH}",
    }


if __name__ == "__main__":
    raise SystemExit(stand_ins.run("whole_run", __doc__, measure, {"cpu": ["mid"], "cuda": ["qwen3-1.7b"]}, rounds=3))
