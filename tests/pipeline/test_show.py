"""`show`: where values came from, and an example as both sides see it."""

import pytest
import toys
import yaml

from pipeline.__main__ import main
from pipeline.errors import RecipeError
from pipeline.fingerprint import Experiment
from pipeline.looking import look, told
from pipeline.origins import origins
from pipeline.recipe import load_recipe


def test_every_value_has_the_line_it_stands_in(tmp_path):
    path = toys.tiny_recipe(tmp_path)
    overrides = ["train.lr=5e-4", "arms.kl={kl: 1.0}", "cache.top_k=8"]
    recipe = load_recipe(str(path), overrides)
    where = origins(str(path), overrides, recipe)
    lines = path.read_text(encoding="utf-8").splitlines()
    for leaf, origin in where.items():
        if origin.startswith("recipe.yaml:"):
            assert lines[int(origin.partition(":")[2]) - 1].strip().startswith(f"{leaf[-1]}:"), leaf
    assert where["train", "steps"].startswith("recipe.yaml:") and where["run_dir",].startswith("recipe.yaml:")
    assert where["train", "lr"] == where["arms", "kl", "kl"] == where["cache", "top_k"] == "--set"
    assert where["arms", "kl", "ce"] == where["train", "seed"] == "default"
    assert set(where.values()) - {"--set", "default"} == {o for o in where.values() if ":" in o}


def test_what_nobody_gave_says_what_decides_it():
    where = origins("pocket", [], load_recipe("pocket"))
    assert where["run_dir",] == "default: runs/pocket" and where["cache", "dir"].startswith("default: caches/pocket-")
    recipe = load_recipe("flan-uld")
    assert origins("flan-uld", [], recipe)["cache", "store_ids"].startswith(("derived: teacher.kind", "flan-uld.yaml:"))


@pytest.mark.parametrize("name", ["pocket", "pocket-uld"])
def test_what_is_printed_is_the_recipe_example_and_all(name, tmp_path, capsys):
    assert main(["show", "--recipe", name, "--set", "train.lr=3e-4"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "copy.yaml").write_text(printed, encoding="utf-8")
    assert load_recipe(str(tmp_path / "copy.yaml")) == load_recipe(name, ["train.lr=3e-4"])
    assert "# --set" in printed and "\n# teacher: embedded:" in printed and "(special)" in printed


def test_strange_strings_survive(tmp_path, capsys):
    strange = "a # b: 'c'\n\"d\" \u2028 é"
    path = toys.tiny_recipe(tmp_path, data={"dir": strange}, runtime={"copies": "~"})
    assert main(["show", "--recipe", str(path), "--no-example"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["data"]["dir"] == strange and tree["runtime"]["copies"] == "~"


def test_rows_places_and_the_mask_are_those_of_the_encoding(tmp_path):
    """Against what stage 1 reads: token by token, and the row of each answer token one place before it."""
    experiment = Experiment(load_recipe(str(toys.tiny_recipe(tmp_path))))
    found = look(experiment, 3)
    example = experiment.training_set.cached[3]
    encoded = experiment.teacher_prompts.encode(
        example.prompt, example.answer, experiment.training_set.shots.of(example)
    )
    teacher, student = found.sides
    assert [token.id for token in teacher.tokens] == encoded.input_ids
    answer = [token for token in teacher.tokens if token.row is not None]
    assert [token.id for token in answer] == encoded.answer_ids
    assert [token.read_at for token in answer] == [encoded.answer_start - 1 + t for t in range(len(answer))]
    assert "".join(token.text for token in answer[:-1]) == " " + example.answer and answer[-1].special
    assert [t.compared for t in student.tokens if t.row is not None] == [{"boundary": t} for t in range(len(answer))]
    assert student.folded == 0 and 0 < teacher.folded < encoded.answer_start
    text = told(found, full=False)
    assert f"... 2 worked examples, {teacher.folded:,} tokens (--full shows them) ..." in text
    whole = told(found, full=True)
    assert "worked examples, " in whole and "(--full" not in whole
    assert len(whole.splitlines()) - len(text.splitlines()) == teacher.folded - 1


def test_another_tokenizers_positions_without_a_row_say_none():
    found = look(Experiment(load_recipe("pocket-uld")), 3)
    teacher, student = found.sides
    assert teacher.encoder and teacher.tokens[0].special and teacher.tokens[1].row == 0
    compared = [token.compared for token in student.tokens if token.row is not None]
    assert compared[0] == {"boundary": 0, "index": 0} and {"boundary": None, "index": 4} in compared
    assert "none" in told(found, full=False)


def test_what_cannot_be_shown_says_why(tmp_path, capsys):
    path = toys.tiny_recipe(tmp_path)
    for index in ("22", "-1"):
        with pytest.raises(RecipeError, match=rf"--example {index}: the recipe caches the examples 0 to 21"):
            main(["show", "--recipe", str(path), "--example", index])
    capsys.readouterr()
    assert main(["show", "--recipe", str(path), "--set", f"data.dir={tmp_path / 'nowhere'}"]) == 3
    said = capsys.readouterr()
    assert yaml.safe_load(said.out)["name"] == "tiny" and "no example to show: " in said.err


def test_what_is_beyond_a_window_is_said(tmp_path):
    path = str(toys.tiny_recipe(tmp_path))
    read = len(look(Experiment(load_recipe(path)), 0).sides[0].tokens)
    said = {}
    for window in (read - 1, read - 4, 40):  # the last token is only predicted
        toys.tiny_qwen3(tmp_path / "model", max_position_embeddings=window)
        said[window] = told(look(Experiment(load_recipe(path)), 0), full=False)
    assert "beyond the" not in said[read - 1] and f"3 answer tokens are beyond the {read - 4} tokens" in said[read - 4]
    assert "its prompt alone is beyond the 40 tokens" in said[40] and "longer than the 40 tokens" in said[40]
    assert "dropped" not in said[read - 4]
