"""report.html without a browser: what is in it, what keeps texts from being more than texts, and the token viewer."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_run import HOSTILE, make_run, quicken

from cache_schema.reader import CacheReader
from pipeline.recipe import load_recipe
from stage3_eval.__main__ import main
from stage3_eval.blocks import Blocks
from stage3_eval.evaluate import ModelRun
from stage3_eval.generate.hf import HFEngine
from stage3_eval.report.html import _SCRIPTS, _file, island, page
from stage3_eval.report.html.collect import thinned
from stage3_eval.viewer import _identity, _kept, _most_changed, _scored, cache_facts
from stage3_eval.viewer_rows import disagreement, mean_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A scored run with its report: (root, arguments). Do not write to it: copy it."""
    root = tmp_path_factory.mktemp("report")
    make_run(root)
    arguments = ["--recipe", str(root / "recipe.yaml")]
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        assert main(arguments) == 0
    return root, arguments


def data_of(path: Path):
    html = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.S).group(1))


def viewer_of(root: Path):
    return data_of(root / "run" / "report" / "report.html")["viewer"]["students"]


@pytest.mark.parametrize("text", [*HOSTILE, "\ud800 alone", "\x00\x1f\x7f", "]]>&amp;</SCRIPT >"])
def test_no_text_gets_out_of_its_island(text):
    written = island({"text": text, text: [text]})
    assert not re.search(r"[<>&\u2028\u2029]", written) and written.isascii()
    assert json.loads(written) == {"text": text, text: [text]}
    if "<" in text:
        assert "<" in json.dumps({"text": text})  # the control: as it is, it would


def test_the_policy_allows_the_one_script_and_the_one_style():
    html = page({"results": {"recipe": "</title><script>x"}}).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html).group(1)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert "<title>&lt;/title&gt;&lt;script&gt;x: report</title>" in html
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    styles = re.findall(r"<style>(.*?)</style>", html, re.S)
    assert (len(scripts), len(styles)) == (1, 1)
    for kind, text in (("script", scripts[0]), ("style", styles[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
        other = base64.b64encode(hashlib.sha256(f"{text} ".encode()).digest()).decode()
        assert other not in policy


@pytest.mark.parametrize("name", _SCRIPTS)
def test_the_script_makes_texts_of_texts_only(name):
    parsing = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|fetch\(|srcdoc"
    assert not re.search(parsing, _file(name)) and re.search(parsing, "node.innerHTML = text")
    assert "</script" not in _file(name).lower()


def test_a_distance_counted_by_hand():
    p, q = np.array([0.6, 0.3]), np.array([0.1, 0.5, 0.2, 0.2])
    by_id = disagreement(p, 0.1, q, np.array([1, 3]))  # |.6-.5| + |.3-.2| + |.1-.3|
    assert by_id == pytest.approx(0.2)
    assert disagreement(p, 0.1, q, None) == pytest.approx(0.5 * (0.1 + 0.1 + 0.2))  # ranks .5 .2, others .3
    assert disagreement(p, 0.1, q, np.array([2, 9])) == pytest.approx(0.5 * (0.4 + 0.3 + 0.7))  # 9 is not its id
    assert disagreement(np.array([1.0]), 0.0, np.array([0.0, 1.0]), np.array([0])) == 1.0
    assert disagreement(np.array([1.0]), 0.0, np.array([0.0, 1.0]), None) == 0.0  # by rank it cannot tell
    assert disagreement(np.array([0.5, 0.3, 0.2]), 0.0, np.array([0.5, 0.5]), None) == pytest.approx(0.2)
    assert (mean_of([None, 0.5, 0.25]), mean_of([None])) == (0.375, None)


def test_losses_are_thinned_to_means():
    assert thinned({2: 1.0, 1: 3.0, 3: 5.0}, 2) == [[2, 2.0], [3, 5.0]]
    assert (thinned({1: 3.0}), thinned({}), thinned({1: float("nan")})) == ([[1, 3.0]], [], [])


def test_the_most_changed_examples_are_those():
    changes = {0: [0.5, 0.1], 1: [0.5, 0.6], 2: [None, None], 3: [0.2, 0.2], 4: [0.5, 0.4]}
    assert _most_changed(changes, 3) == [
        (0, "nearer to the teacher"),
        (4, "nearer to the teacher"),
        (1, "further from the teacher"),
    ]
    assert _most_changed({3: [0.2, 0.2]}, 6) == [(3, "least changed")]
    assert _most_changed({}, 3) == []


def test_cached_examples_that_were_fixed_or_broken_are_chosen_first(made):
    root, _ = made
    recipe = load_recipe(str(root / "recipe.yaml"))
    blocks = Blocks(recipe)
    model = ModelRun(recipe, "toy", blocks, rescore=True).evaluate()
    examples = blocks.scored[0].examples
    assert blocks.scored[0].name == "train"
    reader = CacheReader.open(root / "cache")
    assert _scored(recipe, blocks.scored, model, reader) == []  # all are wrong
    for condition, of in (("uld@4", (0, 5)), ("sft@4", (2,))):
        predictions = model.files[condition, "train"].predictions
        for i in of:
            right = examples[i].answer.splitlines()[-1]
            predictions[examples[i].id] = replace(predictions[examples[i].id], prediction=right)
    chosen = {reader.read([i])[0].example_id: why for i, why in _scored(recipe, blocks.scored, model, reader)}
    assert chosen == {examples[0].id: "fixed", examples[5].id: "fixed", examples[2].id: "broken"}


def test_the_untouched_teacher_agrees_with_its_cache_and_a_trained_one_does_not(made):
    toy = viewer_of(made[0])["toy"]
    assert toy["conditions"] == ["zero_shot", "sft@4", "uld@4"] and toy["same_tokenizer"]
    assert len(toy["examples"]) == 8
    for example in toy["examples"]:
        assert example["same_tokens"] and not example["by_rank"]
        known = [p["disagreement"] for p in example["student"]["zero_shot"]["positions"]]
        assert max(d for d in known if d is not None) < 0.01  # the codec's step is 1/64 of a logit
        assert example["student"]["uld@4"]["mean"] > 0.05  # the control: random adapters
        for position, of in zip(example["teacher"], example["student"]["zero_shot"]["positions"], strict=True):
            if position["status"] == "usable":
                assert of["at"] == pytest.approx(position["p"], abs=0.01)
                assert sum(position["p"]) + position["others"] == pytest.approx(1, abs=0.01)


def test_rows_that_are_shifted_by_one_do_not_agree(made):
    """The control of the identity: the same numbers, one position later."""
    for example in viewer_of(made[0])["toy"]["examples"]:
        teacher = example["teacher"]
        later = [
            abs(of["p"][0] - before["p"][0])
            for of, before in zip(example["student"]["zero_shot"]["positions"][1:], teacher, strict=False)
            if before["status"] == "usable"
        ]
        assert max(later) > 0.05


def test_quarantined_positions_are_shown_as_such(made):
    for student in viewer_of(made[0]).values():
        shown = [e for e in student["examples"] if any(p["status"] != "usable" for p in e["teacher"])]
        assert any(e["why"] == "quarantined positions" for e in shown)
        for example in shown:
            assert [p["status"] for p in example["teacher"][-3:]] == ["unknown_token"] * 3
            last = example["student"]["zero_shot"]["positions"][-1]
            assert last["disagreement"] is None and "at" not in last
            assert "p" not in example["teacher"][-1]


def test_two_tokenizers_are_paired_where_both_have_read_the_same(made):
    other = viewer_of(made[0])["other"]
    assert not other["same_tokenizer"]
    unpaired = 0
    for example in other["examples"]:
        assert example["by_rank"] and set(example["pairs"]) == {"boundary", "index"}
        pairs = example["pairs"]["boundary"]
        assert (pairs[0], pairs[-1]) == (0, len(example["teacher"]) - 1)
        for m, n in enumerate(pairs[1:-1], 1):
            if n >= 0:
                assert example["tokens"][m - 1][1] == example["teacher"][n - 1]["end"]
            unpaired += n < 0
        missing = [of["disagreement"] is None for of in example["student"]["zero_shot"]["positions"]]
        usable = [n >= 0 and example["teacher"][n]["status"] == "usable" for n in pairs]
        assert missing == [not of for of in usable]
    assert unpaired > 0


def test_the_page_holds_every_answer_and_score(made):
    root, _ = made
    data = data_of(root / "run" / "report" / "report.html")
    results = json.loads((root / "run" / "report" / "results.json").read_text())
    assert data["results"]["students"] == results["students"]
    tables = {(of["student"], of["block"]): of for of in data["answers"]}
    assert set(tables) == {(s, b) for s in ("toy", "other") for b in ("train", "test")}
    of = tables["toy", "test"]
    assert (of["n"], of["conditions"]["uld"], len(of["texts"])) == (14, "uld@4", 14)
    rows = results["students"]["toy"]["blocks"]["test"]["gsm8k"][of["metric"]]["rows"]
    for name, values in of["values"].items():
        assert sum(values) / len(values) == pytest.approx(rows[name]["mean"])
    assert {HOSTILE[0] in text["gold"] for text in of["texts"]} == {True, False}


def test_the_cost_is_what_the_cache_says(made):
    root, _ = made
    cost = data_of(root / "run" / "report" / "report.html")["cost"]
    reader = CacheReader.open(root / "cache")
    assert cost["cache"]["bytes"] == sum(path.stat().st_size for path in (root / "cache" / "shards").glob("*.parquet"))
    assert cost["cache"]["positions"]["planned"] == sum(record.positions for record in reader.records)
    assert cost["cache"]["seconds"] is None  # nobody wrote them down
    assert cost["cache"]["positions"]["quarantined"] == {"unknown_token": 12}
    assert [t["steps"] for t in cost["trainings"] if t["reads_teacher"]] == [4, 4]


def test_rescoring_needs_no_model_and_no_cache(made, tmp_path, capsys):
    root, _ = made
    shutil.copytree(root, tmp_path / "copy")
    copy = tmp_path / "copy"
    arguments = ["--recipe", str(copy / "recipe.yaml"), "--set", f"run_dir={copy / 'run'}", "--rescore"]
    kept = (copy / "run" / "report" / "viewer.json").read_bytes()
    shutil.rmtree(copy / "run" / "students" / "toy" / "uld" / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        patch.setattr("pipeline.fingerprint.Experiment.open_cache", None)
        patch.setattr("pipeline.models.load_causal_lm", None)
        assert main(arguments) == 0
        assert viewer_of(copy) == viewer_of(root)
        assert (copy / "run" / "report" / "viewer.json").read_bytes() == kept
        (copy / "run" / "report" / "viewer.json").unlink()
        assert main(arguments) == 0
    data = data_of(copy / "run" / "report" / "report.html")
    assert data["viewer"]["students"] == {} and "without --rescore" in data["viewer"]["missing"]["token viewer"]
    assert str(copy / "run" / "report" / "report.html") in capsys.readouterr().out


def test_a_cache_that_is_gone_is_a_reason_and_no_error(made, tmp_path):
    root, _ = made
    shutil.copytree(root / "run", tmp_path / "run")
    (tmp_path / "run" / "report" / "viewer.json").unlink()
    overrides = ["--set", f"run_dir={tmp_path / 'run'}", "--set", f"cache.dir={tmp_path / 'nothing'}"]
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        assert main(["--recipe", str(root / "recipe.yaml"), *overrides]) == 0
    data = data_of(tmp_path / "run" / "report" / "report.html")
    assert str(tmp_path / "nothing") in data["viewer"]["missing"]["token viewer"] and data["cost"]["cache"] is None


def test_a_student_without_finite_logits_is_a_reason_and_no_error(made, tmp_path):
    root, _ = made
    shutil.copytree(root / "run", tmp_path / "run")
    (tmp_path / "run" / "report" / "viewer.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        real = HFEngine.answer_logits
        patch.setattr(HFEngine, "answer_logits", lambda *of: real(*of) * float("nan"))
        assert main(["--recipe", str(root / "recipe.yaml"), "--set", f"run_dir={tmp_path / 'run'}"]) == 0
    data = data_of(tmp_path / "run" / "report" / "report.html")
    assert "not finite" in data["viewer"]["missing"]["token viewer of toy"] and data["results"]["students"]["toy"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(1.5, 4.5), (1e308, None), (10**400, None), (-1, None), ("2", None)],
    ids=["ours", "infinite sum", "no float", "negative", "text"],
)
def test_the_seconds_of_a_strangers_records_are_numbers_or_not_known(made, seconds, shown):
    reader = CacheReader.open(made[0] / "cache")
    reader.records = [replace(record, provenance={"seconds": seconds}) for record in reader.records][:3]
    assert cache_facts(reader)["seconds"] == shown


def test_other_checkpoints_are_looked_into_again(made, tmp_path):
    root, _ = made
    kept = _kept(root / "run" / "report" / "viewer.json")
    recipe = load_recipe(str(root / "recipe.yaml"))
    model = ModelRun(recipe, "toy", Blocks(recipe), rescore=True).evaluate()
    assert _identity(model) == kept["identity"]["toy"]
    model.files["uld@4", "train"].identity["adapter"] = "0" * 64
    model.files["uld@4", "test"].identity["adapter"] = "0" * 64
    assert _identity(model) != kept["identity"]["toy"]
    (tmp_path / "viewer.json").write_text("{")
    assert _kept(tmp_path / "viewer.json") is None
