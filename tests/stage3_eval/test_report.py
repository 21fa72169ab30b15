"""Results, table and pictures from predictions made up here: every number can be counted by hand."""

import json
from pathlib import Path

import pytest
import toys

from pipeline.errors import RunError
from pipeline.recipe import load_recipe
from pipeline.run_dir import RunDir
from pipeline.tasks import Example
from stage3_eval.blocks import Block
from stage3_eval.conditions import Condition, TrainedRun
from stage3_eval.evaluate import Evaluated
from stage3_eval.predictions import Prediction, PredictionFile
from stage3_eval.report import pictures, read_losses, write_report
from stage3_eval.report.results import results
from stage3_eval.report.rows import reference_arm
from stage3_eval.report.tables import tables_of

GOLDEN = Path(__file__).parent.parent / "golden" / "stage3_table.md"
EXAMPLES = tuple(Example(f"test/{i:02d}", "gsm8k", "?", f"#### {i}") for i in range(20))

# Condition -> right answers, wrong ones, answers without the mark but right, answers without a number; of 20.
MADE = {
    "zero_shot": (2, 3, 10, 5),
    "few_shot": (16, 3, 1, 0),
    "sft@2": (10, 8, 2, 0),
    "sft@4": (9, 10, 1, 0),
    "distill@2": (17, 3, 0, 0),
    "distill@4": (18, 2, 0, 0),
}


def answers(right: int, wrong: int, bare: int, none: int) -> dict[str, Prediction]:
    texts = [f"#### {i}" for i in range(right)]
    texts += ["#### -1"] * wrong
    texts += [f"it is {len(texts) + i}" for i in range(bare)]
    texts += ["I do not know"] * none
    return {
        example.id: Prediction(example.id, "gsm8k", "", text, 6, text != "I do not know")
        for example, text in zip(EXAMPLES, texts, strict=True)
    }


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(str(toys.tiny_recipe(tmp_path)))


TEST = (Block("test", EXAMPLES, EXAMPLES),)


def made_up(conditions=MADE, held_out=None) -> Evaluated:
    runs: dict[str, dict[int, Condition]] = {}
    for name in conditions:
        run, at, step = name.partition("@")
        if at:
            runs.setdefault(run, {})[int(step)] = Condition(name, run, int(step))
    return Evaluated(
        name="toy",
        runs=tuple(TrainedRun(run, run.partition("~")[0], steps, {"cache": "f" * 64}) for run, steps in runs.items()),
        headline={run: max(steps) for run, steps in runs.items()},
        held_out=held_out or {},
        files={
            (name, "test"): PredictionFile(Path("p.zst"), {}, answers(*counts), {"engine": "hf"})
            for name, counts in conditions.items()
        },
    )


def strict_of(found):
    return found["students"]["toy"]["blocks"]["test"]["gsm8k"]["strict"]


def test_results_hold_every_condition_with_its_errors_and_its_test(recipe):
    found = results(recipe, TEST, [made_up()], {})
    strict = strict_of(found)
    assert list(strict["rows"]) == ["zero_shot", "few_shot", "sft", "distill"]
    sft, distill = strict["rows"]["sft"], strict["rows"]["distill"]
    assert (sft["n"], sft["mean"], sft["unparsable"], sft["unfinished"]) == (20, 9 / 20, 1, 0)
    assert sft["standard_error"] == pytest.approx((0.45 * 0.55 / 20) ** 0.5)
    assert sft["interval"] == pytest.approx([0.2582, 0.6579], abs=5e-5)
    assert sft["difference"] is None
    difference = distill["difference"]
    assert (difference["to"], difference["n"], difference["better"], difference["worse"]) == ("sft", 20, 9, 0)
    assert difference["mean"] == pytest.approx(9 / 20)
    assert difference["p"] == pytest.approx(2 / 2**9)
    zero_shot = strict["rows"]["zero_shot"]
    assert (zero_shot["unparsable"], zero_shot["unfinished"], zero_shot["checkpoint"]) == (15, 5, None)
    assert (sft["checkpoint"], distill["checkpoint"]) == (4, 4)


def test_flexible_reads_what_strict_does_not(recipe):
    metrics = results(recipe, TEST, [made_up()], {})["students"]["toy"]["blocks"]["test"]["gsm8k"]
    zero_shot = metrics["flexible"]["rows"]["zero_shot"]
    assert (zero_shot["mean"], zero_shot["unparsable"]) == (12 / 20, 5)


def test_the_curve_is_adjusted_over_its_checkpoints(recipe):
    strict = strict_of(results(recipe, TEST, [made_up()], {}))
    two, four = strict["curve"]["distill"]
    assert (two["step"], two["difference"]["better"], two["difference"]["worse"]) == (2, 7, 0)
    assert two["difference"]["p"] == pytest.approx(2 / 2**7)
    assert two["difference"]["p_holm"] == pytest.approx(2 / 2**7)
    assert four["difference"]["p_holm"] == pytest.approx(2 * 2 / 2**9)
    assert [row["difference"] for row in strict["curve"]["sft"]] == [None, None]


def test_the_best_on_test_is_labelled_and_is_not_the_headline(recipe):
    strict = strict_of(results(recipe, TEST, [made_up()], {}))
    best = strict["best_on_test"]["sft"]
    assert (best["step"], best["n"], best["mean"], best["is_headline"]) == (2, 20, 0.5, False)
    assert "biased upwards" in best["note"]
    assert strict["rows"]["sft"]["mean"] == 0.45


def test_a_short_curve_compares_the_same_examples(recipe):
    found = results(recipe, [Block("test", EXAMPLES, EXAMPLES[:10])], [made_up()], {})
    strict = strict_of(found)
    assert {row["n"] for rows in strict["curve"].values() for row in rows} == {10}
    assert strict["curve_baselines"]["few_shot"]["n"] == 10
    assert strict["rows"]["sft"]["n"] == 20
    assert strict["best_on_test"]["distill"]["n"] == 10
    assert "Checkpoints, on the first 10 examples:" in tables_of(found)
    assert "chosen on these same 10 examples" in tables_of(found)


def test_without_an_sft_arm_nothing_is_compared_but_all_is_shown(tmp_path):
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path, arms={"sft": None})))
    found = results(recipe, TEST, [made_up({k: v for k, v in MADE.items() if "sft" not in k})], {})
    conditions = strict_of(found)["rows"]
    assert reference_arm(recipe) is None
    assert list(conditions) == ["zero_shot", "few_shot", "distill"]
    assert all(cell["difference"] is None for cell in conditions.values())
    assert "difference to" not in tables_of(found)


def test_another_arm_without_a_teacher_is_the_reference(tmp_path):
    recipe = load_recipe(str(toys.tiny_recipe(tmp_path, arms={"sft": None, "plain": {"ce": 1.0}})))
    assert reference_arm(recipe) == "plain"


def test_baselines_alone_make_a_report(recipe):
    evaluated = made_up({name: MADE[name] for name in ("zero_shot", "few_shot")})
    table, files = write_report(recipe, TEST, [evaluated], ["stage3_eval"])
    assert "zero_shot" in table
    assert "Checkpoints" not in table
    assert [path.name for path in files] == ["report.html", "results.json", "table.md", "comparison.png"]


def test_the_table_is_the_golden_one(recipe):
    held_out = {"sft": {2: 0.5, 4: 0.25}, "distill": {2: 0.75, 4: 1.0}}
    table = tables_of(results(recipe, TEST, [made_up(held_out=held_out)], {}))
    assert table == GOLDEN.read_text(encoding="utf-8")


def test_a_report_is_written_whole_and_says_where_it_comes_from(recipe):
    run_dir = RunDir.of(recipe)
    for arm in ("sft", "distill"):
        metrics = run_dir.arm("toy", arm).metrics
        metrics.parent.mkdir(parents=True)
        metrics.write_text("".join(json.dumps({"step": s, "ce": 1 / s}) + "\n" for s in range(1, 5)))
    table, files = write_report(recipe, TEST, [made_up()], ["stage3_eval", "--recipe", "tiny"])
    assert sorted(path.name for path in run_dir.report.iterdir()) == [
        "comparison.png", "curves.png", "loss.png", "report.html", "results.json", "table.md",
    ]  # fmt: skip
    assert [path.name for path in files] == [
        "report.html", "results.json", "table.md", "comparison.png", "curves.png", "loss.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files[3:])
    assert (run_dir.report / "table.md").read_text() == table
    provenance = json.loads((run_dir.report / "results.json").read_text())["provenance"]
    assert provenance["command"] == ["python", "-m", "stage3_eval", "--recipe", "tiny"]
    assert provenance["cache_fingerprint"] == "f" * 64
    assert provenance["recipe"]["name"] == "tiny"
    assert provenance["predictions"]["toy"]["sft@4 on test"] == {"file": "p.zst", "engine": "hf"}


def test_pictures_show_the_numbers(recipe):
    found = results(recipe, TEST, [made_up()], {})
    metrics = found["students"]["toy"]["blocks"]["test"]["gsm8k"]
    colours = pictures._colours(found)
    bars = pictures._comparison(metrics, "title", colours).axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([10, 80, 45, 90])
    lines = {line.get_label(): list(line.get_ydata()) for line in pictures._curves(metrics, "", colours).axes[0].lines}
    assert lines["sft"] == pytest.approx([50, 45])
    assert lines["distill"] == pytest.approx([85, 90])
    assert lines["few-shot (untrained)"] == pytest.approx([80, 80])
    losses = {"sft": {1: 3.0, 2: 1.0}, "distill": {}}
    drawn = {line.get_label(): list(line.get_ydata()) for line in pictures._loss(losses, "", colours).axes[0].lines}
    assert drawn["sft"] == pytest.approx([2.0, 2.0])


def test_the_running_mean_shrinks_at_the_ends():
    assert pictures._smooth([1.0, 2.0, 6.0, 3.0], 1) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])


def test_losses_of_a_resumed_run_are_the_last_ones(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "ce": 3.0}, {"step": 2, "ce": 2.0}, {"step": 2, "ce": 2.5}, {"step": 3, "kl": 1.0}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "c')
    assert read_losses(metrics) == {1: 3.0, 2: 2.5}
    assert read_losses(tmp_path / "none.jsonl") == {}
    metrics.write_text('{"step": 1, "c\n{"step": 2, "ce": 2.0}\n')
    with pytest.raises(RunError, match="line 1: not a step's metrics"):
        read_losses(metrics)


def test_a_file_in_place_of_the_report_folder_is_said(recipe):
    run_dir = RunDir.of(recipe)
    run_dir.root.mkdir()
    run_dir.report.write_text("")
    with pytest.raises(RunError, match="found a file, expected a folder"):
        write_report(recipe, TEST, [made_up()], [])


def test_a_missing_prediction_makes_no_report(recipe):
    evaluated = made_up()
    del evaluated.files["sft@4", "test"].predictions["test/07"]
    with pytest.raises(RunError, match=r"toy/sft@4 on test: 1 of 20 predictions are missing \(test/07"):
        results(recipe, TEST, [evaluated], {})
