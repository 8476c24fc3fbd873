"""What a registered version says about itself on MLflow's page: verdict, figures beside what was in force, what it was made from, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from persona_models.registry import CHAMPION
from pipelines.judge import BASE

# Metric -> what it is, for people.
MEANING = {
    "eval/loss": "nats per token of held-out answers",
    "eval/chrf": "likeness to the reference answers (chrF, 0 to 100)",
    "eval/ends": "share of answers that end by themselves",
    "eval/carried": "of the numbers, menu paths and names that article and reference share, how many the answer has",
    "eval/grounded": "of those that the answer states, how many article, prompt or reference have",
    "eval/tokens": "tokens of an answer",
}


def card(verdict: str, metrics: Mapping[str, float], rivals: Mapping[str, Mapping[str, float]], facts: Mapping[str, Any]) -> str:
    """Markdown. rivals: the same metrics of the champion then and of the base; facts: settings and data, a line each."""
    others = {"champion then": rivals.get(CHAMPION, {}), "base": rivals.get(BASE, {})}
    shown = {title: values for title, values in others.items() if values}
    lines = [verdict, "", f"| | this version | {' | '.join([*shown, ''])}what it is |", "| --- |" + " --- |" * (2 + len(shown))]
    for name, what in MEANING.items():
        if name in metrics:
            cells = [f"{metrics[name]:.4g}", *(f"{v[name]:.4g}" if name in v else "" for v in shown.values())]
            lines.append(f"| {name.removeprefix('eval/')} | {' | '.join(cells)} | {what} |")
    lines += ["", *(f"- {name}: {value}" for name, value in facts.items())]
    lines += [
        "",
        "`deskroute promote` and `rollback` decide what is served. The folder is plain LoRA: `peft.PeftModel.from_pretrained(base, folder)`.",
    ]
    return "\n".join(lines)


def shade(colour: str, version: int) -> str:
    """A persona's colour (#rrggbb), lighter or darker by version, so that a chart tells neighbours apart."""
    share = (0.0, 0.45, -0.35, 0.25, -0.55)[(version - 1) % 5]
    target = 255 if share > 0 else 0
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + abs(share) * (target - c)):02x}" for c in channels)
