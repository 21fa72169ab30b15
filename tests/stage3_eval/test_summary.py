"""The published table of a mixture, over seeds, from predictions made up here: every number can be counted by hand."""

from pathlib import Path

import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from pipeline.recipe import load_recipe
from pipeline.tasks import Example
from stage3_eval.blocks import Block
from stage3_eval.compare import Z_95, Difference, difference, estimate, holm, over_seeds, p_over_seeds
from stage3_eval.conditions import Condition, TrainedRun
from stage3_eval.evaluate import Evaluated
from stage3_eval.predictions import Prediction, PredictionFile
from stage3_eval.report import pictures, summary, write_report
from stage3_eval.report.results import results
from stage3_eval.report.summary import summary_of
from stage3_eval.report.tables import tables_of

GOLDEN = Path(__file__).parent.parent / "golden" / "stage3_summary.md"
BOOLQ = tuple(
    Example(f"test/boolq-{i}", "boolq", "?", "yes", labels=("no", "yes"), truncated=i == 0) for i in range(10)
)
SQUAD = tuple(Example(f"test/squad-{i}", "squad", "?", "red cat", references=("red cat",)) for i in range(10))
ENG_SPA = tuple(Example(f"test/eng_spa-{i}", "eng_spa", "?", "El gato rojo duerme hoy.") for i in range(10))
BLOCKS = (Block("test", BOOLQ + SQUAD, BOOLQ + SQUAD), Block("unseen_zero_shot", ENG_SPA))

# Condition -> of 10: boolq answers that are right, and that are no label; boolq labels weighed rightly; squad answers
# that are right, and that are half right (F1 2/3); translations that are right.
MADE = {
    "zero_shot": (1, 8, 5, 0, 2, 0),
    "sft@4": (6, 1, 7, 4, 2, 3),
    "sft~1@4": (7, 0, 7, 5, 1, 4),
    "distill@4": (8, 0, 8, 4, 2, 2),
    "distill~1@4": (8, 1, 9, 4, 2, 1),
    "distill_index@4": (10, 0, 10, 3, 0, 3),
    "distill_index~1@4": (9, 0, 10, 3, 0, 3),
}


def answers(boolq: int, neither: int, weighed: int, squad: int, half: int, spanish: int, too_long: bool) -> list:
    """The predictions of one condition; with too_long the first boolq example was not asked."""
    made = []
    for i, example in enumerate(BOOLQ):
        text = "yes" if i >= 10 - boolq else "perhaps" if i < neither else "no"
        logprobs = (-2.0, -1.0) if i >= 10 - weighed else (-1.0, -2.0)
        made.append(Prediction(example.id, "boolq", "", text, 2, True, logprobs))
    if too_long:
        made[0] = Prediction.unanswered(BOOLQ[0], "")
    for i, example in enumerate(SQUAD):
        text = "red cat" if i < squad else "cat" if i < squad + half else "dog"
        made.append(Prediction(example.id, "squad", "", text, 3, i != 9))
    for i, example in enumerate(ENG_SPA):
        text = example.answer if i < spanish else "Una casa blanca espera."
        made.append(Prediction(example.id, "eng_spa", "", text, 7, True))
    return made


def model(name, conditions, too_long=False) -> Evaluated:
    runs = {}
    for condition in conditions:
        run, at, step = condition.partition("@")
        if at:
            steps = {int(step): Condition(condition, run, int(step))}
            runs[run] = TrainedRun(run, run.partition("~")[0], steps, {})
    files = {}
    for condition, counts in conditions.items():
        made = answers(*counts, too_long=too_long)
        for block in BLOCKS:
            asked = {e.id for e in block.examples}
            kept = {p.id: p for p in made if p.id in asked}
            files[condition, block.name] = PredictionFile(Path("p.zst"), {}, kept, {"engine": "hf"})
    return Evaluated(name, tuple(runs.values()), dict.fromkeys(runs, 4), {}, files)


MODELS = [
    model("flan", {"zero_shot": (9, 0, 9, 6, 3, 1)}),
    model("gpt2", MADE, too_long=True),
    model("smol", {name: counts for name, counts in MADE.items() if "~" not in name}),
]


@pytest.fixture(autouse=True, scope="module")
def fewer_resamples():
    """A tenth of the bootstrap's: the intervals of BLEU take seconds, and no test here is about them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stage3_eval.compare._RESAMPLES", 1000)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    student = {"model": "toy", "dtype": "float32"}
    arm = {"ce": 1.0, "uld": 0.5}
    return load_recipe(
        str(
            toys.tiny_recipe(
                folder,
                data={"tasks": {"gsm8k": None, "boolq": {}, "squad": {}, "eng_spa": {"train": 0}}},
                teacher={"shots": 0},
                students={"toy": None, "gpt2": student, "smol": student},
                train={"repeats": 2},
                arms={"distill": arm, "distill_index": {**arm, "alignment": "index"}},
                eval={"baselines": ["zero_shot"], "references": {"flan": {"model": "toy"}}},
            )
        )
    )


@pytest.fixture(scope="module")
def found(recipe):
    return results(recipe, BLOCKS, MODELS, {"recipe": recipe.model_dump(mode="json")})


def cells(found, student, block, task, metric):
    return found["students"][student]["blocks"][block][task][metric]["rows"]


def test_an_arms_row_is_the_mean_over_its_seeds(found):
    row = cells(found, "gpt2", "test", "boolq", "accuracy")["sft"]
    assert (row["seeds"], row["n"], row["checkpoint"]) == (2, 10, 4)
    assert [run["mean"] for run in row["runs"]] == [0.6, 0.7]
    assert row["mean"] == pytest.approx(0.65)
    expected = over_seeds([estimate([1.0] * k + [0.0] * (10 - k)) for k in (6, 7)])
    assert row["interval"] == pytest.approx([max(expected.low, 0), min(expected.high, 1)])
    assert row["standard_error"] == pytest.approx(expected.standard_error)
    assert [run["unparsable"] for run in row["runs"]] == [0, 0]  # the one that is no label was not asked
    assert (row["unparsable"], row["too_long"]) == (0.0, 1.0)
    assert cells(found, "gpt2", "test", "boolq", "accuracy")["zero_shot"]["seeds"] == 0


def test_a_difference_is_paired_by_seed_and_by_example(found):
    difference_ = cells(found, "gpt2", "test", "boolq", "accuracy")["distill"]["difference"]
    by_hand = [
        difference([float(i >= 10 - a) for i in range(10)], [float(i >= 10 - b) for i in range(10)])
        for a, b in ((8, 6), (8, 7))
    ]
    assert [run["mean"] for run in difference_["runs"]] == pytest.approx([0.2, 0.1])
    assert [run["p"] for run in difference_["runs"]] == [d.p for d in by_hand]
    assert (difference_["to"], difference_["seeds"], difference_["n"]) == ("sft", 2, 10)
    assert difference_["mean"] == pytest.approx(0.15)
    base = cells(found, "gpt2", "test", "boolq", "accuracy")["zero_shot"]["difference"]
    assert [run["mean"] for run in base["runs"]] == pytest.approx([-0.5, -0.6])  # it has no seeds: to each of sft's
    assert all("difference" not in row for row in found["references"]["flan"]["blocks"]["test"]["boolq"].values())


def test_a_further_distilled_arm_is_compared_with_the_first_too(found):
    rows = cells(found, "gpt2", "test", "boolq", "accuracy")
    further = rows["distill_index"]["difference_to_distilled"]
    assert further["to"] == "distill"
    assert [run["mean"] for run in further["runs"]] == pytest.approx(
        [0.1, 0.1]
    )  # 9 (one was not asked) and 9 against 8
    assert [(run["better"], run["worse"]) for run in further["runs"]] == [(1, 0), (1, 0)]
    assert [name for name, row in rows.items() if "difference_to_distilled" in row] == ["distill_index"]


def test_p_values_are_adjusted_over_the_columns_of_a_block(found):
    columns = [("boolq", "accuracy"), ("boolq", "label_likelihood"), ("squad", "f1"), ("squad", "exact_match")]
    differences = [cells(found, "smol", "test", *column)["distill_index"]["difference"] for column in columns]
    assert [d["p_holm"] for d in differences] == holm([d["p"] for d in differences])
    assert differences[0]["p"] == pytest.approx(2 / 2**4)
    assert differences[0]["p_holm"] > differences[0]["p"]


def test_an_example_that_was_not_asked_is_wrong_for_every_metric(found):
    rows = cells(found, "gpt2", "test", "boolq", "label_likelihood")
    assert rows["distill_index"]["mean"] == pytest.approx(0.9)  # all ten were weighed rightly, but for the first
    assert cells(found, "smol", "test", "boolq", "label_likelihood")["distill_index"]["mean"] == 1.0
    assert rows["distill_index"]["unparsable"] == 0


def test_the_better_one_of_a_pair_is_bold_and_both_where_they_print_the_same(found):
    assert found["pair"] == ("sft", "distill")
    lines = summary_of(found).splitlines()
    table = lines[lines.index("## Test split") + 2 : lines.index("## Test split") + 13]
    values = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table}
    assert values["model"] == ["boolq acc", "squad F1", "squad EM"]
    assert values["flan"] == ["90.00", "80.00", "60.00"]
    assert values["gpt2 sft (2 seeds)"] == ["65.00", "**55.00**", "**45.00**"]
    assert values["gpt2 distill (2 seeds)"] == ["**80.00**", "53.33", "40.00"]
    assert values["gpt2 distill_index (2 seeds)"] == ["90.00", "30.00", "30.00"]  # further arms are not of the pair
    assert values["smol sft"] == ["60.00", "**53.33**", "**40.00**"]
    assert values["smol distill"] == ["**80.00**", "**53.33**", "**40.00**"]


def test_the_summary_is_the_golden_one(found):
    assert summary_of(found) == GOLDEN.read_text(encoding="utf-8")


def test_a_table_too_wide_for_a_terminal_goes_on_below_with_the_columns_of_a_task_together():
    tasks = [f"task_{i}" for i in range(10) for _ in range(2)]
    head = ["model", *(f"{task} metric {i % 2}" for i, task in enumerate(tasks))]
    rows = [[name, *(f"{i:.2f}" for i in range(20))] for name in ("base", "sft")]
    tables = [part.splitlines() for part in summary._stacked(head, rows, tasks).split("\n\n")]
    assert [table[0].count("metric") for table in tables] == [6, 6, 6, 2]
    assert all(100 < len(line) <= 150 for table in tables[:3] for line in table)
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in (t[-1] for t in tables)]
    assert [cell for part in cells for cell in part] == [f"{i:.2f}" for i in range(20)]
    assert [table[3].split("|")[1].strip() for table in tables] == ["sft"] * 4


def test_a_student_without_an_answer_makes_no_row_and_no_error(recipe):
    """Before its first checkpoint, with no baseline asked of it; and where nobody has answered anything."""
    text = summary_of(results(recipe, BLOCKS, [MODELS[0], model("gpt2", {}, too_long=True), MODELS[2]], {}))
    assert "| smol sft " in text and "gpt2" not in text
    assert "| boolq, test split             |       10 |            1 |" in text
    text = summary_of(results(recipe, BLOCKS, [model("gpt2", {})], {}))
    assert text.count("No answers yet.") == len(BLOCKS)
    untouched = results(recipe, BLOCKS, [model("gpt2", {"zero_shot": MADE["zero_shot"]})], {})
    assert "differences in points" not in summary_of(untouched)


def test_a_column_has_one_kind_of_interval_over_all_models_and_one_name(recipe):
    """The student's answers here are all right or wrong; the reference's are half right, so F1 is no accuracy."""
    alone = model("smol", {"zero_shot": (1, 8, 5, 2, 0, 0)})
    binary = results(recipe, BLOCKS, [alone], {})
    both = results(recipe, BLOCKS, [MODELS[0], alone], {})
    assert binary["students"]["smol"]["blocks"]["test"]["squad"]["f1"]["right_or_wrong"]
    assert not both["students"]["smol"]["blocks"]["test"]["squad"]["f1"]["right_or_wrong"]
    assert both["students"]["smol"]["blocks"]["test"]["squad"]["exact_match"]["right_or_wrong"]
    values = [1.0] * 2 + [0.0] * 8
    for found, graded in ((binary, False), (both, True)):
        expected = estimate(values, graded)
        interval = cells(found, "smol", "test", "squad", "f1")["zero_shot"]["interval"]
        assert interval == [expected.low, expected.high]
    details = tables_of(both)
    assert "| condition | checkpoint |  n |   score |" in details.partition("### f1")[2].partition("###")[0]


def test_each_report_says_over_what_its_p_values_are_adjusted(found):
    assert "adjustment over the metrics of a block" in summary_of(found)
    assert "over the checkpoints" not in summary_of(found)
    assert "adjusted over the checkpoints of an arm" in tables_of(found)
    assert "BLEU and chrF are of a corpus" in summary_of(found)


def test_the_report_of_a_mixture_has_the_summary_and_the_details(recipe, tmp_path):
    recipe = recipe.model_copy(update={"run_dir": str(tmp_path / "run")})
    text, files = write_report(recipe, BLOCKS, MODELS, ["stage3_eval"])
    assert [path.name for path in files] == [
        "report.html", "results.json", "table.md", "details.md",
        "differences-test.png", "differences-unseen_zero_shot.png",
    ]  # fmt: skip
    assert all(path.is_file() for path in files)
    assert files[2].read_text() == text
    details = files[3].read_text()
    assert "## Student `gpt2`, task `eng_spa`, unseen tasks, 0-shot" in details
    assert "| distill (2 seeds) " in details and "60.00 70.00" in details
    assert "| flan " in details


def test_the_picture_of_differences_shows_the_numbers(found):
    axes = pictures._differences(found, "test", pictures._colours(found)).axes
    assert [axis.get_title() for axis in axes] == ["gpt2", "smol"]
    titles = [label.get_text() for label in axes[0].get_yticklabels()]
    assert titles == ["boolq acc", "squad F1", "squad EM", "boolq likelihood"]
    marks = [float(line.get_xdata()[0]) for line in axes[0].lines if line.get_marker() == "o"]
    series = {"distill": ("distill", "difference"), "distill_index": ("distill_index", "difference")}
    series["to distilled"] = ("distill_index", "difference_to_distilled")
    expected = [
        100 * cells(found, "gpt2", "test", *column)[series[arm][0]][series[arm][1]]["mean"]
        for arm in ("distill", "distill_index", "to distilled")
        for column in (("boolq", "accuracy"), ("squad", "f1"), ("squad", "exact_match"), ("boolq", "label_likelihood"))
    ]
    assert marks == pytest.approx(expected)


@given(
    values=st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=5),
    errors=st.lists(st.floats(0.001, 0.3), min_size=5, max_size=5),
)
def test_p_over_seeds_is_the_level_at_which_the_interval_ends_at_zero(values, errors):
    """Against the interval itself: below 0.05 exactly where the 95 % interval leaves zero out."""
    repeats = [
        Difference(9, v, e, v - e * Z_95, v + 2 * e * Z_95, 0.5, 1, 1, "")
        for v, e in zip(values, errors[: len(values)], strict=True)
    ]
    found, p = over_seeds(repeats), p_over_seeds(repeats)
    assert 0 <= p <= 1
    if min(abs(found.low), abs(found.high)) > 1e-9:
        assert (p < 0.05) == (found.low > 0 or found.high < 0)


def test_p_over_seeds_without_deviation_is_the_normal_tail():
    def p_of(values, error):
        return p_over_seeds(
            [Difference(9, v, error, v - error * Z_95, v + error * Z_95, 0.5, 1, 1, "") for v in values]
        )

    assert p_of([0.1, 0.1, 0.1], 0.05) == pytest.approx(0.0455, abs=1e-4)  # two standard errors
    assert p_of([0.1, -0.1], 0.0) == 1.0
    assert p_of([0.0, 0.2], 0.0) == pytest.approx(0.5)  # t of one degree at 1: Cauchy's quartile
