"""The histogram of samples' lengths, as lines of text and as a picture.

Usually nearly all samples have about the full length. Then both have a logarithmic scale, and counts and shares stand
beside the bars.
"""

import math
from typing import List, Sequence, Tuple

from data.errors import InputError

__all__ = ["bars", "bins", "plot"]

BINS, BAR_WIDTH = 16, 40


def bins(histogram: Sequence[int]) -> List[Tuple[str, int]]:
    """The lengths of each bin in words, and its samples; `histogram` has the samples of 0, 1, .. tokens."""
    longest = len(histogram) - 1
    width, digits = -(-longest // BINS), len(str(longest))
    starts = range(1, longest + 1, width)
    names = [f"{start:{digits}} to {min(start + width - 1, longest):{digits}}" for start in starts]
    return [(name, sum(histogram[start : start + width])) for name, start in zip(names, starts)]


def is_skewed(counts: Sequence[int]) -> bool:
    return 2 * max(counts) > sum(counts)


def bars(histogram: Sequence[int]) -> List[str]:
    """Lines of a bar chart, headed by their scale; a bin with samples has a bar."""
    names, counts = zip(*bins(histogram))
    scale = math.log1p if is_skewed(counts) else float
    heading = "lengths" + (", bars on a logarithmic scale" if scale is math.log1p else "")
    lines, digits = [heading], len(f"{max(counts):,}")
    for name, count in zip(names, counts):
        bar = "#" * math.ceil(BAR_WIDTH * scale(count) / scale(max(counts)))
        lines.append(f"  {name}  {bar:{BAR_WIDTH}} {count:{digits},} {100 * count / sum(counts):5.1f} %")
    return lines


def plot(histogram: Sequence[int], title: str, path: str) -> None:
    """Draws it into a .png, .svg or .pdf file, text as text. Raises InputError when the picture cannot be written."""
    import matplotlib
    from matplotlib.figure import Figure

    names, counts = zip(*bins(histogram))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    skewed = is_skewed(counts)
    places = range(len(names))
    if skewed:
        axes.set_xscale("log")
    left = 0.5 if skewed else 0  # so that a single sample has a bar on a logarithmic scale, too
    axes.barh(places, [max(count - left, 0) for count in counts], left=left, height=0.85)
    for place, count in zip(places, counts):
        label = f"{count:,}  ({100 * count / sum(counts):.1f} %)"
        axes.annotate(label, (max(count, left), place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel=f"samples{', logarithmic scale' if skewed else ''}", ylabel="tokens of a sample", title=title)
    axes.set_xlim(left, 1.05 * max(counts))
    try:
        with matplotlib.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42}):
            figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        fault = f"the picture cannot be written ({error})"
        raise InputError(f"{path}: {fault}. Give --plot a name that ends in .png, .svg or .pdf")
