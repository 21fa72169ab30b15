"""Reading numbers out of answers: the traps that scoring scripts fall into, and round trips."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tasks.numbers import extract_flexible, extract_strict, parse_number, score_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", "18"),
        ("18.00", "18"),
        ("18.", "18"),
        ("1,234", "1234"),
        ("-1,234.50", "-1234.5"),
        ("$18", "18"),
        ("-$18", "-18"),
        ("$-18", "-18"),
        (" 7 ", "7"),
        (".5", "0.5"),
        ("+3", "3"),
        ("007", "7"),
    ],
)
def test_written_numbers_have_their_value(text: str, value: str) -> None:
    assert parse_number(text) == Decimal(value)


@pytest.mark.parametrize(
    "text", ["", ".", "..", "$", "-", ",", "1.2.3", "--4", "4-", "twelve", "1e5", "NaN", "inf", "٣", "½"]
)
def test_what_is_not_a_number_is_none(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6 * 3 = 18.\n#### 18", "18"),
        ("#### $18", "18"),
        ("#### $ 18", "18"),
        ("#### -5", "-5"),
        ("#### - 5", "-5"),
        ("####18", "18"),
        ("#### 1,234.", "1234"),
        ("#### 18.00", "18"),
        ("#### 18 dollars, not 20", "18"),
        ("#### 12%", "12"),
        ("#### 12\nQuestion: and then?\n#### 99", "12"),
    ],
)
def test_strict_reads_the_first_mark(text: str, value: str) -> None:
    assert extract_strict(text) == Decimal(value)


@pytest.mark.parametrize(
    "text", ["", "18", "The answer is 18.", "####", "#### ..", "#### none", "####\n18", "#### x\n#### 4"]
)
def test_strict_without_a_marked_number_is_none(text: str) -> None:
    assert extract_strict(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 18.", "18"),
        ("He pays $1,234.50 in all.", "1234.5"),
        ("From 3 to -4", "-4"),
        ("7-3", "3"),
        ("(7)-3", "3"),
        ("-$3", "-3"),
        ("10, 20, 30.", "30"),
        ("1,2,3", "3"),
        ("12,3456", "3456"),
        ("18 .. !", "18"),
        ("it is .5", "0.5"),
        ("6 * 3 = 18.\n#### 18", "18"),
    ],
)
def test_flexible_reads_the_last_number(text: str, value: str) -> None:
    assert extract_flexible(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "..", "$", "none at all", "- -"])
def test_flexible_without_a_number_is_none(text: str) -> None:
    assert extract_flexible(text) is None


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9), st.booleans())
def test_a_formatted_number_reads_back(value: Decimal, dollar: bool) -> None:
    written = ("-" if value < 0 else "") + "$" * dollar + f"{abs(value):,.2f}"
    assert parse_number(written) == value
    assert extract_strict(f"Some steps. 1 + 1 = 2.\n#### {written}.") == value
    assert extract_flexible(f"Some steps, 1 + 1 = 2: {written}.") == value


@given(st.text(alphabet="0123456789.,$-+# \nabc=", max_size=40))
def test_no_text_raises(text: str) -> None:
    for read in (parse_number, extract_strict, extract_flexible):
        value = read(text)
        assert value is None or value.is_finite()


def test_scores_tell_wrong_from_unparsable() -> None:
    answer = "2 + 2 = 4.\n#### 4"
    assert score_number("#### 4.00", answer) == {"strict": 1.0, "flexible": 1.0}
    assert score_number("The answer is 4.", answer) == {"strict": None, "flexible": 1.0}
    assert score_number("#### 5", answer) == {"strict": 0.0, "flexible": 0.0}
    assert score_number("four", answer) == {"strict": None, "flexible": None}


def test_a_reference_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="no number after ####"):
        score_number("4", "the answer is 4")
