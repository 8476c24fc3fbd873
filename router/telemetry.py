"""Request ids, Prometheus metrics and logs. No prompt text ever goes through here."""

from __future__ import annotations

import logging
import uuid

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
log = logging.getLogger("deskroute")


def new_request_id() -> str:
    return uuid.uuid4().hex


class Telemetry:
    """The metrics of one front door, in a registry of its own so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "deskroute_requests",
            "Requests by endpoint, decision, persona and HTTP status",
            ["endpoint", "decision", "persona", "status"],
            registry=self.registry,
        )
        fine = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25)
        self.route_s = Histogram("deskroute_route_seconds", "Scoring, retrieval and policy of one request", registry=self.registry, buckets=fine)
        self.first_token_s = Histogram("deskroute_first_token_seconds", "From request to first token", ["persona"], registry=self.registry)
        self.answer_s = Histogram("deskroute_answer_seconds", "From request to last token", ["persona"], registry=self.registry)
        self.tokens = Counter("deskroute_completion_tokens", "Generated tokens", ["persona"], registry=self.registry)
        self.answers = Counter(
            "deskroute_answers", "Answers by persona, version and how they ended", ["persona", "version", "end"], registry=self.registry
        )
        self.shadows_skipped = Counter("deskroute_shadows_skipped", "Shadow answers not made because too many were under way", registry=self.registry)
        self.ratings = Counter("deskroute_ratings", "Ratings by persona", ["rating"], registry=self.registry)
        self.active = Gauge("deskroute_active_requests", "Answers in the making", registry=self.registry)

    def page(self) -> bytes:
        return generate_latest(self.registry)
