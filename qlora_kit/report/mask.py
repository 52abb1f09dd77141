"""The mask of a token row on a terminal: supervised tokens stand out.

Takes the tokens of a row; returns text for rich. Without colours, runs of supervised tokens stand
between ⟦ and ⟧. A character that could steer the terminal is written as its escape sequence.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.text import Text

_MOST_OF_A_RUN = 200
# Two styles of each kind take turns, so that the borders of tokens can be seen.
_SUPERVISED = ("black on green3", "black on light_green")
_CONTEXT = ("grey50", "grey70")
_LEGEND = (("supervised", _SUPERVISED[0]), ("context", _CONTEXT[1]))
_MARKS = {"\n": "↵\n", "\t": "→\t"}
# Controls, marks of the direction of writing, halves of characters, unusual line ends.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def mask_text(tokens: Sequence[tuple[str, float]], *, in_colour: bool) -> Text:
    """Return a token row; in colour, with a legend under it.

    Args:
        tokens: the text of each token, and the factor of its loss: 0 where it is not supervised.
        in_colour: whether the terminal has colours.
    """
    text = Text()
    weights = [weight for _, weight in tokens]
    for weight, run in groupby(shown(weights, _MOST_OF_A_RUN), lambda each: each[1]):
        marks = ("⟦", "⟧") if weight and not in_colour else ("", "")
        styles = _SUPERVISED if weight else _CONTEXT
        text.append(marks[0])
        text.append(f"{weight_mark(weight)} " if weight_mark(weight) else "", "italic")
        for what, _ in run:
            if isinstance(what, range):
                text.append(left_out(what), "italic")
            else:
                text.append(visible(tokens[what][0]), styles[what % 2] if in_colour else "")
        text.append(marks[1])
    for word, style in _LEGEND if in_colour else ():
        text.append("\n" if word == _LEGEND[0][0] else " ")
        text.append(f" {word} ", style)
    return text


def weight_mark(weight: float) -> str:
    """Return the mark of tokens whose loss has this factor; none where it is 1 or 0."""
    return "" if weight in (0, 1) else f"×{weight:g}"


def shown(weights: Sequence[float], most: int) -> Iterator[tuple[int | range, float]]:
    """Yield the tokens to show, and for each longer run the range of tokens that is left out.

    The beginning and the end of a run are shown, because there the mask is right or wrong.

    Args:
        weights: the factor of each token's loss: 0 where it is not supervised.
        most: the tokens of a run that are shown.

    Yields:
        The index of a token or a range of indices, and the factor of their loss.
    """
    for weight, run in groupby(range(len(weights)), weights.__getitem__):
        tokens = [*run]
        half = most // 2
        if len(tokens) <= most:
            yield from ((token, weight) for token in tokens)
            continue
        yield from ((token, weight) for token in tokens[:half])
        yield range(tokens[half], tokens[-half]), weight
        yield from ((token, weight) for token in tokens[-half:])


def left_out(tokens: range) -> str:
    """Return the text that stands for tokens that are not shown."""
    return f" […{len(tokens):,} tokens…] "


def visible(text: str) -> str:
    """Return a token's text with line ends and tabs marked, and invisible characters escaped."""
    return "".join(_MARKS.get(each) or _written(each) for each in text)


def _written(character: str) -> str:
    unseen = unicodedata.category(character) in _UNSEEN
    return f"\\u{{{ord(character):x}}}" if unseen else character
