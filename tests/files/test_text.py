"""Names that do harm where they are shown, made plain."""

import csv
import io
import os

import pytest

from timm_xformers.files.text import plain


@pytest.mark.parametrize("name", ["cat", "Großer Hund", "猫", "a b-c_d.e", "T-shirt/top", "❤️", ""])
def test_usual_names_stay_as_they_are(name):
    assert plain(name) == plain(name, "csv") == plain(name, "markdown") == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("\ud800", r"\ud800"),
        ("gpj.\u202etac", r"gpj.\u202etac"),
        ("\u2028", r"\u2028"),
    ],
)
def test_what_does_something_is_written_out(name, shown):
    assert plain(name) == shown
    assert plain(name).encode("utf-8").isascii()


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1+2", "-x", "@SUM(A1)"])
def test_formulas_are_text_in_a_table(name):
    buffer = io.StringIO()
    csv.writer(buffer).writerow([plain(name, "csv")])
    (row,) = csv.reader(io.StringIO(buffer.getvalue()))
    assert row == [f"'{name}"]


@pytest.mark.parametrize("number", ["-1", "+0.5", "-1e-3"])
def test_numbers_stay_numbers_in_a_table(number):
    assert plain(number, "csv") == number


def test_marks_of_markdown_and_html_are_escaped():
    assert plain("a|b <script> `c` [d](e) *f*", "markdown") == (
        r"a\|b \<script\> \`c\` \[d\](e) \*f\*"
    )
