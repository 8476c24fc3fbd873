"""A conversation and what is known of the requester -> what is scored: the user's words, turn by turn, and the profile.

Knows nothing of features, personas or models.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from persona_models.errors import InputError
from persona_models.protocol import Message

# What is scored of one request, in characters. A longer text keeps its head and its tail: a mail's signature often names the sender's job.
MAX_CHARS = 4000
TAIL_CHARS = 1000
# A last turn with fewer telling words than this ("same thing again") is read together with the turns before it.
MIN_TELLING_WORDS = 4
# User turns that are looked at; what was said before them is long past.
MAX_TURNS = 8
# Longer runs without a space are no words; their n-grams would only cost time.
MAX_WORD_CHARS = 40

_WORD = re.compile(r"\w+(?:['-]\w+)*")
# A sentence ends before a space, so that "10.4.2" and "name@host.example" are none; a line ends one as well.
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n|\Z")
_RUN = re.compile(r"\S+")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,7}")
_NEUTRAL_WORDS = """
a about actually again ah all already also always am an and another any anyone anything are as ask at back be been before but by bye can
cannot can't check cheers come could day dear desk did didn't do does doesn't doing don't done earlier ever exactly fine first for from get
getting give go going good got great guys had happen happened happening happens has have he hello help helped helpdesk helping hey hi hmm how
i i'm i've if in is isn't issue it it's its just know last later let like look many maybe me mine more morning much my need never next no nope
not nothing now of off ok okay old on once one or other our out over please pls problem quite really right same second see sent she should so
some someone something sorry still such sure team thank thanks that that's the their them then there these they thing things think this those
though thx till time to today tomorrow too tried try trying two u up us very was we week well were what when where which while who why will
wish with without won't work worked working works would wrong yeah yep yes yesterday yet you you're your
"""
_NEUTRAL = frozenset(_NEUTRAL_WORDS.split())


@dataclass(frozen=True)
class Profile:
    """What is known of the requester; an empty profile is a normal case."""

    title: str = ""
    department: str = ""
    tenure_days: int | None = None
    location: str = ""

    @staticmethod
    def from_metadata(metadata: Mapping[str, object]) -> Profile:
        """Read the profile keys of a request's metadata; other keys belong to someone else and are ignored.

        Key case, spaces and hyphens do not matter ("Tenure days" = "tenure_days"); empty values count as absent. Raises InputError where
        tenure_days is not a whole number of days.
        """
        known = {}
        for key, value in metadata.items():
            name = re.sub(r"[\s-]+", "_", str(key).strip().lower())
            if name in Profile.__dataclass_fields__ and value is not None and str(value).strip():
                known[name] = str(value).strip()
        days = known.get("tenure_days")
        if days is not None and not _WHOLE_NUMBER.fullmatch(days):
            raise InputError(f"tenure_days is {days[:80]!r}; give the days since joining as a whole number, such as 12", param="metadata.tenure_days")
        return Profile(
            title=known.get("title", ""),
            department=known.get("department", ""),
            tenure_days=None if days is None else int(days),
            location=known.get("location", ""),
        )

    def __bool__(self) -> bool:
        return bool(self.title or self.department or self.location) or self.tenure_days is not None


@dataclass(frozen=True)
class Query:
    """What is scored: the user's words and the user's profile.

    text: the last turn, with earlier ones where it says too little by itself; turns: all user turns, the latest first, where there are several.
    """

    text: str
    profile: Profile = field(default_factory=Profile)
    turns: tuple[str, ...] = ()


def query_of(messages: Sequence[Message], profile: Profile | None = None) -> Query:
    """The query of a conversation: its last user turn, and the turns before it.

    A last turn that says too little by itself ("yes please") is followed in `text` by the earlier user turns, latest first, up to MAX_CHARS. What the
    system or the assistant said is never scored: the words of our own answers would decide the next route. Raises InputError without a user turn.
    """
    turns = [m.content for m in messages if m.role == "user"]
    if not turns:
        raise InputError("messages: there is no user turn to route", param="messages")
    text = _cut(turns[-1])
    if telling_words(text) < MIN_TELLING_WORDS:
        for turn in reversed(turns[:-1]):
            if (room := MAX_CHARS - len(text) - 1) <= 0:
                break
            text = f"{text}\n{turn[:room]}"
    return Query(text, profile or Profile(), tuple(turns[: -MAX_TURNS - 1 : -1]) if len(turns) > 1 else ())


def telling_words(text: str) -> int:
    """How many different words say something about the matter, greetings and "still not working" left out."""
    return len({w for w in words_of(text) if len(w) > 1 and w not in _NEUTRAL})


def beginning(text: str, words: int) -> str:
    """A text's first sentences and lines of so many words together; where the next one would leave less than half of them, its first words as well."""
    kept = end = 0
    for found in _SENTENCE_END.finditer(text):
        more = len(text[end : found.end()].split())
        if kept + more > words:
            break
        kept, end = kept + more, found.end()
    if kept < words / 2:
        end = next((m.end() for n, m in enumerate(_RUN.finditer(text), 1) if n == words), len(text))
    return text[:end].strip()


def words_of(text: str) -> list[str]:
    """The words of a text, case folded and in one Unicode form."""
    folded = unicodedata.normalize("NFKC", _cut(text)).casefold().replace("\u2019", "'")
    return [w[:MAX_WORD_CHARS] for w in _WORD.findall(folded)]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - TAIL_CHARS - 1] + "\n" + text[-TAIL_CHARS:]
