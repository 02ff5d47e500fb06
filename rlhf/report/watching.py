"""What `rlhf watch` shows of a run: how far it is, its figures as small curves, its last responses, findings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf.report.rollouts import KeptResponses, NoRolloutsError, Order
from rlhf.report.run_record import RunRecord, StageRecord

BARS = "▁▂▃▄▅▆▇█"
COLUMNS = 32
"""Of a small curve."""
RECENT = 20
"""Lines of metrics by which the remaining time is told."""
STYLES = {"finished": "green", "running": "cyan", "waiting": "cyan", "incomplete": "red"}


def watched(run: RunRecord) -> Group:
    """The run as it is now."""
    stages = Table(box=None, pad_edge=False)
    for title in ("stage", "state", "", "done", "left"):
        stages.add_column(title, no_wrap=title != "state")
    for record in run.stages:
        done, planned = progress(record)
        bar = ProgressBar(total=planned or 1, completed=min(done, planned or 0), width=24)
        left = remaining_seconds(record) if record.diagnosis.kind == "running" else None
        stages.add_row(
            record.stage.label,
            Text(record.diagnosis.kind, STYLES.get(record.diagnosis.kind, "")),
            bar,
            f"{done} of {planned}" if planned else str(done),
            "" if left is None else duration(left),
        )
    parts: list[Any] = [Text(f"run {run.directory}", "bold"), stages]
    current = next((each for each in reversed(run.stages) if each.metrics), None)
    if current is not None:
        parts += [Text(), Text(f"{current.stage.label}, {current.diagnosis.state}", "bold"), _figures(current)]
        parts += _responses(current)
    findings = [(record, found) for record in run.stages for found in record.diagnosis.findings]
    for record, found in findings:
        style = "red" if found.severity == "critical" else "yellow"
        title = f"{record.stage.label}, since {record.stage.unit} {found.since}: {found.title}"
        parts.append(Panel(Text(found.message), title=Text(title), title_align="left", border_style=style))
    if not findings:
        parts += [Text(), Text("doctor: nothing found so far", "dim")]
    return Group(*parts)


def progress(record: StageRecord) -> tuple[int, int | None]:
    """Steps that are done, and how many there are to be, where that is known."""
    done = int(max((line["step"] for line in record.metrics), default=0))
    planned = record.plan.get("planned")
    return done, planned if isinstance(planned, int) and planned > 0 else None


def remaining_seconds(record: StageRecord) -> float | None:
    """By the seconds of the last lines; None where nothing tells."""
    done, planned = progress(record)
    recent = [line for line in record.metrics if isinstance(line.get("seconds"), int | float)][-RECENT:]
    if planned is None or len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return None
    pace = (recent[-1]["seconds"] - recent[0]["seconds"]) / (recent[-1]["step"] - recent[0]["step"])
    return max(0.0, pace * (planned - done))


def sparkline(values: Sequence[float], columns: int = COLUMNS) -> str:
    """The values as bars, the means of as many neighbours as fill `columns`; all alike are in the middle."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    together = -(-len(values) // columns)
    parts = [values[start : start + together] for start in range(0, len(values), together)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    if high == low:
        return BARS[len(BARS) // 2] * len(means)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1))] for value in means)


def duration(seconds: float) -> str:
    """Seconds for reading: 01:02:03, without hours where there are none."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def _figures(record: StageRecord) -> Table:
    table = Table(box=None, pad_edge=False)
    for title, justify in (("", "left"), ("first", "right"), ("last", "right"), ("", "left")):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    names = dict.fromkeys([*record.stage.curves, *record.stage.logged])
    for name in names:
        values = _values(record.metrics, name)
        if values:
            table.add_row(name, f"{values[0]:.4g}", f"{values[-1]:.4g}", Text(sparkline(values), "cyan"))
    return table


def _values(metrics: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    found = [line[name] for line in metrics if isinstance(line.get(name), int | float)]
    return [float(value) for value in found if math.isfinite(value)]


def _responses(record: StageRecord) -> list[Any]:
    """The best and the worst response of the last rollout."""
    try:
        kept = KeptResponses.read(record.directory)
    except NoRolloutsError:
        return []
    last = kept.lines[-1]["iteration"]
    parts: list[Any] = [Text()]
    orders: tuple[Order, Order] = ("best", "worst")
    for order in orders:
        (line,) = kept.chosen(iteration=last, order=order, count=1)
        prompt = " ".join(str(line["prompt"]).split())[-200:]
        text = Text.assemble((f"{prompt}\n", "dim"), " ".join(str(line["response"]).split())[:400])
        title = Text(f"iteration {last}, {order}: {line['score']:+.2f}")
        parts.append(Panel(text, title=title, title_align="left", border_style="dim"))
    return parts
