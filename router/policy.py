"""Scores -> Route: what happens with a request, and why in one sentence.

Two kinds of "I do not know" are kept apart: `decline` is no helpdesk request, `fallback` is one whose sender cannot be told. A persona that the
caller names is no matter of scores and never comes here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from router.classifier import Scores

Decision = Literal["persona", "mix", "fallback", "decline"]


class PolicySettings(BaseModel):
    """When a score is enough. All values are probabilities, but for mix_sharpness."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_known: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="below this probability that the sender can be told nobody is picked; None: the artefact's own threshold",
    )
    min_confidence: float = Field(default=0.3, ge=0, le=1, description="below this probability of the leading persona nobody is picked")
    mix_margin: float = Field(default=0.25, ge=0, le=1, description="two leading personas this close share the answer; 0 turns mixing off")
    mix_floor: float = Field(default=0.75, ge=0, le=1, description="two personas share only if together they have at least this probability")
    mix_sharpness: float = Field(
        default=1, ge=0, le=10, description="shares are the probabilities to this power: 0 gives both the same, a large one nearly all to the leading"
    )
    min_in_domain: float | None = Field(
        default=None, ge=0, le=1, description="below this it is no helpdesk request; None: the artefact's own threshold"
    )


@dataclass(frozen=True)
class Route:
    """The decision. `persona` is the leading one, None where no persona answers; `mix` has two weights that sum to 1, and is empty otherwise.

    `confidence` is the probability of the leading persona, for `decline` that of being no helpdesk request.
    """

    decision: Decision
    persona: str | None
    confidence: float
    mix: dict[str, float] = field(default_factory=dict)
    reason: str = ""


def decide(scores: Scores, settings: PolicySettings) -> Route:
    """Pick the route. Personas with equal scores rank in catalogue order."""
    bar = scores.min_in_domain if settings.min_in_domain is None else settings.min_in_domain
    if scores.in_domain < bar:
        return Route("decline", None, 1.0 - scores.in_domain, reason=f"looks like no IT helpdesk request ({scores.in_domain:.2f}, needs {bar:.2f})")
    known = scores.min_known if settings.min_known is None else settings.min_known
    ranked = sorted(scores.personas.items(), key=lambda item: -item[1])
    (first, p1), (second, p2) = ranked[0], ranked[1] if len(ranked) > 1 else ("", 0.0)
    if scores.known < known:
        return Route(
            "fallback", None, p1, reason=f"nothing tells who is asking ({scores.known:.2f}, needs {known:.2f}); {first} would lead with {p1:.2f}"
        )
    if settings.mix_margin > 0 and second and p1 - p2 <= settings.mix_margin and p1 + p2 >= settings.mix_floor:
        mix = shares({first: p1, second: p2}, settings.mix_sharpness)
        return Route("mix", first, p1, mix, f"between {first} ({p1:.2f}) and {second} ({p2:.2f})")
    if p1 >= settings.min_confidence:
        return Route("persona", first, p1, reason=f"{first} with probability {p1:.2f}")
    return Route("fallback", None, p1, reason=f"no persona is likely enough: {first} leads with {p1:.2f}, needs {settings.min_confidence:.2f}")


def shares(probabilities: Mapping[str, float], sharpness: float = 1.0) -> dict[str, float]:
    """What part of an answer each persona has; they sum to 1."""
    powers = {persona: p**sharpness for persona, p in probabilities.items()}
    return {persona: power / sum(powers.values()) for persona, power in powers.items()}


def together(routes: Sequence[Route]) -> Route:
    """The route of a message that holds several requests, in order: a mix of their personas, each with its share; the first one leads."""
    parts: dict[str, float] = {}
    for route in routes:
        parts[str(route.persona)] = parts.get(str(route.persona), 0.0) + 1 / len(routes)
    said = ", then ".join(str(r.persona) for r in routes)
    return Route("mix", routes[0].persona, min(r.confidence for r in routes), parts, f"{len(routes)} requests: {said}")
