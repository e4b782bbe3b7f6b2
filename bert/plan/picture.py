"""The picture of a plan for IPUs: the pipeline over time, IPU by IPU, and the memory of each."""

from typing import Iterator, List, Tuple

from bert.plan.ipu_plan import IPU_BYTES, IpuPlan

__all__ = ["cycle_parts", "draw_plan"]

MIB = 2**20
COLOURS = {"forward": "#4878a8", "recompute": "#b9c7d6", "backward": "#d98442"}
HEAD_COLOURS = {"forward": "#3f8f6b", "backward": "#a3b84c"}  # the last stage, beside the first on IPU 0
MEMORY = (
    ("weights", "#3c4f6b"),
    ("gradients", "#6f87a6"),
    ("optimizer", "#a9b9cc"),
    ("stashes", "#3f8f6b"),
    ("activations", "#a5cdb9"),
    ("temporaries", "#e3b58c"),
)
THINNEST = 0.02  # of a cycle: a stage without matrix products is drawn so wide, or it would not be seen


def cycle_parts(found: IpuPlan, ipu: int, cycle: int) -> Iterator[Tuple[int, str, int, float, float]]:
    """What `ipu` does in `cycle` (from 0): (stage, phase, micro-batch, from, to), in shares of a cycle of the slowest
    IPU."""
    last, micro_batches = len(found.stages) - 1, found.cycles - found.filling
    longest, at = found.work_of(found.slowest), 0.0
    parts: List[Tuple[int, str, int, int]] = []
    for index, one in enumerate(found.stages):
        if one.stage.ipu == ipu:
            parts.append((index, "forward", cycle - index, one.forward))
    for index in reversed(range(last + 1)):
        one = found.stages[index]
        if one.stage.ipu == ipu:
            micro_batch = cycle - (2 * last - index)
            if index < last:
                parts.append((index, "recompute", micro_batch, one.recompute))
            parts.append((index, "backward", micro_batch, one.backward))
    for index, phase, micro_batch, work in parts:
        if 0 <= micro_batch < micro_batches:
            width = max(THINNEST, work / longest)
            yield index, phase, micro_batch, at, at + width
            at += width


def draw_plan(found: IpuPlan, title: str, path: str) -> None:
    """Draws the first and the last cycles of a step, and what fills each IPU, into `path` (.svg or .png)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ipus = len(found.memory)
    figure, (schedule, memory) = pyplot.subplots(
        2, 1, figsize=(15, 2.6 + 1.05 * ipus), layout="constrained", gridspec_kw={"height_ratios": (1.25, 1)}
    )
    draw_schedule(schedule, found)
    draw_memory(memory, found)
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_schedule(axes, found: IpuPlan) -> None:
    from matplotlib.patches import Patch

    ipus, last = len(found.memory), len(found.stages) - 1
    start, end = found.filling + 4, max(found.filling, 2) + 2
    if start + end >= found.cycles:
        shown = list(range(found.cycles))
    else:
        shown = list(range(start)) + list(range(found.cycles - end, found.cycles))
    gap = len(shown) < found.cycles
    places = [place + (gap and place >= start) for place in range(len(shown))]
    for at, cycle in zip(places, shown):
        for ipu in range(ipus):
            for index, phase, micro_batch, begin, stop in cycle_parts(found, ipu, cycle):
                colours = HEAD_COLOURS if index == last and last else COLOURS
                axes.broken_barh(
                    [(at + begin * 0.96, (stop - begin) * 0.96)], (ipu - 0.4, 0.8), color=colours[phase], linewidth=0
                )
                room = (stop - begin) * 23 / len(shown)  # for a digit, where 23 cycles are shown
                if room > 0.1:
                    upright = 0.09 * len(str(micro_batch + 1)) > room
                    axes.text(
                        at + 0.48 * (begin + stop),
                        ipu,
                        str(micro_batch + 1),
                        ha="center",
                        va="center",
                        fontsize=6,
                        rotation=90 if upright else 0,
                        color="white" if phase == "forward" else "black",
                    )
    width = len(shown) + gap
    if gap:
        axes.text(start + 0.5, (ipus - 1) / 2, "...", ha="center", va="center", fontsize=16)
    if found.filling:
        for begin, stop, words in (
            (0, found.filling, "fill"),
            (width - found.filling, width, "drain, then LAMB's update"),
        ):
            axes.axvspan(begin, stop, color="#f2efe6", zorder=0, linewidth=0)
            axes.text((begin + stop) / 2, -0.62, words, ha="center", va="center", fontsize=8, color="#6b6450")
    axes.set_xticks([at + 0.5 for at in places], [str(cycle + 1) for cycle in shown], fontsize=7)
    axes.set_yticks(range(ipus), [f"IPU {ipu}" for ipu in range(ipus)])
    axes.set(
        xlim=(0, width),
        ylim=(ipus - 0.5, -0.85),
        xlabel=f"cycle of a step, of {found.cycles}; the numbers in the bars are micro-batches",
    )
    axes.set_title(
        (
            "Pipeline: a bar is as long as its matrix products take, a stage without any is drawn thin; each "
            f"cycle lasts as long as IPU {found.slowest} needs"
        ),
        fontsize=10,
    )
    handles = [Patch(color=COLOURS[phase], label=phase) for phase in COLOURS]
    if last:
        name = found.stages[-1].stage.name
        handles += [Patch(color=HEAD_COLOURS[phase], label=f"{name}, {phase}") for phase in ("forward", "backward")]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)


def draw_memory(axes, found: IpuPlan) -> None:
    limit = IPU_BYTES / MIB
    for ipu, one in enumerate(found.memory):
        at = 0.0
        for name, colour in MEMORY:
            size = getattr(one, name) / MIB
            axes.barh(ipu, size, left=at, color=colour, height=0.7, label=name if ipu == 0 else None)
            if size > 0.045 * limit:
                axes.text(
                    at + size / 2,
                    ipu,
                    f"{size:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if name in ("weights", "stashes") else "black",
                )
            at += size
        axes.text(
            at + 0.005 * limit,
            ipu,
            f"{100 * one.total / IPU_BYTES:.0f} %",
            va="center",
            fontsize=8,
            color="#b02020" if one.total > IPU_BYTES else "black",
        )
    axes.axvline(limit, color="#b02020", linewidth=1.2)
    axes.text(limit, -0.42, f" {limit:.0f} MiB", color="#b02020", fontsize=8, va="bottom", ha="left")
    axes.set_yticks(range(len(found.memory)), [f"IPU {ipu}" for ipu in range(len(found.memory))])
    axes.set(
        xlim=(0, 1.08 * max([limit] + [one.total / MIB for one in found.memory])),
        ylim=(len(found.memory) - 0.4, -0.8),
        xlabel="MiB when it is fullest, without program code and exchange buffers",
    )
    axes.set_title("Memory of each IPU", fontsize=10)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
