"""Tasks turn raw rows into literal prompts and answers, and score what was written."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RecipeError
from pipeline.tasks import Example, Task, get_task, task_names
from pipeline.tasks.classification import score_accuracy
from pipeline.tasks.context import first_words
from pipeline.tasks.squad_metrics import score_answer

# A row of each task in the form it has on the Hub, and the whole example it must become.
GOLDEN = {
    "boolq": (
        {"question": "is bok choy a cabbage", "answer": True, "passage": "Bok choy is a cabbage."},
        Example(
            "boolq-00003",
            "boolq",
            "Bok choy is a cabbage.\n\nQuestion: is bok choy a cabbage?\nOPTIONS:\n- no\n- yes\n\nAnswer:",
            "yes",
            labels=("no", "yes"),
        ),
    ),
    "squad": (
        {
            "id": "57",
            "title": "Super_Bowl_50",
            "context": "It was played in Santa Clara.",
            "question": " Where was it played?",
            "answers": {"text": ["Santa Clara", "Santa Clara", "in Santa Clara"], "answer_start": [17, 17, 14]},
        },
        Example(
            "squad-00003",
            "squad",
            "From an article about Super Bowl 50:\n\nIt was played in Santa Clara.\n\n"
            "Question: Where was it played?\n\nAnswer:",
            "Santa Clara",
            references=("Santa Clara", "in Santa Clara"),
        ),
    ),
    "samsum": (
        {"id": "1", "dialogue": "Ann: Hi!\r\nBen: Bye.", "summary": "Ben leaves Ann."},
        Example(
            "samsum-00003",
            "samsum",
            "Ann: Hi!\nBen: Bye.\n\nSummarize what was said in a few sentences.\n\nSummary:",
            "Ben leaves Ann.",
        ),
    ),
    "anli": (
        {"uid": "u", "premise": "Tipp FM is in Ireland.", "hypothesis": "It is loud. ", "label": 1, "reason": ""},
        Example(
            "anli-00003",
            "anli",
            'Tipp FM is in Ireland.\n\nDoes it follow from this that "It is loud."?\n'
            "OPTIONS:\n- Yes\n- It's impossible to say\n- No\n\nAnswer:",
            "It's impossible to say",
            labels=("Yes", "It's impossible to say", "No"),
        ),
    ),
    "paws": (
        {"id": 4, "sentence1": "A saw B .", "sentence2": "B saw A .", "label": 0},
        Example(
            "paws-00003",
            "paws",
            "Sentence 1: A saw B .\nSentence 2: B saw A .\n\nDo both sentences say the same?\n"
            "OPTIONS:\n- no\n- yes\n\nAnswer:",
            "no",
            labels=("no", "yes"),
        ),
    ),
    "xsum": (
        {"document": "It rained.\nIt snowed.", "summary": "The weather was bad.", "id": "9"},
        Example(
            "xsum-000003",
            "xsum",
            "It rained.\nIt snowed.\n\nSummarize this article in one sentence.\n\nSummary:",
            "The weather was bad.",
        ),
    ),
    "common_gen": (
        {
            "concept_set_idx": 7,
            "concepts": ["field", "look"],
            "target": "Look at the field.",
            "references": ["Look at the field.", "A field to look at."],
        },
        Example(
            "common_gen-00003",
            "common_gen",
            "Words: field, look\n\nWrite one sentence that uses all of these words.\n\nSentence:",
            "Look at the field.",
            references=("Look at the field.", "A field to look at."),
            extra={"concepts": ["field", "look"]},
        ),
    ),
    "cosmos_qa": (
        {
            "id": "x",
            "context": "I dropped it .",
            "question": "What next ?",
            "answer0": "It broke .",
            "answer1": "It flew .",
            "answer2": "None of the above choices .",
            "answer3": "It sang .",
            "label": 0,
        },
        Example(
            "cosmos_qa-00003",
            "cosmos_qa",
            "I dropped it .\n\nQuestion: What next ?\nOPTIONS:\n- It broke .\n- It flew .\n"
            "- None of the above choices .\n- It sang .\n\nAnswer:",
            "It broke .",
            labels=("It broke .", "It flew .", "None of the above choices .", "It sang ."),
        ),
    ),
    "mbpp": (
        {
            "task_id": 11,
            "text": "Write a function to add.",
            "code": "def add(a,b):\r\n    return a+b ",
            "test_setup_code": "x = 1\r\ny = 2",
            "test_list": ["assert add(1,2) == 3", "assert add(x,y) == \\\r\n 3"],
            "challenge_test_list": [],
        },
        Example(
            "mbpp-00003",
            "mbpp",
            "Write a function to add.\nThis test must pass:\nassert add(1,2) == 3\n\nPython code:",
            "def add(a,b):\n    return a+b ",
            extra={"tests": ["assert add(1,2) == 3", "assert add(x,y) == \\\n 3"], "setup": "x = 1\ny = 2"},
        ),
    ),
    "eng_spa": (
        {"translation": {"en": "Try on that shirt.", "es": "Pruébate esa camisa."}},
        Example(
            "eng_spa-000003",
            "eng_spa",
            "Try on that shirt.\n\nTranslate this sentence into Spanish.\n\nSpanish:",
            "Pruébate esa camisa.",
        ),
    ),
}


def convert(name: str, row: dict, **options: int) -> Example:
    task = get_task(name)
    return task.to_example(row, 3, task.options.model_validate(options))


@pytest.mark.parametrize("name", GOLDEN)
def test_a_row_becomes_exactly_this_example(name):
    row, example = GOLDEN[name]
    assert convert(name, row) == example


def test_tasks_are_found_by_what_they_define_and_helpers_are_not():
    assert set(GOLDEN) | {"gsm8k", "pocket_math"} <= set(task_names())
    assert not {"numbers", "context", "classification", "squad_metrics", "__init__"} & set(task_names())
    assert all(isinstance(get_task(name), Task) for name in task_names())
    with pytest.raises(RecipeError, match=r"unknown task 'bolq'\. Did you mean 'boolq'\?"):
        get_task("bolq")


@pytest.mark.parametrize("name", GOLDEN)
def test_what_a_task_scores_is_among_its_metrics_and_the_answer_scores_1(name):
    task, (_, example) = get_task(name), GOLDEN[name]
    scores = task.score(example.answer, example) if task.score else {}
    assert set(scores) <= set(task.metrics)
    assert all(value == 1.0 for value in scores.values())
    assert bool(task.score) == (name in {"boolq", "squad", "anli", "paws", "cosmos_qa"})


@pytest.mark.parametrize("name", ["anli", "paws", "cosmos_qa"])
@pytest.mark.parametrize("label", [-1, 4])
def test_a_withheld_label_is_refused(name, label):
    with pytest.raises(ValueError, match=f"label {label}, but the labels are numbered 0 to"):
        convert(name, GOLDEN[name][0] | {"label": label})


def test_empty_texts_do_not_crash():
    empty = convert("samsum", {"id": "1", "dialogue": None, "summary": None})
    assert (empty.prompt[:2], empty.answer, empty.truncated) == ("\n\n", "", False)
    assert convert("xsum", {"document": "", "summary": "", "id": ""}).answer == ""
    with pytest.raises(ValueError, match=r"SQuAD 1\.1 has none"):
        convert("squad", GOLDEN["squad"][0] | {"answers": {"text": [], "answer_start": []}})


LONG = {
    "boolq": "passage",
    "squad": "context",
    "samsum": "dialogue",
    "anli": "premise",
    "xsum": "document",
    "cosmos_qa": "context",
}


@pytest.mark.parametrize("name", LONG)
def test_only_the_context_is_cut(name):
    row, whole = GOLDEN[name]
    context = row[LONG[name]].replace("\r\n", "\n")
    cut = convert(name, row, max_context_words=2)
    kept = first_words(context, 2)[0]
    assert cut.truncated and not whole.truncated
    assert cut.prompt == whole.prompt.replace(context, kept, 1) and len(cut.prompt) < len(whole.prompt)
    assert (cut.answer, cut.labels, cut.references) == (whole.answer, whole.labels, whole.references)
    length = len(context.split())
    assert convert(name, row, max_context_words=length) == whole
    long = convert(name, row | {LONG[name]: "word " * 321})
    assert long.truncated and long.prompt.count("word") - whole.prompt.count("word") == 320


def test_a_cut_that_loses_the_answer_is_marked():
    row = GOLDEN["squad"][0]
    assert convert("squad", row, max_context_words=5).extra == {"answer_cut": True}
    assert convert("squad", row, max_context_words=6).extra == {}
    longer = row | {"context": row["context"] + " Later it rained."}
    assert convert("squad", longer, max_context_words=6).truncated
    assert convert("squad", longer, max_context_words=6).extra == {}


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from(" \t\n\u00a0\u2003\x1c"))), st.integers(0, 12))
def test_first_words_keep_words_and_white_space(text, limit):
    kept, cut = first_words(text, limit)
    assert text.startswith(kept)
    assert kept.split() == text.split()[:limit]
    assert cut == (len(text.split()) > limit)
    assert kept == (kept.rstrip() if cut else text)


def test_first_words_in_a_table():
    assert first_words("a  b\nc", 2) == ("a  b", True)
    assert first_words(" a b ", 2) == (" a b ", False)
    assert first_words("", 1) == ("", False)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("yes", 1.0),
        (" Yes.\n", 1.0),
        ("YES!", 1.0),
        ('"yes"', 1.0),
        ("no", 0.0),
        ("- No", 0.0),
        ("", None),
        ("maybe", None),
        ("yes, because", None),
        ("yes no", None),
        ("true", None),
    ],
)
def test_a_written_label_is_read_without_guessing(written, value):
    assert score_accuracy(written, GOLDEN["boolq"][1]) == {"accuracy": value}


def test_labels_of_several_words_are_read_as_models_space_them():
    example = GOLDEN["cosmos_qa"][1]
    assert score_accuracy("it  broke.", example) == {"accuracy": 1.0}
    assert score_accuracy("None of the above choices.", example) == {"accuracy": 0.0}
    assert score_accuracy("broke", example) == {"accuracy": None}
    assert score_accuracy("it’s impossible to say", GOLDEN["anli"][1]) == {"accuracy": None}


# (prediction, golds, F1, exact match): what the official SQuAD 1.1 script gives for each.
OFFICIAL = [
    ("The Denver Broncos!", ["Denver Broncos"], 1.0, 1),
    ("denver  BRONCOS", ["Denver Broncos", "Broncos"], 1.0, 1),
    ("Broncos of Denver", ["Denver Broncos"], 0.8, 0),
    ("A", ["A"], 0.0, 1),
    ("", [""], 0.0, 1),
    ("", ["x"], 0.0, 0),
    ("x", ["the"], 0.0, 0),
    ("...", ["!"], 0.0, 1),
    ("U.S.", ["US"], 1.0, 1),
    ("U S", ["U.S."], 0.0, 0),
    ("3.5 million", ["35 million"], 1.0, 1),
    ("co-operate", ["cooperate"], 1.0, 1),
    ("“Thinking”", ["Thinking"], 0.0, 0),
    ("L’Equipe", ["L'Equipe"], 0.0, 0),
    ("caf\u00e9", ["cafe\u0301"], 0.0, 0),
    ("CAFÉ", ["café"], 1.0, 1),
    ("a\u00a0b c", ["b c"], 1.0, 1),
    ("theatre a an", ["theatre"], 1.0, 1),
    ("b b c", ["b c c"], 2 / 3, 0),
    ("Straße", ["STRASSE"], 0.0, 0),
    ("an_apple", ["an apple"], 0.0, 0),
    ("Paris France", ["Paris", "Paris, France", "France"], 1.0, 1),
    ("50", ["Super Bowl 50", "the 50"], 1.0, 1),
]


@pytest.mark.parametrize(("prediction", "golds", "f1", "exact"), OFFICIAL)
def test_squad_scores_are_the_official_scripts(prediction, golds, f1, exact):
    example = Example("i", "squad", "?", golds[0], references=tuple(golds))
    assert score_answer(prediction, example) == {"f1": pytest.approx(f1, abs=1e-12), "exact_match": exact}


@given(st.lists(st.text(string.ascii_lowercase, min_size=1), min_size=1, max_size=6), st.integers(1, 9))
def test_a_right_answer_with_words_added_has_the_f1_of_its_parts(words, added):
    words = [f"{word}z" for word in words]  # no articles
    example = Example("i", "squad", "?", " ".join(words))
    longer = " ".join([*words, *(f"{i}" for i in range(added))])
    f1 = 2 * len(words) / (2 * len(words) + added)
    assert score_answer(longer, example) == {"f1": pytest.approx(f1), "exact_match": 0.0}
