"""The points of a sweep: which there are, what they are called, what they share, and what is refused."""

import pytest

from pipeline.errors import RecipeError
from pipeline.fingerprint import Experiment
from pipeline.recipe import load_recipe
from pipeline.sweep import chosen, points, sources, sweep_dir

LR = "train.lr=1e-4,2e-4"
MSE = "arms.distill.logit_mse=0.25,0.5,1"


def test_every_combination_is_a_point_with_a_folder_of_its_own():
    found = points("pocket", ["train.steps=20"], [LR, MSE])
    assert [(p.recipe.train.lr, p.recipe.arms["distill"].logit_mse) for p in found] == [
        (lr, weight) for lr in (1e-4, 2e-4) for weight in (0.25, 0.5, 1.0)
    ]
    assert {p.recipe.train.steps for p in found} == {20}
    roots = {p.run_dir.root for p in found}
    assert len(roots) == 6 and {root.parent for root in roots} == {sweep_dir(load_recipe("pocket"))}
    assert all(root.name == p.name for p in found for root in [p.run_dir.root])


def test_the_arguments_of_a_point_mean_its_recipe():
    for point in points(
        "pocket", ["train.steps=20", "train.lr=5"], [LR, "students.pocket.lora.targets=[q_proj],all-linear"]
    ):
        name, *rest = point.arguments[1:]
        assert rest[::2] == ["--set"] * (len(rest) // 2)
        assert load_recipe(name, rest[1::2]) == point.recipe


def test_a_name_depends_on_keys_and_values_alone():
    one = {p.name for p in points("pocket", [], [LR, MSE])}
    other = {p.name for p in points("pocket", [], ["arms.distill.logit_mse=1,.5,0.250", "train.lr=0.0002,1.0e-4"])}
    assert one == other
    assert not one & {p.name for p in points("pocket", [], ["train.lr=3e-4", MSE])}
    assert all(len(name) < 80 and name.isascii() and "/" not in name for name in one)


def test_values_are_yaml_and_may_hold_commas():
    found = points("pocket", [], ["arms.distill={ce: 1.0, logit_mse: 1.0},{ce: 0.5, kl: 1.0}"])
    assert [p.recipe.arms["distill"].kl for p in found] == [0.0, 1.0]
    found = points("pocket", [], ["students.pocket.lora.targets=[q_proj, k_proj],all-linear"])
    assert [p.recipe.students["pocket"].lora.targets for p in found] == [["q_proj", "k_proj"], "all-linear"]


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (["train.lr=1e-4,0"], r"--over train\.lr=0: (.|\n)*greater than 0; found 0"),
        (["train.lrs=1,2"], r"unknown key 'lrs'. Did you mean 'lr'"),
        (["arms.destill.kl=1,2"], r"unknown arm 'destill'"),
        (["train.lr"], r"expected key=value,value"),
        (["train.lr=1e-4,,2e-4"], r"expected key=value,value"),
        (["train.lr=1e-4,0.0001"], r"train\.lr=0\.0001: given twice"),
        (["train.lr=1e-4", "train.lr=2e-4"], r"--over train\.lr: given twice"),
        (["cache.top_k=8,16"], r"One cache, many students: (.|\n)*--set cache\.top_k="),
        (["cache={top_k: 8}"], r"One cache, many students"),
        (["teacher.shots=4,8"], r"teacher is about the cache"),
        (["data.eval_limit=4,8"], r"data is about the cache and the examples"),
        (["eval.splits=[test],[train]"], r"decides what is scored"),
        (["eval={splits: [train]}"], r"eval\.splits decides what is scored"),
        (["name=a,b"], r"names the cache"),
        (["run_dir=a,b"], r"each point's own"),
    ],
)
def test_what_a_sweep_cannot_have_is_refused(over, words):
    with pytest.raises(RecipeError, match=words):
        points("pocket", [], over)


def test_no_point_has_another_cache():
    """Keys of every section that may be swept; and the control, that those refused do make another."""
    base = Experiment(load_recipe("pocket"))
    swept = ["train.seed=1", "students.pocket.lora.r=8", "arms.distill.logit_mse=2", "eval.max_new_tokens=8"]
    (point,) = points("pocket", [], [*swept, "runtime.batch_tokens=64"])
    assert Experiment(point.recipe).identity == base.identity
    assert Experiment(load_recipe("pocket", ["cache.top_k=8"])).identity != base.identity
    assert Experiment(load_recipe("pocket", ["teacher.shots=4"])).identity != base.identity


def test_against_names_one_point():
    found = points("pocket", [], [LR, MSE])
    assert chosen(found, []) is found[0]
    assert chosen(found, ["train.lr=0.0002", "arms.distill.logit_mse=1"]) is found[5]
    with pytest.raises(RecipeError, match=r"found 3 such points; these are:\n  train\.lr=0\.0002 arms"):
        chosen(found, ["train.lr=2e-4"])
    with pytest.raises(RecipeError, match=r"found 0 such points; the points are"):
        chosen(found, ["train.lr=7"])


def test_what_the_swept_keys_do_not_touch_is_taken_from_the_earliest_point():
    sft = {("arm", "pocket", "sft"), ("answers", "pocket", "sft")}
    untouched = {("baselines", "pocket")}
    taken = sources(points("pocket", [], [LR, MSE]))
    assert [set(of) for of in taken] == [
        set(),
        sft | untouched,
        sft | untouched,
        untouched,
        sft | untouched,
        sft | untouched,
    ]
    assert [of.get(("arm", "pocket", "sft")) for of in taken] == [None, 0, 0, None, 3, 3]
    assert {of[("baselines", "pocket")] for of in taken[1:]} == {0}


@pytest.mark.parametrize(
    ("over", "left"),
    [
        ("eval.max_new_tokens=8,9", {("arm", "pocket", "sft"), ("arm", "pocket", "distill")}),
        ("students.pocket.dtype=float32,bfloat16", set()),
        ("students.pocket.lora.r=8,16", {("baselines", "pocket")}),
        ("train.seed=0,1", {("baselines", "pocket")}),
    ],
)
def test_nothing_is_taken_that_the_swept_key_decides(over, left):
    assert set(sources(points("pocket", [], [over]))[1]) == left
