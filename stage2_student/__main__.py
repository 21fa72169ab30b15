"""Stage 2: train the students from the cache.

    python -m stage2_student --recipe pocket [--set key=value]... [--student NAME] [--arm NAME]

Several processes: set runtime.processes, or start it through `torchrun --standalone --nproc_per_node N -m
stage2_student ...` oneself. Called again it goes on from the newest checkpoints, or says that all is done.
"""

import os
import sys
from collections.abc import Sequence

from pipeline.cli import guarded, recipe_arguments, recipe_of, recipe_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Find what is left to do, then train it. The teacher is never loaded; models are, only if something is left."""
    parser = recipe_parser("stage2_student", "Stage 2: train the students from the cache.")
    parser.add_argument("--student", metavar="NAME", help="this student alone")
    parser.add_argument("--arm", metavar="NAME", help="this arm alone")
    args = parser.parse_args(argv)
    recipe = recipe_of(args)

    from cache_schema.reader import CacheReader
    from pipeline.fingerprint import Experiment
    from stage2_student.arms import plan

    experiment = Experiment(recipe)
    arms = plan(experiment, args.student, args.arm)
    left = [arm for arm in arms if arm.done < recipe.train.steps]
    several = recipe.runtime.processes > 1 and "WORLD_SIZE" not in os.environ
    if int(os.environ.get("RANK", "0")) == 0 and not (left and several):
        for arm in arms:
            state = "done" if arm not in left else f"to go on from step {arm.done}" if arm.done else "to be trained"
            print(f"{arm.label}: {state} ({recipe.train.steps} steps) {arm.folder.root}", flush=True)
    if not left:
        return 0
    reader = CacheReader.open(experiment.cache_dir, expect=experiment.identity)
    if several:
        chosen = [part for name in ("student", "arm") if (v := getattr(args, name)) for part in (f"--{name}", v)]
        return _in_processes(recipe.runtime.processes, [*recipe_arguments(args), *chosen])

    from stage2_student.train import train

    train(recipe, reader, left)
    return 0


def _in_processes(count: int, arguments: Sequence[str]) -> int:
    """The same command line once more in `count` processes of one group; the exit code of the first that failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    try:
        torchrun(["--standalone", f"--nproc_per_node={count}", "-m", "stage2_student", *arguments])
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
