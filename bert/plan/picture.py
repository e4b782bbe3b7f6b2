"""The picture of a plan for IPUs: the pipeline over time, IPU by IPU, and the memory of each."""

from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bert.plan.ipu_plan import IPU_BYTES, MIB, IpuPlan
from bert.text import percent

__all__ = ["Visit", "draw_plan", "visits_of"]

COLOURS = {"forward": "#4878a8", "recompute": "#b9c7d6", "backward": "#d98442"}
HEAD_COLOURS = {"forward": "#3f8f6b", "backward": "#a3b84c"}  # the last stage, beside the first on IPU 0
MEMORY_COLOURS = ("#3c4f6b", "#6f87a6", "#a9b9cc", "#3f8f6b", "#a5cdb9", "#e3b58c")
DARK, RED = ("weights", "stashes"), "#b02020"
CENTERED: Dict[str, Any] = {"ha": "center", "va": "center"}
LEGEND: Dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "fontsize": 8, "frameon": False}
THINNEST = 0.02  # of a cycle: how wide a stage without matrix products is drawn, so that it is seen


class Visit(NamedTuple):
    """What an IPU does in a part of a cycle."""

    stage: int
    phase: str
    micro_batch: int
    begin: float
    """In shares of a cycle of the slowest IPU; so is `end`."""
    end: float


def visits_of(plan: IpuPlan, ipu: int, cycle: int) -> Iterator[Visit]:
    """What `ipu` does in `cycle` (from 0), in order."""
    last, at = len(plan.stages) - 1, 0.0
    work: List[Tuple[int, str, int]] = [(i, "forward", cycle - i) for i in range(last + 1)]
    for i in reversed(range(last + 1)):
        phases = ("recompute", "backward") if i < last else ("backward",)
        work += [(i, phase, cycle - (2 * last - i)) for phase in phases]
    for i, phase, micro_batch in work:
        if plan.stages[i].stage.ipu == ipu and 0 <= micro_batch < plan.cycles - plan.filling:
            width = max(THINNEST, getattr(plan.stages[i], phase) / plan.slowest_work)
            yield Visit(i, phase, micro_batch, at, at + width)
            at += width


def draw_plan(plan: IpuPlan, title: str, optimizer: str, path: str) -> None:
    """Draws the first and the last cycles of a step, and what fills each IPU, into `path` (.svg or .png)."""
    ipus = range(len(plan.memory))
    figure = Figure(figsize=(15, 2.6 + 1.05 * len(ipus)), layout="constrained")
    schedule, memory = figure.subplots(2, 1, gridspec_kw={"height_ratios": (1.25, 1)})
    draw_schedule(schedule, plan, f"drain, then {optimizer}'s update")
    draw_memory(memory, plan)
    for axes in (schedule, memory):
        axes.set_yticks(ipus, [f"IPU {ipu}" for ipu in ipus])
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=110)


def draw_schedule(axes: Axes, plan: IpuPlan, drain: str) -> None:
    ipus, last, filling = len(plan.memory), len(plan.stages) - 1, plan.filling
    start, end = filling + 4, max(filling, 2) + 2
    gap = start + end < plan.cycles  # cycles between the first and the last ones are left out
    shown = [*range(start), *range(plan.cycles - end, plan.cycles)] if gap else list(range(plan.cycles))
    places = [place + (gap and place >= start) for place in range(len(shown))]
    for at, cycle in zip(places, shown):
        for ipu in range(ipus):
            for visit in visits_of(plan, ipu, cycle):
                colours = HEAD_COLOURS if visit.stage == last > 0 else COLOURS
                draw_visit(axes, visit, at, ipu, colours[visit.phase], inches=23 / len(shown))
    width = len(shown) + gap
    if gap:
        axes.text(start + 0.5, (ipus - 1) / 2, "...", fontsize=16, **CENTERED)
    if filling:
        for begin, stop, label in ((0, filling, "fill"), (width - filling, width, drain)):
            axes.axvspan(begin, stop, color="#f2efe6", zorder=0, linewidth=0)
            axes.text((begin + stop) / 2, -0.62, label, fontsize=8, color="#6b6450", **CENTERED)
    axes.set_xticks([at + 0.5 for at in places], [str(cycle + 1) for cycle in shown], fontsize=7)
    axes.set_xlabel(f"cycle of a step, of {plan.cycles}; the numbers in the bars are micro-batches")
    axes.set(xlim=(0, width), ylim=(ipus - 0.5, -0.85))
    bars = "a bar is as long as its matrix products take, a stage without any is drawn thin"
    axes.set_title(f"Pipeline: {bars}; each cycle lasts as long as IPU {plan.slowest} needs", fontsize=10)
    heads = {f"{plan.stages[-1].stage.name}, {phase}": colour for phase, colour in HEAD_COLOURS.items()}
    colours = {**COLOURS, **(heads if last else {})}
    axes.legend(handles=[Patch(color=colour, label=label) for label, colour in colours.items()], **LEGEND)


def draw_visit(axes: Axes, visit: Visit, at: int, ipu: int, colour: str, inches: float) -> None:
    """A bar in the cycle that is drawn at `at`, `inches` wide, with its micro-batch where there is room for it."""
    length, text = visit.end - visit.begin, str(visit.micro_batch + 1)
    axes.broken_barh([(at + visit.begin * 0.96, length * 0.96)], (ipu - 0.4, 0.8), color=colour, linewidth=0)
    if length * inches > 0.1:
        rotation = 90 if 0.09 * len(text) > length * inches else 0
        colour = "white" if visit.phase == "forward" else "black"
        x = at + 0.48 * (visit.begin + visit.end)
        axes.text(x, ipu, text, fontsize=6, rotation=rotation, color=colour, **CENTERED)


def draw_memory(axes: Axes, plan: IpuPlan) -> None:
    limit, ipus, left = IPU_BYTES / MIB, range(len(plan.memory)), [0.0] * len(plan.memory)
    for name, colour in zip(plan.memory[0].parts, MEMORY_COLOURS):
        sizes = [memory.parts[name] / MIB for memory in plan.memory]
        bars = axes.barh(ipus, sizes, left=left, color=colour, height=0.7, label=name)
        labels = [f"{size:.0f}" if size > 0.045 * limit else "" for size in sizes]
        axes.bar_label(bars, labels, label_type="center", fontsize=7, color="white" if name in DARK else "black")
        left = [begin + size for begin, size in zip(left, sizes)]
    for ipu, end in enumerate(left):
        colour = RED if end > limit else "black"
        axes.text(end + 0.005 * limit, ipu, percent(end / limit), va="center", fontsize=8, color=colour)
    axes.axvline(limit, color=RED, linewidth=1.2)
    axes.text(limit, -0.42, f" {limit:.0f} MiB", color=RED, fontsize=8, va="bottom", ha="left")
    axes.set(xlim=(0, 1.08 * max(limit, *left)), ylim=(len(ipus) - 0.4, -0.8))
    axes.set_xlabel("MiB when it is fullest, without program code and exchange buffers")
    axes.set_title("Memory of each IPU", fontsize=10)
    axes.legend(**LEGEND)
