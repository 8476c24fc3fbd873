"""One knowledge article: Markdown in, the text that goes into a prompt out.

The built-in articles and a company's own are read by the same code. Only `# Title` and some text are required; `Symptoms`, `Cause`, `Steps`,
`Escalate` and a section per persona are used where they exist. This file knows nothing of retrieval, models or HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from persona_models.errors import ArticleError

_SECTION = re.compile(r"^##\s+(.+?)\s*$", re.MULTILINE)
_TITLE = re.compile(r"^#\s+(.+?)\s*$", re.MULTILINE)
_STEP = re.compile(r"^\d+[.)]\s+(.*)$")
_BULLET = re.compile(r"^\s*[-*+]\s+(.*)$")
_SLOT = re.compile(r"\{([a-z][a-z0-9_]*)\}")
# How much of an article may enter a prompt, in words; a longer company article is cut behind a whole step.
MAX_WORDS = 190
# Which of a step's wordings each persona gets; personas that are not named here get the plain one.
WORDING = {"leadership": "short", "field": "short", "new_hire": "full"}
NO_ARTICLE = "No article covers this request."


@dataclass(frozen=True)
class Step:
    """One resolution step in up to three wordings; `short` and `full` fall back to `plain`."""

    plain: str
    short: str = ""
    full: str = ""

    def say(self, wording: str) -> str:
        """The step in a wording: "plain", "short" or "full"."""
        return {"plain": self.plain, "short": self.short or self.plain, "full": self.full or self.plain}[wording]


@dataclass(frozen=True)
class Article:
    """A knowledge article. `notes` and `order` are by persona id; `order` holds step numbers from 1."""

    id: str
    title: str
    subject: str
    symptoms: tuple[str, ...] = ()
    cause: str = ""
    steps: tuple[Step, ...] = ()
    escalate: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    order: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    slots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def steps_for(self, persona: str | None) -> tuple[Step, ...]:
        """The steps in the order this persona gets them; all of them where the article does not say."""
        order = self.order.get(persona or "")
        return tuple(self.steps[i - 1] for i in order) if order else self.steps

    def search_text(self) -> str:
        """What the retriever indexes: title, subject, symptoms, cause and steps."""
        return "\n".join([self.title, self.title, self.subject, *self.symptoms, *self.symptoms, self.cause, *(s.plain for s in self.steps)])

    def render(
        self,
        persona: str | None = None,
        *,
        wording: str | None = None,
        values: Mapping[str, str],
    ) -> str:
        """The article as the model reads it.

        `persona` picks step order, wording and note; None is the neutral form. `values` fills the {slots} and holds at least desk_phone; slots it lacks
        take the article's own first value, or stay as they are when nobody declares them.
        """
        wording = wording or WORDING.get(persona or "", "plain")
        steps = self.steps_for(persona)
        lines = [f"About {self.subject}."]
        if self.cause:
            lines.append(f"Cause: {self.cause}")
        lines += [f"{n}. {step.say(wording)}" for n, step in enumerate(steps, 1)]
        if note := self.notes.get(persona or ""):
            lines.append(f"Note: {note}")
        # An answer may name the phone, so the phone is always there to be copied.
        escalate = self.escalate or "Call the service desk on {desk_phone}."
        lines.append(f"Desk: {escalate}" + ("" if "{desk_phone}" in escalate else " Phone: {desk_phone}."))
        return fill("\n".join(lines), {name: options[0] for name, options in self.slots.items()} | dict(values))


def handover_document(values: Mapping[str, str]) -> str:
    """What the model reads when no article covers a request: whom to hand over to, and nothing else. `values` as in Article.render."""
    return fill(f"{NO_ARTICLE}\nDesk: Call the service desk on {{desk_phone}} or use {{desk_portal}}.", values)


def fill(text: str, values: Mapping[str, str]) -> str:
    """Replace {slot} by its value; a slot without one is left as written."""
    return _SLOT.sub(lambda m: values.get(m[1], m[0]), text)


def slots_in(text: str) -> set[str]:
    """Names of the {slots} a text uses."""
    return set(_SLOT.findall(text))


def read_article(path: Path, personas: tuple[str, ...] = ()) -> Article:
    """Read one Markdown file.

    Raises ArticleError, naming file and fault, for text that is not UTF-8, a missing title, an empty body, front matter that is not a mapping, or
    an `order` that names a persona or a step that does not exist.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ArticleError(f"{path}: not UTF-8 text (byte {e.start}); save the article as UTF-8") from None
    return parse_article(text, path.stem, source=str(path), personas=personas)


def parse_article(text: str, default_id: str, *, source: str, personas: tuple[str, ...] = ()) -> Article:
    """Parse the Markdown of one article; see read_article."""
    head, body = _front_matter(text.replace("\r\n", "\n"), source)
    title = _TITLE.search(body)
    if not title:
        raise ArticleError(f"{source}: no title; an article starts with a line '# Title'")
    sections = _sections(body[title.end() :])
    steps = _steps(sections.pop("steps", ""))
    lead = sections.pop("", "")
    notes = {p: _prose(sections.pop(k)) for p in personas for k in list(sections) if k.replace(" ", "_").removeprefix("for_") == p}
    symptoms = _bullets(sections.pop("symptoms", ""))
    cause, escalate = _prose(sections.pop("cause", "")), _prose(sections.pop("escalate", ""))
    if not steps:
        # A company's article in no particular form: its list items are the steps, or else its sentences.
        rest = "\n".join([lead, *sections.values()])
        steps = _steps(rest) or tuple(Step(s) for s in (_bullets(rest) or _sentences(rest)))
        steps = _cut(steps)
    elif lead and not cause:
        cause = _prose(lead)
    if not steps:
        raise ArticleError(f"{source}: no text under the title; write the steps that solve the case")
    name = title[1]
    return Article(
        id=str(head.get("id", default_id)),
        title=name,
        subject=str(head.get("subject", f'"{name}"')),
        symptoms=symptoms,
        cause=cause,
        steps=steps,
        escalate=escalate,
        notes=notes,
        order=_order(head.get("order") or {}, len(steps), personas, source),
        slots=_slots(head.get("slots") or {}, source),
    )


def _front_matter(text: str, source: str) -> tuple[dict[str, Any], str]:
    if not text.startswith("---\n"):
        return {}, text
    end = text.find("\n---", 3)
    if end < 0:
        raise ArticleError(f"{source}: the front matter opened by '---' is never closed by another '---'")
    try:
        head = yaml.safe_load(text[4:end]) or {}
    except yaml.YAMLError as e:
        raise ArticleError(f"{source}: front matter is not valid YAML: {str(e).splitlines()[0]}") from None
    if not isinstance(head, dict):
        raise ArticleError(f"{source}: front matter must be 'key: value' lines")
    return head, text[text.find("\n", end + 1) + 1 :]


def _sections(body: str) -> dict[str, str]:
    """Heading in lower case -> its text; the text before the first heading is under ""."""
    parts = _SECTION.split(body)
    return {"": parts[0].strip()} | {parts[i].strip().lower(): parts[i + 1].strip() for i in range(1, len(parts), 2)}


def _steps(text: str) -> tuple[Step, ...]:
    steps: list[dict[str, str]] = []
    for line in text.splitlines():
        if m := _STEP.match(line):
            steps.append({"plain": m[1].strip()})
        elif steps and (b := _BULLET.match(line)):
            kind, _, words = b[1].partition(":")
            if kind in ("short", "full") and words:
                steps[-1][kind] = words.strip()
            else:
                steps[-1]["plain"] += " " + b[1].strip()
        elif steps and line.strip():
            steps[-1]["plain"] += " " + line.strip()
    return tuple(Step(**s) for s in steps)


def _bullets(text: str) -> tuple[str, ...]:
    return tuple(m[1].strip() for line in text.splitlines() if (m := _BULLET.match(line)))


def _prose(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _sentences(text: str) -> tuple[str, ...]:
    return tuple(s for s in re.split(r"(?<=[.!?])\s+", _prose(text)) if s)


def _cut(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    kept: list[Step] = []
    words = 0
    for step in steps:
        words += len(step.plain.split())
        if kept and words > MAX_WORDS:
            break
        kept.append(step)
    return tuple(kept)


def _order(raw: Any, n_steps: int, personas: tuple[str, ...], source: str) -> dict[str, tuple[int, ...]]:
    if not isinstance(raw, dict):
        raise ArticleError(f"{source}: 'order' must map personas to lists of step numbers")
    order = {}
    for persona, numbers in raw.items():
        if personas and persona not in personas:
            raise ArticleError(f"{source}: 'order' names the persona {persona!r}; known are {', '.join(personas)}")
        ok = isinstance(numbers, list) and numbers and all(isinstance(n, int) and 1 <= n <= n_steps for n in numbers)
        if not ok or len(set(numbers)) != len(numbers):
            raise ArticleError(f"{source}: 'order' of {persona} is {numbers!r}; use different step numbers from 1 to {n_steps}")
        order[persona] = tuple(numbers)
    return order


def _slots(raw: Any, source: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(raw, dict) or not all(isinstance(v, list) and v for v in raw.values()):
        raise ArticleError(f"{source}: 'slots' must map names to lists of values")
    return {name: tuple(str(v) for v in values) for name, values in raw.items()}
