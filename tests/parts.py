"""A part of what takes long: every n-th, or that of this day."""

from __future__ import annotations

import argparse
import datetime


def part(text: str, parts_of_days: int) -> tuple[int, int]:
    """Parse "3/10", or "today", which takes as many days to go through all.

    Returns:
        The number of the part, and how many parts there are.
    """
    if text == "today":
        return datetime.date.today().timetuple().tm_yday % parts_of_days, parts_of_days
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(count) > 0):
        raise argparse.ArgumentTypeError(f"expected today, or such as 3/10, got {text!r}")
    return int(number) % int(count), int(count)
