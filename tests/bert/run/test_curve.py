"""The picture of a run has a part for each of the task's losses, with held-out points and what chance gives."""

import math
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest

from bert.run.curve import draw_curve, smooth
from bert.tasks import Panel


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_panel_of_a_task_is_drawn_in_a_colour_of_its_own(tmp_path, monkeypatch, count):
    drawn, savefig = [], matplotlib.figure.Figure.savefig

    def save_and_note(figure, *values, **options):
        drawn.extend(
            (axes.get_title(), axes.lines[0].get_color(), list(axes.lines[0].get_ydata())) for axes in figure.axes
        )
        savefig(figure, *values, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save_and_note)
    panels = [Panel(f"p{i}", f"part {i}", f"loss{i}", f"accuracy{i}") for i in range(count)]
    lines = [{"step": s, "learning_rate": s / 10, **{f"loss{i}": s * i for i in range(count)}} for s in (1, 2, 3)]
    draw_curve(lines, [], SimpleNamespace(panels=panels, selected_by="loss"), str(tmp_path / "curve.png"), "a run")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [title for title, _, _ in drawn] == [f"part {i}" for i in range(count)] + ["learning rate"]
    assert len({colour for _, colour, _ in drawn}) == count + 1
    assert [values for _, _, values in drawn[:-1]] == [[1 * i, 2 * i, 3 * i] for i in range(count)]


def test_a_long_run_is_drawn_raw_and_smoothed_under_its_held_out_points(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: drawn.update(axes=figure.axes))
    values = np.random.default_rng(0).random(300)
    lines = [{"step": s, "learning_rate": 1, "loss": value} for s, value in enumerate(values, 1)]
    panel = Panel("p", "part", "loss", "accuracy", chance=math.log(2))
    draw_curve(
        lines,
        [{"step": 9, "loss": 0.5}],
        SimpleNamespace(panels=[panel], selected_by="loss"),
        str(tmp_path / "curve.png"),
        "a run",
    )
    raw, smoothed, held_out, chance = (list(line.get_ydata()) for line in drawn["axes"][0].lines)
    assert raw == list(values) and held_out == [0.5] and chance == [math.log(2)] * 2
    assert smoothed[100] == pytest.approx(values[97:104].mean()) and smoothed[0] == pytest.approx(values[:4].mean())
    assert smooth([1.0, 5.0]) == [1.0, 5.0]
