"""report.html in a real Chromium: nothing is fetched, no text runs, and it is used by mouse and keyboard.

Skipped where there is no Chromium (Debian: apt-get install chromium) or no playwright. Screenshots are kept in the
folder LOGITBANK_ARTIFACTS, if it is set.
"""

import os
import shutil
from pathlib import Path

import pytest
import toys
from report_run import HOSTILE, make_run, quicken

from pipeline.recipe import load_recipe
from pipeline.tasks import Example
from stage3_eval.__main__ import main
from stage3_eval.blocks import Block
from stage3_eval.conditions import Condition, TrainedRun
from stage3_eval.evaluate import Evaluated
from stage3_eval.predictions import Prediction, PredictionFile
from stage3_eval.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """opened(path, **context): a page that has said nothing and asked for nothing but itself, to the end of the test.

    With `watched=False` what it says and asks for is only collected, in `page.said`.
    """
    pages = []

    def open_page(path: Path, watched: bool = True, **context):
        page = browser.new_context(**context).new_page()
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: page.said.append("dialog") or dialog.dismiss())
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or page.said.append(request.url))
        page.on("framenavigated", lambda frame: frame.url == path.as_uri() or page.said.append(f"went to {frame.url}"))
        page.goto(path.as_uri())
        pages.append((page, watched))
        return page

    yield open_page
    for page, watched in pages:
        said = list(page.said)
        pwned = page.evaluate("window.pwned")
        page.context.close()
        if watched:
            assert said == [] and pwned is None


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    """A report of answers made up here: of 28 examples sft has 12 right, distill 20. No model, no cache."""
    root = tmp_path_factory.mktemp("made-up")
    recipe = load_recipe(str(toys.tiny_recipe(root)))
    examples = tuple(
        Example(f"test/{i:02d}", "gsm8k", f"{HOSTILE[i % 14]} Question {i}?", f"{HOSTILE[-1 - i % 14]} #### {i}")
        for i in range(28)
    )
    right = {"zero_shot": range(4), "few_shot": range(8), "sft@2": range(9), "sft@4": range(12)}
    right |= {"distill@2": range(15), "distill@4": range(2, 22)}

    def answer(condition: str, i: int) -> Prediction:
        text = f"{HOSTILE[i % 14]} #### {i if i in right[condition] else -1}"
        return Prediction(f"test/{i:02d}", "gsm8k", "", text, 6, True)

    runs = tuple(
        TrainedRun(arm, arm, {step: Condition(f"{arm}@{step}", arm, step) for step in (2, 4)}, {"cache": "f" * 64})
        for arm in ("sft", "distill")
    )
    files = {
        (name, "test"): PredictionFile(Path("p"), {}, {e.id: answer(name, i) for i, e in enumerate(examples)}, {})
        for name in right
    }
    model = Evaluated("toy", runs, {"sft": 4, "distill": 4}, {}, files, {"uld@4": HOSTILE[0]})
    _, paths = write_report(recipe, [Block("test", examples, examples)], [model], ["stage3_eval", HOSTILE[9]])
    return next(path for path in paths if path.name == "report.html")


@pytest.fixture(scope="module")
def looked_into(tmp_path_factory) -> Path:
    """The report of a run with a cache: two students, of which one has another tokenizer than the teacher."""
    root = tmp_path_factory.mktemp("looked-into")
    make_run(root)
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        assert main(["--recipe", str(root / "recipe.yaml")]) == 0
    return root / "run" / "report" / "report.html"


def keep(page, name: str, tmp_path: Path) -> None:
    """A screenshot of the whole page, where a person finds it."""
    folder = Path(os.environ.get("LOGITBANK_ARTIFACTS", tmp_path / "artifacts"))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)
    assert (folder / f"{name}.png").stat().st_size > 20_000


def column(page, number: int) -> list[str]:
    return page.locator(f"#results tbody tr > :nth-child({number})").all_inner_texts()


def test_the_table_is_sorted_by_a_click_and_by_a_key(opened, made_up):
    page = opened(made_up)
    heads = page.locator("#results thead th")
    score = [text.strip() for text in heads.all_inner_texts()].index("Score, %")
    as_written = column(page, score + 1)
    assert {head.get_attribute("aria-sort") for head in heads.all()} == {"none"}
    heads.nth(score).locator("button").click()
    falling = [float(text) for text in column(page, score + 1)]
    assert falling == sorted(falling, reverse=True) and [f"{v:.2f}" for v in falling] != as_written
    assert heads.nth(score).get_attribute("aria-sort") == "descending"
    heads.nth(score).locator("button").press("Enter")
    assert [float(text) for text in column(page, score + 1)] == falling[::-1]
    assert heads.nth(score).get_attribute("aria-sort") == "ascending"
    assert page.locator("#results [role=status]").inner_text() == "sorted by Score, %, ascending"


def test_what_training_fixed_and_broke_is_counted_filtered_and_searched(opened, made_up):
    page = opened(made_up)
    answers = page.locator("#answers")
    assert answers.locator(".buttons button").all_inner_texts() == [
        "Fixed 10",
        "Broken 2",
        "Same score 10",
        "Both at zero 6",
        "All 28",
    ]
    answers.get_by_role("button", name="Broken").click()
    assert answers.locator("article h3").all_inner_texts() == ["test/00", "test/01"]
    answers.get_by_role("button", name="All").click()
    answers.get_by_role("searchbox").fill("question 17?")
    assert answers.locator("article h3").all_inner_texts() == ["test/17"]
    assert "-1" in answers.locator("article .compared pre").all_inner_texts()[1]
    answers.get_by_role("searchbox").fill(HOSTILE[1].upper())
    assert answers.locator("article").count() == 4  # the corpus goes round twice in prompts, and twice in answers


def test_hostile_texts_are_shown_and_nothing_of_them_runs(opened, made_up, tmp_path):
    page = opened(made_up)
    page.locator("#answers").get_by_role("button", name="All").click()
    shown = ""
    while True:
        for summary in page.locator("#answers summary").all():
            summary.click()
        shown += page.locator("#answers").inner_text()
        following = page.get_by_role("button", name="Next", exact=True)
        if following.is_disabled():
            break
        following.click()
    for text in HOSTILE:
        if text.isascii():
            assert text in shown
    assert "<U+202E>gnp.exe" in shown and "\u202e" not in shown and "<U+2028>" in shown
    assert (
        page.locator("script").count() == 2
        and page.locator("iframe, img, base, #answers style, #answers a").count() == 0
    )
    assert HOSTILE[0] in page.locator("#results .notice").inner_text()
    keep(page, "hostile", tmp_path)


def test_the_corpus_is_live_where_texts_become_markup(opened, tmp_path):
    """The control: the same texts in a page without our care do run."""
    careless = tmp_path / "careless.html"
    careless.write_text("<!doctype html><body>" + "".join([HOSTILE[0], HOSTILE[1], HOSTILE[7]]), encoding="utf-8")
    page = opened(careless, watched=False)
    page.wait_for_function("window.pwned === 1")
    assert any("evil.example" in text for text in page.said)


def test_the_policy_stops_what_got_in(opened, made_up):
    """The second wall: markup that is put into the page does not run, and fetches nothing."""
    page = opened(made_up, watched=False)
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.pwned = 1";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src=http://evil.example/ onerror='window.pwned=1'>");
        }"""
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in text for text in page.said)


def test_dark_and_light_by_the_system_and_by_the_button(opened, made_up):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = opened(made_up, color_scheme="light"), opened(made_up, color_scheme="dark")
    colours = light.evaluate(ground), dark.evaluate(ground)
    assert colours[0] != colours[1]
    light.get_by_role("button", name="Switch to the dark theme").click()
    dark.get_by_role("button", name="Switch to the light theme").click()
    assert (light.evaluate(ground), dark.evaluate(ground)) == colours[::-1]
    for page in (light, dark, opened(made_up, color_scheme="dark")):
        page.emulate_media(media="print")
        assert page.evaluate(ground) == "rgb(255, 255, 255)"


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_as_wide_as_its_window_and_has_its_landmarks(opened, made_up, width):
    page = opened(made_up, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [page.locator(tag).count() for tag in ("main", "body > nav", "body > header", "h1")] == [1, 1, 1, 1]
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, [role=img], section, [role=region]")].filter(
            (node) => !(node.getAttribute("aria-label") || node.getAttribute("aria-labelledby") || node.labels?.length
              || node.textContent.trim())).length"""
    )
    assert unnamed == 0
    assert page.locator("table").count() == page.locator("table > caption").count()
    assert "ends at" in page.locator("svg.chart").first.get_attribute("aria-label")


@pytest.mark.slow
def test_the_viewer_is_stepped_through_by_keys(opened, looked_into, tmp_path):
    page = opened(looked_into, viewport={"width": 1280, "height": 900})
    viewer, strip = page.locator("#viewer"), page.locator("#viewer .strip")
    viewer.get_by_label("Student").select_option(label="other")
    strip.focus()
    count = strip.locator("[role=option]").count()
    assert count > 5
    seen = [viewer.locator(".panel h3").inner_text()]
    for _ in range(count):
        page.keyboard.press("ArrowRight")
        seen.append(viewer.locator(".panel h3").inner_text())
    assert [text.split(":")[0] for text in seen] == [f"Token {min(i, count)} of {count}" for i in range(1, count + 2)]
    assert strip.get_attribute("aria-activedescendant") == f"token-{count - 1}"
    assert strip.locator("[aria-selected=true]").count() == 1
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert viewer.locator(".panel h3").inner_text().startswith("Token 1 of")
    first = viewer.get_by_label("Example", exact=True).input_value()
    page.keyboard.press("PageDown")
    assert viewer.get_by_label("Example", exact=True).input_value() != first
    viewer.get_by_role("button", name="Previous example").click()
    assert viewer.get_by_label("Example", exact=True).input_value() == first
    keep(page, "viewer-light", tmp_path)
    page.get_by_role("button", name="Switch to the dark theme").click()
    keep(page, "viewer-dark", tmp_path)


@pytest.mark.slow
def test_two_tokenizers_are_drawn_and_what_is_amiss_can_be_seen(opened, looked_into, tmp_path):
    page = opened(looked_into, viewport={"width": 1280, "height": 900})
    viewer = page.locator("#viewer")
    assert viewer.locator("svg.alignment").count() == 0  # toy has the teacher's tokenizer
    viewer.get_by_label("Student").select_option(label="other")
    label = viewer.locator("svg.alignment").get_attribute("aria-label")
    assert "of the student's" in label
    paired = viewer.locator("svg.alignment line.pair").count()
    assert paired == int(label.split(". ")[1].split(" ")[0])
    viewer.get_by_label("Pairs").select_option(label="by index, as published")
    assert viewer.locator("svg.alignment line.pair").count() > paired
    picked = viewer.get_by_label("Example", exact=True).locator("option").all_text_contents()
    viewer.get_by_label("Example", exact=True).select_option(next(t for t in picked if "quarantined" in t))
    assert viewer.locator(".strip .quarantined").count() > 0
    assert "✕" in viewer.locator(".strip .quarantined .level").first.inner_text()
    viewer.locator(".strip .quarantined").last.click()
    assert "Quarantined: this or an earlier token is unknown" in viewer.locator(".panel .notice").inner_text()
    assert viewer.locator("svg.alignment .token.quarantined").count() > 0
    keep(page, "quarantined", tmp_path)
    page.emulate_media(media="print")
    keep(page, "print", tmp_path)
