"""The final answer of a text that solves a problem, and its exact comparison with another.

A text that is an expression is its own answer. In any other, the answer is looked for in this order: the last `\\boxed{…}`, what
follows the last `####` (as in GSM8K), what follows the last "answer is" or "answer:", the last number. So "7 + 5 = 12", "The answer
is 12." and "\\boxed{\\frac{24}{2}}" all end with 12.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARACTERS = 400  # of an expression that is computed; a longer one is compared as text
MAX_DEPTH = 20  # of parentheses in each other
MAX_BITS = 4096  # of a numerator or denominator
MAX_EXPONENT = 256

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_TOKEN = re.compile(rf"\s*(?:(?P<number>{_NUMBER})|(?P<sign>\*\*|[-+*/^()]))")
_PLAIN = re.compile(rf"(?<![\w.])-?(?:{_NUMBER})(?:\s*/\s*(?:{_NUMBER}))?")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_AFTER_WORDS = re.compile(r"answer\s*(?:is|:|=)\s*:?\s*", re.IGNORECASE)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
_UNPRINTED = re.compile(r"\\left|\\right|\\[!,;: ]|\\?%|\\?\$|\^\s*\{?\\circ\}?|\\\(|\\\)|\\\[|\\\]|\*\*(?=\s*$)|^\s*\*\*")
_SIGNS = {"\\cdot": "*", "\\times": "*", "\\div": "/", "×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "{": "(", "}": ")"}


def same_math_answer(reply: str, reference: str) -> bool:
    """Whether both texts end with the same answer: equal as exact numbers or, if one is no number, as text without blanks."""
    ours, theirs = final_answer(reply), final_answer(reference)
    if ours is None or theirs is None:
        return False
    first, second = value_of(ours), value_of(theirs)
    if first is not None and second is not None:
        return first == second
    return first is None and second is None and _bare(ours) == _bare(theirs)


def final_answer(text: str) -> str | None:
    """The final answer in `text` as it is written there; None if there is none."""
    if value_of(text) is not None:
        return text.strip()
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    if "####" in text:
        return _number_or_all(text.rpartition("####")[2].strip().partition("\n")[0])
    if matches := list(_AFTER_WORDS.finditer(text)):
        return _number_or_all(text[matches[-1].end() :].partition("\n")[0])
    numbers = _PLAIN.findall(_printed(text))
    return numbers[-1] if numbers else None


def value_of(answer: str) -> Fraction | None:
    """The exact value of a number, fraction or expression of numbers; None for all else, and for what is too large to compute."""
    expression = _printed(answer).rpartition("=")[2].strip().rstrip(".")
    if not expression or len(expression) > MAX_CHARACTERS:
        return None
    try:
        return _Expression(expression).value()
    except (ValueError, ZeroDivisionError):
        return None


def _last_boxed(text: str) -> str | None:
    """Content of the last closed `\\boxed{…}`."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for place in range(match.end(), len(text)):
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return text[match.end() : place].strip()
    return None


def _number_or_all(text: str) -> str:
    """`text` if it is an expression, else the first number in it ("12 apples." is 12), else its first sentence."""
    if value_of(text) is not None:
        return text
    if number := _PLAIN.search(_printed(text.rpartition("=")[2])):
        return number[0]
    return text.strip().rstrip(".")


def _printed(text: str) -> str:
    """`text` with LaTeX's fractions and signs as plain ones, and without what does not change a value."""
    text = _UNPRINTED.sub("", _TEXT.sub(r" \1", text))
    for pattern in (_FRACTION, _SHORT_FRACTION):
        for _ in range(MAX_DEPTH):  # from the innermost fraction outwards
            text, count = pattern.subn(r"((\1)/(\2))", text)
            if not count:
                break
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    return text


def _bare(answer: str) -> str:
    return "".join(_printed(answer).split()).rstrip(".").lower()


class _Expression:
    """Recursive descent over sums, products, powers with whole exponents and parentheses. Raises `ValueError` for all else."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        place = 0
        while place < len(text.rstrip()):
            match = _TOKEN.match(text, place)
            if match is None:
                raise ValueError
            self._tokens.append(match["number"] or match["sign"])
            place = match.end()
        self._place = self._depth = 0

    def value(self) -> Fraction:
        value = self._sum()
        if self._place < len(self._tokens):
            raise ValueError
        return value

    def _next(self) -> str:
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def _take(self, *signs: str) -> str:
        """The next token, taken if it is one of `signs`; else an empty text."""
        sign = self._next()
        if sign not in signs:
            return ""
        self._place += 1
        return sign

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            value = _small(value + other if sign == "+" else value - other)
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while sign := self._take("*", "/"):
            other = self._signed()
            value = _small(value * other if sign == "*" else value / other)
        return value

    def _signed(self) -> Fraction:
        sign = 1
        while taken := self._take("+", "-"):
            sign = -sign if taken == "-" else sign
        return sign * self._power()

    def _power(self) -> Fraction:
        base = self._atom()
        if not self._take("^", "**"):
            return base
        exponent = self._signed()
        if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
            raise ValueError
        return _small(Fraction(base ** int(exponent)))

    def _atom(self) -> Fraction:
        if self._take("("):
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise ValueError
            value = self._sum()
            if not self._take(")"):
                raise ValueError
            self._depth -= 1
            return value
        number = self._next()
        if not number or number in "*/^()+-**":
            raise ValueError
        self._place += 1
        return Fraction(number.replace(",", ""))


def _small(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError
    return value
