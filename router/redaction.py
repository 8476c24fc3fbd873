"""Text -> the same text with typed placeholders, such as [MAIL], for what must not be stored or learnt.

Phones are found by phonenumbers, IBANs and card numbers by their check digits (python-stdnum), keys and tokens by detect-secrets' patterns; the rest
are patterns for what helpdesk texts hold. Names are found where the caller knows them, and where people greet, sign or introduce themselves: there is
no name recogniser here, so a name in the middle of a sentence that nobody gave stays. Knows nothing of tickets or files.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Collection

_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_URL = re.compile(r"\b(?:https?|ftp|smb|file)://\S+|\\\\[\w.-]+\\\S+|\bwww\.\S+\.\S+")
_SECRET = re.compile(
    r"(?i)\b(?:pass(?:word|code|phrase)?|passwort|kennwort|mot de passe|pwd|pin|token|secret|api[_ -]?key|recovery (?:key|code)|otp)\b"
    r"(?:\s+(?:is|was|lautet|ist|est)\s+|\s*[=:]\s*)(?!\[)(?P<value>[^\s,;]+)"
)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){11,18}(?![\w.-]*\d)")
_IP4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
_IP6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_MAC = re.compile(r"\b(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}\b")
# Groups of digits with separators, or a plus sign and digits: build numbers and error codes have neither.
_PHONE = re.compile(r"(?<![\w.])(?:\+\d[\d ()/-]{7,16}\d|\(?0\d{1,4}\)?(?:[ /-]\d{2,5}){2,4}|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?![\w.])")
_USER = re.compile(r"\b[A-Z][A-Z0-9-]{1,14}\\[\w.-]{2,}")
_HOST = re.compile(
    r"\b[a-z0-9-]+(?:\.[a-z0-9-]+)*\.(?:local|corp|internal|intranet|intern|lan|ad)\b|"
    r"\b(?:LAPTOP|DESKTOP|LAP|LT|DT|PC|WS|NB|SRV|PRN|PRT|VM|MAC|TAB|SW|AP)[-_][A-Z0-9][A-Z0-9_-]*\d[A-Z0-9_-]*\b|"
    r"\b(?:srv|db|web|app|vm|dc|fs|prn)-?[a-z]*-?\d{2,}\b"
)
_TICKET = re.compile(r"\b(?:INC|REQ|RITM|SCTASK|TASK|CHG|PRB|CASE)[-_ ]?\d{4,}\b")
_ID = re.compile(
    r"(?i)\b(?:employee|personnel|staff|badge|payroll|customer|asset|serial|personal(?:nummer)?)\s*(?:id|no\.?|number|nr\.?|tag|#)?\s*[:#]?\s*"
    r"(?P<value>[A-Z]{0,4}-?\d{4,}[A-Z0-9-]*)"
)
_ADDRESS = re.compile(
    r"\b\d{1,5}[a-z]? (?:[A-Z][\w'-]+ ){1,3}(?:Street|St|Road|Rd|Avenue|Ave|Lane|Ln|Drive|Dr|Boulevard|Blvd|Way|Square|Court|Place|Terrace)\b\.?|"
    r"\b[A-ZÄÖÜ][\wäöüß-]+(?:straße|strasse|str\.|weg|platz|allee|gasse) ?\d{1,4}[a-z]?\b"
)
_CAPITALISED = r"[A-ZÀ-Þ][a-zà-ÿ'’]+(?:-[A-ZÀ-Þ][a-zà-ÿ]+)?"
_FULL = rf"{_CAPITALISED}(?: (?:(?:van|von|de|der|den|di|da|le|la|bin|al) )*{_CAPITALISED}){{0,2}}"
_GREETING = r"[Hh]i|[Hh]ello|[Hh]ey|[Dd]ear|[Hh]allo|[Ll]iebe[r]?|[Bb]onjour|[Gg]ood (?:morning|afternoon)"
_FAREWELL = r"[Rr]egards|[Cc]heers|[Tt]hanks|[Tt]hank you|[Ss]incerely|[Bb]est|[Vv]iele Grüße|[Mm]it freundlichen Grüßen|[Bb]R"
_NAMES = tuple(
    re.compile(p)
    for p in (
        rf"(?m)^[ \t]*(?:{_GREETING})[ ,]+(?P<value>{_FULL})(?=[ ]*[,!.:\n]|[ ]*$|[ ]*[-–])",
        rf"(?:{_FAREWELL})[,.!]?[ ]*\n+[ \t]*(?P<value>{_FULL})[ \t]*(?=\n|$|,|\|)",
        rf"(?:[Mm]y name is|[Ii]ch bin|[Tt]his is|[Ii]'m|[Ii] am) (?P<value>{_CAPITALISED}(?: {_CAPITALISED}){{1,2}})\b",
        rf"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|Herr|Frau|Mme)\.? (?P<value>{_FULL})\b",
    )
)
# Capitalised words that open a sentence where a greeting or a signature could have put a name.
_NO_NAMES = re.compile(
    r"(?i)(?:all|team|everyone|everybody|there|support|helpdesk|help|desk|service|colleagues|sir|madam|it|folks|guys|both|the|outlook|excel|teams|"
    r"windows|please|we|i|this|that|my|our|your|you|he|she|they|in|on|at|for|from)"
)
_LONG_TOKEN = re.compile(r"\S{16,}|PRIVATE KEY")
_DIGITS = re.compile(r"\d[\d ()./-]{5,}\d")


def redact(text: str, counts: Counter[str] | None = None, *, names: Collection[str] = (), region: str | None = None) -> str:
    """Replace personal data and secrets by typed placeholders.

    names: people that the caller knows of (the requester, the agent), as full names; their parts are found too. region: two letters of the country
    whose phone numbers are written without a country code, for example "DE". counts: how often each kind was found is added there.
    """
    for kind, pattern in (("MAIL", _MAIL), ("URL", _URL)):
        text = _replace(text, kind, pattern, counts)
    if _LONG_TOKEN.search(text):
        for pattern in _tokens():
            text = _replace(text, "SECRET", pattern, counts)
    text = _replace(text, "SECRET", _SECRET, counts)
    if _DIGITS.search(text):
        text = _replace(text, "IBAN", _IBAN, counts, _is_iban)
        text = _replace(text, "CARD", _CARD, counts, _is_card)
        text = _replace(text, "IP", _IP4, counts, _is_ip)
        text = _phones(text, counts, region)
    if ":" in text or "-" in text:
        text = _replace(text, "MAC", _MAC, counts)
        text = _replace(text, "IP", _IP6, counts, _is_ip)
    for kind, pattern in (("USER", _USER), ("HOST", _HOST), ("TICKET", _TICKET), ("ID", _ID), ("ADDRESS", _ADDRESS)):
        text = _replace(text, kind, pattern, counts)
    if known := _known_names(tuple(sorted(names))):
        text = _replace(text, "NAME", known, counts)
    for pattern in _NAMES:
        text = _replace(text, "NAME", pattern, counts, lambda name: not _NO_NAMES.fullmatch(name.split()[0]))
    return text


def _replace(text: str, kind: str, pattern: re.Pattern[str], counts: Counter[str] | None, check: Callable[[str], bool] | None = None) -> str:
    """Replace a pattern's matches, or their group `value`, that a check agrees to."""

    def one(match: re.Match[str]) -> str:
        group: int | str = "value" if "value" in pattern.groupindex else 0
        value = match[group]
        if not value or value.startswith("[") or (check and not check(value)):
            return match[0]
        if counts is not None:
            counts[kind] += 1
        start, end = match.start(group) - match.start(), match.end(group) - match.start()
        return match[0][:start] + f"[{kind}]" + match[0][end:]

    return pattern.sub(one, text)


def _phones(text: str, counts: Counter[str] | None, region: str | None) -> str:
    import phonenumbers

    # From the end, so that earlier places stay where they are.
    for match in reversed(list(phonenumbers.PhoneNumberMatcher(text, region))):
        text = text[: match.start] + "[PHONE]" + text[match.end :]
        if counts is not None:
            counts["PHONE"] += 1
    return _replace(text, "PHONE", _PHONE, counts)


def _is_iban(text: str) -> bool:
    from stdnum import iban

    return bool(iban.is_valid(text))


def _is_card(text: str) -> bool:
    from stdnum import luhn

    return bool(luhn.is_valid(re.sub(r"[ -]", "", text)))


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


@functools.cache
def _tokens() -> tuple[re.Pattern[str], ...]:
    """detect-secrets' patterns of keys and tokens that have a form of their own."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    kinds: dict[str, type[RegexBasedDetector]] = get_mapping_from_secret_type_to_class()
    found = [c() for name, c in kinds.items() if issubclass(c, RegexBasedDetector) and name != "Public IP (ipv4)"]
    return tuple(pattern for detector in found for pattern in detector.denylist)


@functools.lru_cache(1024)
def _known_names(names: tuple[str, ...]) -> re.Pattern[str] | None:
    """Full names and their parts, longest first; a part of fewer than three letters is no name by itself."""
    forms = {n.strip() for n in names if len(n.strip()) > 2 and not n.strip().isdigit() and "@" not in n}
    forms |= {part for n in forms for part in re.split(r"[ ,.]+", n) if len(part) > 2 and part[0].isupper()}
    ordered = sorted((f for f in forms if not _NO_NAMES.fullmatch(f)), key=len, reverse=True)
    return re.compile(r"\b(?:" + "|".join(map(re.escape, ordered)) + r")\b") if ordered else None
