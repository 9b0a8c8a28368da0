"""Texts for people."""

from __future__ import annotations


def printable(text: str, most: int = 80) -> str:
    """A text for people that comes from outside, and may be a megabyte of control codes."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text[:most])


def counted(number: int, noun: str) -> str:
    """So many of something, in words."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time span as a person would say it."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
