"""Texts of models and datasets as they may be shown: nothing in them acts, nothing in them hides."""

import unicodedata

# Invisible, but part of how a script is written: joiners (Persian, emoji), soft hyphen, Arabic and Syriac number signs.
HARMLESS_FORMAT = frozenset("\u200c\u200d\u00ad\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2")
ACTING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(text: object) -> str:
    """The text with control, bidi, zero-width and lone surrogate characters written out, newline and tab kept.

    A terminal escape becomes `\\x1b[31m`, a bidi override `\\u202e`, as Python would write them. The result can be
    encoded as UTF-8. It is not yet escaped for HTML or rich markup: that is the template's and rich.text.Text's work.
    """
    return "".join(character if _is_plain(character) else _written_out(character) for character in str(text))


def one_line(text: object) -> str:
    """`visible`, with newlines as `↵` and tabs as blanks: for a cell of a terminal table."""
    return visible(text).replace("\n", "↵").replace("\t", " ")


def _is_plain(character: str) -> bool:
    return character in "\n\t" or character in HARMLESS_FORMAT or unicodedata.category(character) not in ACTING


def _written_out(character: str) -> str:
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
