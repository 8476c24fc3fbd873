"""The request's way, in one place: scores -> route -> article -> persona model -> answer, and what is written down of it.

Knows nothing of HTTP, Ray or torch: the engines are whatever implements the Engine protocol.
"""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from persona_models.errors import DeskrouteError, InputError, NotReadyError
from persona_models.lineup import Lineup
from persona_models.protocol import BASE, BUILTIN, Engine, GenerateRequest, Message, TokenEvent
from router.article import fill, handover_document
from router.classifier import PersonaClassifier
from router.config import Config
from router.feedback import FeedbackStore
from router.knowledge import KnowledgeBase, Match
from router.policy import Route, decide, together
from router.query import MAX_TURNS, Profile, beginning, query_of, telling_words
from router.schema import ChatRequest, DeskrouteBlock, FeedbackRequest, ReasonBlock, RouteInput, SegmentBlock, SourceBlock, parse_model
from router.segment import Segmenter, requests_in
from router.stream import in_turn
from router.telemetry import Telemetry, log, new_request_id

# Words of a message that the built-in models read; what it is about and who writes is found out from all of it.
READ_WORDS = 60
# Answers of a challenger in the shadow that are made at the same time; beyond that people come first.
SHADOWS_AT_ONCE = 2
DECLINED = (
    "I am the IT service desk and can only help with IT matters: sign-in, devices, programs, networks, access. "
    "If this is about IT, say in a sentence what does not work; people are on {desk_phone}."
)
# To thanks and to complaints behind an answer, for the built-in models, which take some of the one for the other.
SOLVED = "Good to hear. If it comes back, write again, or call {desk_phone}."
UNSOLVED = (
    "That goes beyond what I have written down. Call {desk_phone}, or write a ticket in {desk_portal}: what you tried, what you saw, and since when. "
    "People can look at it with you."
)
# To a greeting, or a cry for help that says nothing of the matter.
VAGUE = "This is the IT service desk. Say in a sentence what does not work, on which device, and what you see there; people are on {desk_phone}."


@dataclass(frozen=True)
class Part:
    """One request of a message: what its model reads, and how much of each persona's adapter (gate) answers."""

    messages: tuple[Message, ...]
    document: str
    gate: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """What will be done with one message; most hold one request, and have one part."""

    request_id: str
    route: Route
    block: DeskrouteBlock
    parts: tuple[Part, ...]
    versions: dict[str, str]
    fixed: str = ""  # the answer, where no model makes it


class Desk:
    """Routes and answers. `engines` by persona id and "base"; personas of one pool share an engine object."""

    def __init__(
        self,
        config: Config,
        classifier: PersonaClassifier,
        knowledge: KnowledgeBase,
        engines: Mapping[str, Engine],
        store: FeedbackStore,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.config = config
        self.personas = tuple(p.id for p in config.catalogue())
        self.engines, self.store = engines, store
        self.telemetry = telemetry or Telemetry()
        self.take_up(classifier, knowledge)
        # The versions to ask for; None leaves them to the engines.
        self.lineup: Lineup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._shadowing = 0

    def take_up(self, classifier: PersonaClassifier, knowledge: KnowledgeBase) -> None:
        """Route by another classifier and other articles from the next request on."""
        self.classifier, self.knowledge = classifier, knowledge
        self.segmenter = Segmenter.from_facts(classifier.segments)
        self.follow_ups, self.matters = classifier.follow_ups, classifier.matters
        self.values = {**knowledge.values, **self.config.desk.values()}

    # -- routing ----------------------------------------------------------------------------------------------------------------------------

    def plan(
        self, messages: Sequence[Message], profile: Profile, model: str | None = None, request_id: str | None = None, user: str | None = None
    ) -> Plan:
        """Decide on a request without answering it. `model` as parse_model gives it."""
        began = time.perf_counter()
        query = query_of(messages, profile)
        scores = self.classifier.score([query])[0]
        if model is None and not telling_words(query.text):
            route = Route("decline", None, 1.0, reason="nothing says what it is about")
        elif model is None:
            route = decide(scores, self.config.policy)
        elif model == BASE:
            route = Route("fallback", None, max(scores.personas.values()), reason="the base was asked for")
        else:
            route = Route("persona", model, scores.personas[model], reason="the persona was asked for")
        several = model is None and route.decision != "decline"
        found = requests_in(self.classifier, self.segmenter, query, self.config.policy) if several else []
        if found:
            route = together([r for _, r in found])
        else:
            matters = self._matters(messages) if several else []
            found = [(text, route) for text in matters] or [(query.text, route)]
        said_last = [_last_user(messages)] if len(found) == 1 else [text for text, _ in found]
        fixed = self._fixed(route, messages, query.text)
        requests = [self._is_request(messages, text) for text in said_last]
        matches = [
            None if fixed else (self.knowledge.best(text) if asks else None) or self.knowledge.best(whole)
            for text, asks, (whole, _) in zip(said_last, requests, found, strict=True)
        ]
        parts = []
        for (_, of), text, match, alone in zip(found, said_last, matches, requests, strict=True):
            gate = self._gate(of, asked=model)
            lead = max(gate, key=lambda p: gate[p]) if gate else None
            document = match.article.render(lead, values=self.values) if match else handover_document(self.values)
            said = self._read(_with_last_user(messages, text), match, alone)
            parts.append(Part(said, document, gate))
        request_id = request_id or new_request_id()
        block = DeskrouteBlock(
            request_id=request_id,
            decision=route.decision,
            persona=route.persona,
            confidence=_round(route.confidence),
            scores={p: _round(s) for p, s in scores.personas.items()},
            in_domain=_round(scores.in_domain),
            mix={p: _round(w) for p, w in route.mix.items()},
            segments=[
                SegmentBlock(text=text, persona=of.persona, confidence=_round(of.confidence)) for (_, of), text in zip(found, said_last, strict=True)
            ],
            reasons=[ReasonBlock(feature=r.feature, persona=r.persona, weight=_round(r.weight)) for r in scores.reasons],
            sources=_sources(matches),
            versions={},
            router_version=self.classifier.version,
        )
        versions = {}
        if self.lineup:
            # Somebody who does not say who they are keeps their version for as long as their conversation begins with the same words.
            whose = user or next(m.content for m in messages if m.role == "user")
            versions = {p: self.lineup.version_for(p, whose) for part in parts for p in part.gate}
        self.telemetry.route_s.observe(time.perf_counter() - began)
        return Plan(request_id, route, block, tuple(parts), versions, fixed)

    def _fixed(self, route: Route, messages: Sequence[Message], text: str) -> str:
        """The answer to what no model answers; empty where one does. `text`: what the route is of."""
        if route.decision == "decline":
            return fill(DECLINED if telling_words(text) else VAGUE, self.values)
        if self.config.base != BUILTIN or self.follow_ups is None or not _answered(messages):
            return ""
        last = _last_user(messages)
        said = SOLVED if self.follow_ups.says_thanks(last) else UNSOLVED if self.follow_ups.says_still(last) else ""
        return fill(said, self.values)

    def _matters(self, messages: Sequence[Message]) -> list[str]:
        """The matters of a last turn that is of one sender; none where it holds one, or goes on about an answer."""
        last = _last_user(messages)
        if self.matters is None or self.segmenter is None or (_answered(messages) and not self._is_request(messages, last)):
            return []
        return self.matters.split(self.knowledge, self.segmenter, last)

    def _is_request(self, messages: Sequence[Message], text: str) -> bool:
        """Whether a last message, or a part of it, asks for something by itself, rather than go on about the answer before it."""
        return bool(_answered(messages)) and self.follow_ups is not None and not self.follow_ups.goes_on(text)

    def _read(self, messages: tuple[Message, ...], match: Match | None, request: bool) -> tuple[Message, ...]:
        """What its model reads of a conversation. The built-in ones know a request alone, and a request, its answer and what is said behind that.

        Of a long message they read the beginning: they take the answer from the article, and lose their place in it behind many words.
        """
        if self.config.base != BUILTIN:
            return messages

        def shown(*at: int) -> tuple[Message, ...]:
            return tuple(replace(m, content=beginning(m.content, READ_WORDS)) if m.role == "user" else m for m in (messages[i] for i in at))

        answered, last = _answered(messages), _last_user_at(messages)
        if not answered:
            return shown(*range(len(messages)))
        if request:
            return shown(last)

        def is_of_it(i: int) -> bool:
            found = self.knowledge.best(messages[i].content)
            return found is not None and match is not None and found.article.id == match.article.id

        at = next((i for i in reversed(answered) if is_of_it(i)), answered[0])
        return shown(at, at + 1, last)

    def plan_input(self, item: RouteInput) -> DeskrouteBlock:
        """The block for one input of a batch."""
        return self.plan(item.turns(), Profile.from_metadata(item.profile)).block

    def _gate(self, route: Route, asked: str | None) -> dict[str, float]:
        """Persona -> weight of its adapter. A mixture needs one engine that holds all its personas; otherwise the leading one answers alone."""
        if route.decision == "mix":
            if len({id(self.engines.get(p)) for p in route.mix}) == 1:
                return dict(route.mix)
            return {max(route.mix, key=lambda p: route.mix[p]): 1.0}
        if route.persona:
            return {route.persona: 1.0}
        if asked is None and route.decision == "fallback" and self.config.fallback_model != BASE:
            return {self.config.fallback_model: 1.0}
        return {}

    # -- answering --------------------------------------------------------------------------------------------------------------------------

    async def begin(self, request: ChatRequest) -> Plan:
        """Parse and route a chat request. Raises UnknownModelError, InputError."""
        profile = Profile.from_metadata(request.metadata)
        return self.plan(request.turns(), profile, parse_model(request.model, self.personas), user=request.user)

    async def answer(self, request: ChatRequest, plan: Plan) -> AsyncGenerator[TokenEvent]:
        """The events of an answer; the finished text waits in memory for a rating."""
        began = time.perf_counter()
        label = plan.route.persona or plan.route.decision
        events = self._said(plan.fixed) if plan.fixed else self._generated(request, plan)
        said: list[str] = []
        last: TokenEvent | None = None
        self.telemetry.active.inc()
        try:
            async for event in events:
                if not said:
                    await self._record(request, plan, event)
                    self.telemetry.first_token_s.labels(label).observe(time.perf_counter() - began)
                said.append(event.text)
                last = event
                yield event
                if event.finish_reason:
                    self.telemetry.tokens.labels(label).inc(event.completion_tokens)
                    self.telemetry.answer_s.labels(label).observe(time.perf_counter() - began)
                    self.store.remember(plan.request_id, request.turns(), "".join(said))
                    self._shadow(request, plan, "".join(said))
        finally:
            self.telemetry.active.dec()
            if last:
                self._keep(asyncio.to_thread(self._record_end, plan.request_id, last, time.perf_counter() - began))
            await events.aclose()

    async def _record(self, request: ChatRequest, plan: Plan, event: TokenEvent) -> None:
        """Write the route down before its first token is sent. A store that fails must not take answering down with it."""
        block = plan.block.model_copy(update={"versions": dict(event.versions)})
        try:
            await asyncio.to_thread(self.store.add_route, block, user=request.user, profile=_known(request.metadata))
        except SQLAlchemyError as e:
            log.error("request %s is not recorded: %s", plan.request_id, type(e).__name__)

    def _record_end(self, request_id: str, last: TokenEvent, seconds: float) -> None:
        for persona, version in last.versions.items():
            self.telemetry.answers.labels(persona, version, last.finish_reason or "broken off").inc()
        try:
            self.store.add_answer(request_id, finish_reason=last.finish_reason, tokens=last.completion_tokens, seconds=seconds)
        except SQLAlchemyError as e:
            log.error("the end of request %s is not recorded: %s", request_id, type(e).__name__)

    def _shadow(self, request: ChatRequest, plan: Plan, said: str) -> None:
        """Have a challenger in the shadow answer as well, after the person has got their answer and while few others wait."""
        trials = self.lineup.trials if self.lineup else {}
        persona = plan.route.persona
        trial = trials.get(persona or "")
        if persona and trial and trial.shadow and not plan.fixed and [list(part.gate) for part in plan.parts] == [[persona]]:
            if self._shadowing >= SHADOWS_AT_ONCE:
                self.telemetry.shadows_skipped.inc()
                return
            self._keep(self._answer_in_the_shadow(request, plan, persona, trial.pinned.version, said))

    async def _answer_in_the_shadow(self, request: ChatRequest, plan: Plan, persona: str, version: str, said: str) -> None:
        began = time.perf_counter()
        text, last = "", None
        self._shadowing += 1
        try:
            async for last in self._generated(request, replace(plan, versions={persona: version})):
                text += last.text
            if last is None or last.versions.get(persona) != version:
                return
            facts: dict[str, Any] = {
                "champion": plan.versions[persona],
                "challenger": version,
                "finish_reason": last.finish_reason,
                "tokens": last.completion_tokens,
            }
            facts |= {"seconds": time.perf_counter() - began, "likeness": difflib.SequenceMatcher(None, said.split(), text.split()).ratio()}
            await asyncio.to_thread(self.store.add_shadow, plan.request_id, persona, texts=(said, text), **facts)
        except (DeskrouteError, SQLAlchemyError) as e:
            log.warning("request %s has no shadow answer: %s", plan.request_id, type(e).__name__)
        finally:
            self._shadowing -= 1

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the answers; the loop itself keeps only weak references to its tasks."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _generated(self, request: ChatRequest, plan: Plan) -> AsyncGenerator[TokenEvent]:
        """The events of the answer; several requests are answered at the same time, and read one after the other."""
        answers = [self._part(request, plan, part, n) for n, part in enumerate(plan.parts)]
        return answers[0] if len(answers) == 1 else in_turn(answers)

    async def _part(self, request: ChatRequest, plan: Plan, part: Part, n: int) -> AsyncGenerator[TokenEvent]:
        defaults = self.config.generation
        lead = max(part.gate, key=lambda p: part.gate[p]) if part.gate else BASE
        most = request.max_completion_tokens or request.max_tokens
        generate = GenerateRequest(
            request_id=f"{plan.request_id}/{n}" if n else plan.request_id,
            messages=part.messages,
            gate=part.gate,
            document=part.document,
            max_tokens=max(1, most // len(plan.parts)) if most else defaults.max_tokens,
            temperature=defaults.temperature if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=request.stop,
            top_k=max(0, request.top_k or 0),
            min_tokens=request.min_tokens or 0,
            logit_bias=request.logit_bias or {},
            no_repeat=self.config.no_repeat,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            versions=plan.versions,
            lineup_ms=self.lineup.read_ms if self.lineup else 0,
        )
        if lead not in self.engines:
            raise NotReadyError(f"no pool serves {lead!r} yet; try again shortly")
        async for event in self.engines[lead].generate(generate):
            yield event

    async def _said(self, text: str) -> AsyncGenerator[TokenEvent]:
        yield TokenEvent(text, 0, 0, "stop")

    # -- feedback -----------------------------------------------------------------------------------------------------------------------------

    async def rate(self, body: FeedbackRequest) -> bool:
        """Store a rating; returns whether its text could be stored with it."""
        if body.correct_persona is not None and body.correct_persona not in self.personas:
            raise InputError(f"correct_persona: {body.correct_persona!r} is none of {', '.join(self.personas)}", param="correct_persona")
        fields = body.model_dump(exclude={"request_id", "rating"})
        stored = await asyncio.to_thread(self.store.rate, body.request_id, body.rating, **fields)
        self.telemetry.ratings.labels(body.rating).inc()
        return stored


def _last_user_at(messages: Sequence[Message]) -> int:
    return max(i for i, m in enumerate(messages) if m.role == "user")


def _last_user(messages: Sequence[Message]) -> str:
    return messages[_last_user_at(messages)].content


def _with_last_user(messages: Sequence[Message], text: str) -> tuple[Message, ...]:
    """The conversation as if its last user turn were `text`."""
    last = _last_user_at(messages)
    return tuple(Message("user", text) if i == last else m for i, m in enumerate(messages))


def _answered(messages: Sequence[Message]) -> list[int]:
    """Where the user turns stand that an answer follows, before the last user turn; the last ones of many."""
    return [i for i in range(_last_user_at(messages) - 1) if messages[i].role == "user" and messages[i + 1].role == "assistant"][-MAX_TURNS:]


def _sources(matches: Sequence[Match | None]) -> list[SourceBlock]:
    """The articles used, each once."""
    used = {m.article.id: SourceBlock(id=m.article.id, title=m.article.title, score=_round(m.score)) for m in matches if m}
    return list(used.values())


def _known(metadata: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in metadata.items() if k in Profile.__dataclass_fields__}


def _round(value: float) -> float:
    return round(float(value), 4)
