"""Markdown of pages: numbers never flatter, and text stays text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dpfa_hf.markdown import shown, table, up


@given(st.floats(1e-12, 1e12))
def test_what_is_shown_of_a_number_is_never_below_it(number: float) -> None:
    assert number <= float(up(number)) <= number * 1.001


@pytest.mark.parametrize(("number", "text"), [(2.99801, "2.999"), (1e-05, "1e-05"), ("inf", "inf"), (3.0, "3")])
def test_four_digits_are_shown_rounded_up(number: float | str, text: str) -> None:
    assert up(number) == text


@given(st.text(max_size=40))
def test_a_cell_reads_as_it_was_written_whatever_is_in_it(text: str) -> None:
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(table(("a", "b"), [(text, "end")]))
    assert rendered.count("<td>") == 2 and "<td>end</td>" in rendered
    assert "<script" not in rendered and "<code>" not in rendered and "<a " not in rendered


def test_markup_is_escaped() -> None:
    assert shown("a|b <i> `c` [d](e) *f* \\ &amp;") == r"a\|b &lt;i> \`c\` \[d\](e) \*f\* \\ &amp;amp;"
    assert shown("one\n two") == "one two"
