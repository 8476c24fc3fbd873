"""Made-up names, codes, numbers and paths: what stands in a company's article and in no corpus, so that it can only be copied.

This file knows nothing of articles or prompts.
"""

from __future__ import annotations

import random

_ONSETS = (
    *("b", "bl", "br", "c", "ch", "cr", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kr", "l", "m", "n", "p", "pl", "qu", "r", "s", "sk"),
    *("sl", "st", "t", "th", "tr", "v", "w", "x", "y", "z", ""),
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ie", "oo", "ou", "ya")
_ENDS = ("", "", "", "n", "r", "l", "s", "x", "t", "ck", "rd", "nt", "m", "sh", "ve", "ne")
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def name(rng: random.Random) -> str:
    """A pronounceable name of one to three syllables: "Brouxa", "Teck-4", "Stair Vone"."""
    text = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_ENDS) for _ in range(rng.randint(1, 3)))
    text = rng.choice([text.capitalize(), text.capitalize(), text, text.upper() if len(text) < 6 else text.capitalize()])
    tail = rng.random()
    if tail < 0.15:
        return f"{text} {rng.randint(1, 99)}"
    return f"{text}-{rng.randint(1, 9)}" if tail < 0.22 else text


def code(rng: random.Random) -> str:
    """A message code, a form, an order or a version: "F-207", "0x80A31C", "QT 4412", "3.18.2"."""
    letters = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(1, 3)))
    number = rng.randint(2, 10 ** rng.randint(2, 6))
    return rng.choice(
        [
            f"{letters}-{number}",
            f"{letters}{number}",
            f"{letters} {number}",
            str(number),
            f"0x{rng.getrandbits(24):06X}",
            f"{rng.randint(1, 12)}.{rng.randint(0, 40)}.{rng.randint(0, 9)}",
        ]
    )


def path(rng: random.Random) -> str:
    """A way through menus, folders or the net: "Brouxa > Teck", "\\\\srv-teck\\brouxa", "brouxa.example/teck"."""
    a, b = name(rng), name(rng)
    low = "".join(c for c in a.lower() if c.isalnum()), "".join(c for c in b.lower() if c.isalnum())
    ways = [
        f"{a} > {b}",
        f"{a} > {b}",
        f"{a} > {b} > {name(rng)}",
        f"\\\\srv-{low[0]}\\{low[1]}",
        f"{low[0]}.example/{low[1]}",
        f"/{low[0]}/{low[1]}",
    ]
    return rng.choice(ways)


def number(rng: random.Random) -> str:
    """A telephone or room number: "4471", "0800 3172"."""
    return rng.choice(["", "", "0800 ", f"{rng.randint(1, 9)}-"]) + str(rng.randint(100, 99_999))


def word(rng: random.Random) -> str:
    """A name, a code or a path."""
    return rng.choices((name, code, path), weights=(5, 4, 2))[0](rng)
