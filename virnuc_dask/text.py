"""Text for people to read."""

from __future__ import annotations


def printable(text: str, most: int = 80) -> str:
    """Shorten untrusted text, and replace its unprintable characters."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text[:most])


def counted(number: int, noun: str) -> str:
    """A number and a noun, in the plural where it is needed: ``1 row``, ``1,000 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time span for people: ``1.5 s``, ``2 min 05 s``, ``3 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def rate(number: float) -> str:
    """A speed for people: ``1,234``, ``56``, ``0.58``."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def share(part: float, whole: float) -> str:
    """A share for people: ``18.0%``; never ``0.0%`` of something."""
    return "less than 0.1%" if 0 < part < whole / 2000 else f"{part / max(whole, 1):.1%}"
