"""Figures for the runs: results people would rather see than read. matplotlib without a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def _figure(width: float, height: float) -> Any:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def matrix(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str) -> Figure:
    """Persona matrix, values (rows, columns): losses; each row is coloured against its own base (first column), its best cell framed."""
    figure = _figure(1.6 + 1.35 * len(columns), 1.4 + 0.62 * len(rows))
    axes = figure.subplots()
    relative = 100 * (values / values[:, :1] - 1)
    limit = max(1.0, float(np.abs(relative).max()))
    image = axes.imshow(relative, cmap="RdYlGn_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("model")
    axes.set_ylabel("answers of")
    for i in range(len(rows)):
        best = int(values[i].argmin())
        for j in range(len(columns)):
            weight = "bold" if j == best else "normal"
            axes.text(j, i, f"{values[i, j]:.3f}\n{relative[i, j]:+.0f} %", ha="center", va="center", fontsize=8.5, fontweight=weight)
        axes.add_patch(_frame(best, i))
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label="loss against the base, %")
    return figure


def losses(train: Sequence[float], title: str, colour: str, validation: float | None = None) -> Figure:
    """Training loss by step with a running mean, and the held-out loss as a line."""
    figure = _figure(7, 3.6)
    axes = figure.subplots()
    axes.plot(train, color=colour, alpha=0.25, linewidth=0.8, label="batch")
    window = min(20, max(1, len(train) // 5))
    if len(train) >= window > 1:
        smooth = np.convolve(train, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(len(smooth)) + window - 1, smooth, color=colour, linewidth=1.8, label=f"mean of {window}")
    if validation is not None:
        axes.axhline(validation, color="black", linestyle="--", linewidth=1, label=f"held out {validation:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def sweep(columns: Mapping[str, Sequence[Any]], values: Sequence[float], title: str, colour: str) -> Figure:
    """Loss by setting, one panel a setting: every combination as a point, the best of each value joined by a line, the best of all ringed."""
    figure = _figure(1.2 + 3.4 * len(columns), 3.6)
    panels = np.atleast_1d(figure.subplots(1, len(columns), sharey=True))
    first = min(range(len(values)), key=lambda i: values[i])
    for axes, (name, column) in zip(panels, columns.items(), strict=True):
        ticks = list(dict.fromkeys(column))
        at = [ticks.index(v) for v in column]
        axes.scatter(at, values, color=colour, alpha=0.45, s=26)
        axes.plot(
            range(len(ticks)), [min(v for i, v in zip(at, values, strict=True) if i == t) for t in range(len(ticks))], color=colour, linewidth=1.6
        )
        axes.scatter([at[first]], [values[first]], s=120, facecolors="none", edgecolors="black", linewidths=1.4)
        axes.set_xticks(range(len(ticks)), [f"{t:g}" if isinstance(t, float) else str(t) for t in ticks])
        axes.margins(x=0.15)
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss on watched answers, nats per token")
    figure.suptitle(title)
    return figure


def confusion(counts: np.ndarray, labels: Sequence[str], title: str) -> Figure:
    """Confusion matrix, counts (true, predicted), shown as shares of the row."""
    figure = _figure(1.8 + 1.1 * len(labels), 1.6 + 0.7 * len(labels))
    axes = figure.subplots()
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(labels)):
        for j in range(len(labels)):
            axes.text(
                j,
                i,
                f"{100 * shares[i, j]:.0f} %\n{int(counts[i, j])}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if shares[i, j] > 0.6 else "black",
            )
    axes.set_xticks(range(len(labels)), labels, rotation=20, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title)
    return figure


def reliability(confidence: Sequence[float], accuracy: Sequence[float], counts: Sequence[int], title: str) -> Figure:
    """Calibration: mean confidence against accuracy by bin; a point's area is its number of prompts."""
    figure = _figure(4.4, 4.2)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    shown = [i for i, n in enumerate(counts) if n]
    most = max((counts[i] for i in shown), default=1)
    axes.scatter(
        [confidence[i] for i in shown], [accuracy[i] for i in shown], s=[30 + 220 * counts[i] / most for i in shown], color="#2166ac", alpha=0.7
    )
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="mean confidence", ylabel="accuracy", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def coverage(points: Sequence[tuple[float, float]], title: str) -> Figure:
    """Accuracy of the surest share of decisions, by that share."""
    figure = _figure(5.2, 3.8)
    axes = figure.subplots()
    axes.plot([100 * share for share, _ in points], [100 * accuracy for _, accuracy in points], color="#2166ac", linewidth=1.8)
    axes.axvline(80, color="grey", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 101), xlabel="share decided, surest first, %", ylabel="of these right, %", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def routers(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Routers by name: the share of personas right, and among those that were decided; beside it the median time of a prompt."""
    figure = _figure(9.6, 1.2 + 0.5 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    at = np.arange(len(rows))[::-1]
    ours = [str(r["router"]).startswith("deskroute") for r in rows]
    colours = ["#2166ac" if o else "#999999" for o in ours]
    left.barh(at, [100 * r["of the decided"] for r in rows], color=colours, alpha=0.3, height=0.62, label="of the decided")
    left.barh(at, [100 * r["accuracy"] for r in rows], color=colours, height=0.38, label="of all")
    for y, row in zip(at, rows, strict=True):
        left.text(100 * row["of the decided"] + 1, y, f"{100 * row['accuracy']:.0f} %", va="center", fontsize=9)
    left.set_yticks(at, [str(r["router"]) for r in rows])
    left.set(xlim=(0, 105), xlabel="personas right, % (pale: of those decided)")
    right.barh(at, [max(r["p50 ms"], 0.001) for r in rows], color=colours, height=0.38)
    right.set(xscale="log", xlabel="ms a prompt, median")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def mixture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """By how far the leading persona is ahead: what a mixture of the two leading ones changes in loss, and what the right persona would."""
    figure = _figure(7.2, 4.0)
    axes = figure.subplots()
    at = np.arange(len(rows))
    change = np.array([r["change"] for r in rows])
    reach = np.array([[r["change"] - r["from"], r["to"] - r["change"]] for r in rows]).T
    axes.axhline(0, color="black", linewidth=0.8)
    axes.bar(at - 0.2, change, width=0.38, color="#2166ac", yerr=reach, capsize=3, label="mixture of the two leading")
    axes.bar(at + 0.2, [r["right one"] - r["leading alone"] for r in rows], width=0.38, color="#bbbbbb", label="the right persona")
    axes.set_xticks(at, [f"{r['margin']}\n{r['requests']} requests\n{100 * r['leading is right']:.0f} % right" for r in rows], fontsize=8)
    axes.set(xlabel="lead of the likeliest persona", ylabel="loss against the leading persona alone\nnats a token, lower is better")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def throughput(rates: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Figure:
    """Tokens a second, base -> way -> concurrent requests -> rate: one panel a base, one line a way, of one colour in all panels; our own ways are the
    thick ones, dotted where they are bare."""
    figure = _figure(3.2 + 5.6 * len(rates), 5.0)
    every = list(dict.fromkeys(way for ways in rates.values() for way in ways))
    ours = [way for way in every if way.startswith("engine")]
    kinds = {way: [w for w in every if (w in ours) == (way in ours)] for way in every}
    for axes, (base, ways) in zip(np.atleast_1d(figure.subplots(1, len(rates))), rates.items(), strict=True):
        for way, by_load in ways.items():
            loads = sorted(by_load)
            axes.plot(
                loads,
                [by_load[n] for n in loads],
                marker="o" if way in ours else "s",
                markersize=4,
                linewidth=2.2 if way in ours else 1.2,
                linestyle="--" if way not in ours else ":" if way.endswith("bare") else "-",
                color=f"C{kinds[way].index(way) % 10}",
                label=way,
            )
        axes.set(xscale="log", yscale="log", xlabel="concurrent requests", ylabel="tokens a second, all requests together", title=base)
        ticks = sorted({n for by_load in ways.values() for n in by_load})
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend([lines[way] for way in every], every, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _frame(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2)
