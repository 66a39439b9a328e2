"""Final answers of texts, and their exact comparison."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from apprentice.rewards.math_answer import final_answer, same_math_answer, value_of

SAME = [
    ("The answer is 12.", "7 + 5 = 12"),
    (r"so \boxed{\frac{24}{2}}", "12"),
    (r"\boxed{1} or rather \boxed{\dfrac12}", "0.5"),
    ("That makes 1,234.50 apples", "2469/2"),
    ("#### 18", "long\nreasoning 17\n#### 18"),
    (r"\boxed{x^2 + 1}", r"The sum is \boxed{x^2+1}"),
    (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{\text{yes}}", r"\boxed{yes}"),
    ("Answer: 12 apples", "12"),
    ("**Answer:** 12", "12"),
    ("50\\%", "50"),
    ("3 - 5", "−2"),
    ("(3 + 4) * 2 = 14", "14"),
    ("0.1 + 0.2", "0.3"),  # exact, and not in floating point
    ("1/3", r"\frac{1}{3}"),
    ("the answer is -3", "-3.0"),
]
OTHER = [
    ("12", "13"),
    ("", "12"),
    ("no idea", "12"),
    ("1/3", "0.333333333333333333"),
    (r"\boxed{x}", "12"),
    (r"\boxed{12", r"\boxed{13}"),  # never closed: the last number counts
    ("12 13", "12"),
    ("10000000000000001", "10000000000000002"),
]


@pytest.mark.parametrize(("reply", "reference"), SAME)
def test_same_answers_written_otherwise(reply: str, reference: str) -> None:
    assert same_math_answer(reply, reference)
    assert same_math_answer(reference, reply)


@pytest.mark.parametrize(("reply", "reference"), OTHER)
def test_other_answers(reply: str, reference: str) -> None:
    assert not same_math_answer(reply, reference)


def test_the_last_box_comes_before_words_and_words_before_numbers() -> None:
    assert final_answer(r"The answer is 3. \boxed{4} and 5") == "4"
    assert final_answer("The answer is 3. There were 5.") == "3"
    assert final_answer("first 3, then 5") == "5"
    assert final_answer("nothing") is None


def test_what_is_too_large_has_no_value_and_costs_no_time() -> None:
    begin = time.process_time()
    for text in ("9^9^9^9", "9**99999999", "(" * 5000 + "1", "1/0", "1+" * 300 + "1", "99999^200^2", "1" * 401):
        assert value_of(text) is None
    assert time.process_time() - begin < 10  # one of these powers alone would take hours
    assert value_of("2^-2") == Fraction(1, 4)
    assert value_of("--3 + +1") == 4
