"""Finds the longest row whose peak stays within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

STEP = 256
_START, _MOST = 2048, 1 << 20


def longest_length(
    peak_of: Callable[[int], int], budget_bytes: int, known: Sequence[int] = ()
) -> int:
    """Return the longest length, a multiple of `STEP`, that fits; 0 where none does.

    The peak grows with the length, almost on a line. So a guess is the length at which the line
    through the nearest lengths below and above meets the budget, and few guesses are needed. Both
    the answer and the length one step above it have been tried.

    Args:
        peak_of: returns the bytes that rows of a length take.
        budget_bytes: bytes that the rows may take.
        known: lengths whose peaks are known already, and cost nothing.
    """
    peaks = {length: peak_of(length) for length in known or (_START,)}
    fits = max((n for n, peak in peaks.items() if peak <= budget_bytes), default=0)
    exceeds = min((n for n, peak in peaks.items() if peak > budget_bytes), default=_MOST + STEP)
    while exceeds - fits > STEP:
        guess = _next_guess(fits, exceeds, peaks, budget_bytes)
        peaks[guess] = peak_of(guess)
        if peaks[guess] <= budget_bytes:
            fits = guess
        else:
            exceeds = guess
    return fits


def _next_guess(fits: int, exceeds: int, peaks: dict[int, int], budget_bytes: int) -> int:
    if exceeds not in peaks:
        guess = 2 * fits
    elif fits not in peaks:
        guess = exceeds // 2
    else:
        slope = (peaks[exceeds] - peaks[fits]) / (exceeds - fits)
        guess = fits + int((budget_bytes - peaks[fits]) / slope)
    guess = guess // STEP * STEP
    return max(fits + STEP, min(guess, exceeds - STEP))
