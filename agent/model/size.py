"""Sizes as people write them."""

import re

from .errors import Invalid

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_SIZE = re.compile(r"(\d{1,18})\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_FACTORS = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}


def parse_size(text: str, what: str) -> int:
    """Return the bytes of `512M`, `2G`, `2GiB` or `536870912`; `what` names the value in errors."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise Invalid(
            f"{what} {text[:40]!r} is not a size: write bytes or a number with K, M, G or T"
        )
    return int(match[1]) * _FACTORS[match[2].lower()]


def show_size(size: int) -> str:
    """Return `size` bytes for people: the largest unit that divides it, else MiB with a decimal."""
    for suffix, factor in (("G", GIB), ("M", MIB), ("K", KIB)):
        if size >= factor and size % factor == 0:
            return f"{size // factor}{suffix}"
    return f"{size / MIB:.1f}M" if size >= MIB else f"{size}B"
