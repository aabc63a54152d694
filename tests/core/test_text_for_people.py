from __future__ import annotations

import pytest

from qratk.core import Configuration
from qratk.core.text import clean, duration, label, short_names, visible


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (float("nan"), "-"), (-1.0, "-"), (0.0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"),
     (725.0, "12 min 05 s"), (3599.6, "1 h 00 min"), (11220.0, "3 h 07 min"), (187_200.0, "2 d 04 h")],
)  # fmt: skip
def test_duration_is_told_in_two_units(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "secret",
    ["hf_abcdefghijklmnopqrstuv", "password=hunter22", "api_key: abcdef123456"],
)
def test_what_looks_like_a_secret_is_hidden(secret: str) -> None:
    text = clean(f"cannot load model with {secret} today")
    assert "(hidden)" in text
    assert not any(part in text for part in ("hunter22", "abcdef"))
    assert text.endswith("today")


def test_user_of_an_address_is_cut_out() -> None:
    assert clean("cannot open https://me:hunter22@host/x today") == "cannot open https://host/x today"


def test_ordinary_text_about_tokens_is_not_hidden() -> None:
    text = "tokenizer has 50257 tokens; pad_token is eos_token; secretary; sk-learn; https://host:8080/path@x"
    assert clean(text) == text


def test_control_codes_and_line_breaks_are_removed() -> None:
    assert clean("a\x1b[1;31mb\x1b[0m\r\n\tc\x07\x1b]0;title\x07d") == "ab c d"


def test_label_is_the_choice_of_a_uniform_configuration_or_a_digest() -> None:
    assert label(Configuration.uniform(4, 8, 5)) == "4:8"
    mixed = Configuration.of([2, 4], [8, 8])
    assert label(mixed) == mixed.digest[:8]


def test_short_names_drop_what_all_share_and_stay_distinct() -> None:
    assert short_names(["model.layers.0.mlp", "model.layers.1.mlp"]) == ("0", "1")
    assert short_names(["h.0.attn", "h.0.mlp", "h.1.attn"]) == ("0.attn", "0.mlp", "1.attn")
    assert short_names(["layer"]) == ("layer",)
    assert short_names(["model.a", "model.a.b"]) == ("a", "a.b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("caf\u00e9 \U0001f600 \u4f60", "caf\u00e9 \U0001f600 \u4f60"),
        ("\x1b[2J\x07\r\t\x00\x7f\x9b", r"\x1b[2J\x07\r\t\x00\x7f\x9b"),
        ("\u202eabc\u2028\u200b\xa0\ud83d", r"\u202eabc\u2028\u200b\xa0\ud83d"),
        ("a\nb", r"a\nb"),
    ],
)
def test_what_acts_or_hides_is_made_visible(text: str, expected: str) -> None:
    assert visible(text) == expected
    assert visible(text).isprintable()


def test_line_feeds_stay_where_lines_are_wanted() -> None:
    assert visible("a\n\x1b\n", lines=True) == "a\u21b5\n\\x1b\u21b5\n"
