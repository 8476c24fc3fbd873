"""The evaluation files about routing -> figures, each request sent the way the desk sends it. Knows nothing of training, answers or MLflow.

There are two rounds: `routing`, `profiles` and `declined` were looked at while the router was improved; the others are of later writers, of whom only
figures were looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from persona_models.protocol import Message
from pipelines.router_report import CHANGES, expected_calibration_error
from router.desk import Desk
from router.query import Profile
from router.schema import DeskrouteBlock

Row = Mapping[str, Any]


def routing_figures(desk: Desk, read: Callable[[str], Sequence[Row]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures by name, shares in 0..1, and the misses. read: an evaluation file's rows by its name."""
    figures, misses = _first_round(desk, read)
    telling = read("telling")
    blocks = [_block(desk, row) for row in telling]
    right = np.array([_leading(b) == r["persona"] for b, r in zip(blocks, telling, strict=True)])
    sure = np.array([max(b.scores.values()) for b in blocks])
    decoys = np.array([r["kind"] == "decoy" for r in telling])
    surest = np.argsort(-sure, kind="stable")[: int(0.8 * len(sure))]
    figures |= {
        "personas_right": share(right),
        "personas_right_decoys": share(right[decoys]),
        "personas_right_others": share(right[~decoys]),
        "personas_right_at_80": share(right[surest]),
        "personas_calibration_error": expected_calibration_error(sure, right),
        "personas_fall_back": share(b.decision == "fallback" for b in blocks),
        "personas_split": share(len(b.segments) > 1 for b in blocks),
    }
    for name, change in CHANGES.items():
        changed = [_leading(_block(desk, {**row, "text": change(row["text"])})) for row in telling]
        figures[f"unchanged_{name}"] = share(a == _leading(b) for a, b in zip(changed, blocks, strict=True))
    misses += _missed("telling", blocks, telling)
    deciding = read("profile_decides")
    found = [_leading(_block(desk, row)) for row in deciding]
    figures["profile_decides_right"] = share(f == r["persona"] for f, r in zip(found, deciding, strict=True))
    neutral = [_block(desk, row) for row in read("neutral")]
    figures["neutral_left_open"] = share(b.decision in ("fallback", "mix") for b in neutral)
    strangers = [_block(desk, row) for row in read("strangers")]
    inside, outside = [b.in_domain for b in (*blocks, *neutral)], [b.in_domain for b in strangers]
    for name in ("short_retrieval", "short_uncovered", "short_strangers"):
        figures[f"{name}_declined"] = share(_block(desk, row).decision == "decline" for row in read(name))
    figures |= {
        "strangers_declined": share(b.decision == "decline" for b in strangers),
        "near_misses_declined": share(b.decision == "decline" for b, r in zip(strangers, read("strangers"), strict=True) if r["kind"] == "near_miss"),
        "requests_declined_unseen": share(b.decision == "decline" for b in (*blocks, *neutral)),
        "in_domain_auroc": float(roc_auc_score([1] * len(inside) + [0] * len(outside), inside + outside)),
    }
    messages = read("two_requests")
    said = [[s.persona for s in _block(desk, row).segments] for row in messages]
    both = [[p["persona"] for p in row["parts"]] for row in messages]
    figures |= {
        "two_requests_found": share(s == w for s, w in zip(said, both, strict=True) if len(w) == 2),
        "single_requests_split": share(len(s) > 1 for s, w in zip(said, both, strict=True) if len(w) == 1),
    }
    messages = read("two_matters")
    blocks = [_block(desk, row) for row in messages]
    figures |= {
        "two_matters_found": share([s.id for s in b.sources] == r["topics"] for b, r in zip(blocks, messages, strict=True) if len(r["topics"]) == 2),
        "one_matter_split": share(len(b.segments) > 1 for b, r in zip(blocks, messages, strict=True) if len(r["topics"]) == 1),
    }
    talks = read("conversations")
    led = [_leading(desk.plan([Message(m["role"], m["content"]) for m in row["messages"]], Profile()).block) for row in talks]
    for kind in ("", "follow_up", "changed"):
        of = [(a, r) for a, r in zip(led, talks, strict=True) if kind in ("", r["kind"])]
        figures[f"conversations_right{'_' * bool(kind)}{kind}"] = share(a == r["persona"] for a, r in of)
    return figures, misses


def _first_round(desk: Desk, read: Callable[[str], Sequence[Row]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    figures: dict[str, float] = {}
    misses: list[dict[str, Any]] = []
    for name in ("routing", "profiles"):
        rows = read(name)
        blocks = [_block(desk, row) for row in rows]
        decided = [(b.persona, r["persona"]) for b, r in zip(blocks, rows, strict=True) if b.decision == "persona"]
        figures |= {
            f"{name}_accuracy": share(_leading(b) == r["persona"] for b, r in zip(blocks, rows, strict=True)),
            f"{name}_decided": len(decided) / max(1, len(rows)),
            f"{name}_decided_accuracy": share(a == b for a, b in decided),
        }
        misses += _missed(name, blocks, rows)
        if name == "routing":
            figures["requests_declined"] = share(b.decision == "decline" for b in blocks)
    figures["others_declined"] = share(_block(desk, row).decision == "decline" for row in read("declined"))
    return figures, misses


def _missed(kind: str, blocks: Sequence[DeskrouteBlock], rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "text": r["text"], "want": r["persona"], "got": _leading(b)}
        for b, r in zip(blocks, rows, strict=True)
        if _leading(b) != r["persona"]
    ]


def _block(desk: Desk, row: Row) -> DeskrouteBlock:
    return desk.plan([Message("user", row["text"])], Profile.from_metadata(row.get("profile") or {})).block


def _leading(block: DeskrouteBlock) -> str:
    return max(block.scores, key=lambda p: block.scores[p])


def share(hits: Iterable[Any]) -> float:
    """Of what is true or not, how much is true, 0..1; 0 of nothing."""
    found = [bool(h) for h in hits]
    return sum(found) / max(1, len(found))
