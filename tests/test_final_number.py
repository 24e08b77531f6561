"""The number an answer ends on, in every way that people and models write one."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_lora_plugin.chat.final_number import final_number

FOUND = {
    "#### 72": 72, "6 * 12 = 72\n#### 1,234.50": Fraction("1234.5"), "#### $1,000": 1000, "#### -$5": -5,
    "#### $-5": -5,
    "#### −7 degrees": -7, "#### 18.0": 18, "#### 3 / 4": Fraction(3, 4), "the answer is 12 apples.": 12, "5-3=2": 2,
    "from 3-5": 5, "- 5 apples": 5, "= -5": -5, "50%": 50, "1.5e3": 1500, ".5": Fraction(1, 2),
    "100,000,000": 100000000,
    "1,2,3": 3, "5 - 3": 3, "2^10=1024": 1024, "10km": 10, "the 7th": 7, "**42**": 42, "20$": 20, "\\$20": 20, "５": 5,
    r"\boxed{42}": 42, r"\boxed{\frac{1}{2}}": Fraction(1, 2), r"\boxed{-\dfrac34}": Fraction(-3, 4),
    r"\boxed{1{,}234}": 1234, r"\boxed{\text{12 cm}}": 12, r"$\boxed{-1,000}$. So 5 it is not": -1000,
    r"\boxed{5} #### 6": 6, r"#### 6 \boxed{5}": 5, "<think> 5 #### 7 </think> it is 8": 8,
}  # fmt: skip
NONE = ("", "no number", "#### none", "####", r"\boxed{}", "<think> 5", "x5", "v1.2.3", "#### 5/0", "9" * 500)


@pytest.mark.parametrize("text", FOUND)
def test_the_final_number(text: str) -> None:
    assert final_number(text) == FOUND[text]


@pytest.mark.parametrize("text", NONE)
def test_no_final_number(text: str) -> None:
    assert final_number(text) is None


@given(
    st.decimals(min_value=-(10**9), max_value=10**9, places=2, allow_nan=False),
    st.sampled_from(["#### ${}", "it is {}!"]),
)
def test_every_amount_is_read_back(amount: object, form: str) -> None:
    text = f"{amount:,}"
    assert final_number(form.format(text)) == Fraction(str(amount))


@given(st.text())
def test_any_text_has_a_number_or_none(text: str) -> None:
    found = final_number(text + "#### ")
    assert found is None or isinstance(found, Fraction)
