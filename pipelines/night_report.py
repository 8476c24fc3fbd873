"""What a night came to, as Markdown for people and JSON for programs: written, and posted where somebody reads it. Knows nothing of models."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import httpx

# done; unchanged: skipped, since it would be made from the same; waiting: for somebody or for more data; stopped: by a gate; failed: by a fault
State = Literal["done", "unchanged", "waiting", "stopped", "failed"]
WORST_FIRST: tuple[State, ...] = ("failed", "stopped", "waiting", "done", "unchanged")
SEND_TIMEOUT_S = 20.0


@dataclass
class Stage:
    name: str
    state: State = "done"
    said: str = ""
    seconds: float = 0.0


@dataclass
class Way:
    """One model's way through the night, or that of the tickets."""

    name: str
    stages: list[Stage] = field(default_factory=list)
    version: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    at: str = ""  # the stage that is going on

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """A stage; it counts once its block has ended."""
        self.at, made, began = name, Stage(name), time.monotonic()
        yield made
        made.seconds = time.monotonic() - began
        self.stages.append(made)
        self.at = ""

    def add(self, name: str, state: State, said: str) -> None:
        self.stages.append(Stage(name, state, said))

    @property
    def state(self) -> State:
        """The first of WORST_FIRST among the stages."""
        return min((s.state for s in self.stages), key=WORST_FIRST.index, default="unchanged")

    @property
    def said(self) -> str:
        """What to tell of it: the worst stage, or the last one."""
        telling = [s for s in self.stages if s.state == self.state]
        return f"{telling[-1].state}: {telling[-1].said}" if telling and telling[-1].said else self.state


@dataclass
class Report:
    began: datetime
    ways: list[Way] = field(default_factory=list)
    seconds: float = 0.0
    link: str = ""
    unsent: str = ""
    _started: float = field(default_factory=time.monotonic, repr=False)

    def way(self, name: str) -> Way:
        """A new way, in the order in which they are walked."""
        self.ways.append(Way(name))
        return self.ways[-1]

    def finish(self) -> None:
        self.seconds = time.monotonic() - self._started

    @property
    def ok(self) -> bool:
        """Whether no way failed or was stopped by a gate, and the report was sent."""
        return not self.unsent and not any(w.state in ("failed", "stopped") for w in self.ways)

    @property
    def summary(self) -> str:
        """`2 done, 1 stopped, 3 unchanged`."""
        counts = {state: sum(w.state == state for w in self.ways) for state in ("failed", "stopped", "done", "waiting", "unchanged")}
        text = ", ".join(f"{n} {state}" for state, n in counts.items() if n) or "nothing to do"
        return text + (f"; {self.unsent}" if self.unsent else "")

    def markdown(self) -> str:
        lines = [f"# Deskroute, {self.began:%Y-%m-%d %H:%M}: {self.summary}", ""]
        lines += ["| | version | held-out loss | against the champion (95 %) | |", "| --- | --- | --- | --- | --- |"]
        for way in self.ways:
            figure, delta = _figures(way.metrics)
            lines.append(f"| {way.name} | {way.version} | {figure} | {delta} | {way.said.replace('|', '/')} |")
        spent = [f"{way.name} {s.name} {s.seconds:.0f} s" for way in self.ways for s in way.stages if s.seconds >= 1]
        lines += ["", f"After {self.seconds:.0f} s" + (f" ({', '.join(spent)})." if spent else ".")]
        if self.link:
            lines += ["", f"[Every run in MLflow]({self.link})"]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        ways = [{k: v for k, v in asdict(w).items() if k != "at"} | {"state": w.state} for w in self.ways]
        return {
            "began": self.began.isoformat(),
            "seconds": round(self.seconds, 1),
            "ok": self.ok,
            "summary": self.summary,
            "models": ways,
            "link": self.link,
        }

    def write(self, folder: Path) -> None:
        """nightly-<date>-<time>.md and .json, and the same as nightly.md and nightly.json: the latest."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (f"nightly-{self.began:%Y-%m-%d-%H%M%S}", "nightly"):
            for suffix, text in ((".md", self.markdown()), (".json", json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n")):
                partial = folder / f"{name}{suffix}.partial"
                partial.write_text(text, encoding="utf-8")
                partial.replace(folder / f"{name}{suffix}")

    def send(self, url: str) -> None:
        """Post {"text": the Markdown, "report": the JSON}, which Slack, Mattermost and most hooks take. A report that cannot be sent says so itself."""
        try:
            httpx.post(url, json={"text": self.markdown(), "report": self.as_json()}, timeout=SEND_TIMEOUT_S).raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            # The address may carry a secret.
            said = f"HTTP {e.response.status_code}" if isinstance(e, httpx.HTTPStatusError) else type(e).__name__
            self.unsent = f"the report could not be posted ({said})"


def _figures(metrics: Mapping[str, float]) -> tuple[str, str]:
    """A model's figure, and its difference to the champion."""
    if "eval/loss" not in metrics:
        accuracy = metrics.get("eval/accuracy_text")
        return (f"persona right {accuracy:.3f}" if accuracy is not None else ""), ""
    if "eval/champion_loss" not in metrics:
        return f"{metrics['eval/loss']:.4f}", ""
    return f"{metrics['eval/loss']:.4f}", f"{metrics['eval/delta']:+.4f} ({metrics['eval/delta_low']:+.4f} to {metrics['eval/delta_high']:+.4f})"
