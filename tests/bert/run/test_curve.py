"""The picture of a run has a part for each of the task's losses, however many there are."""

from types import SimpleNamespace

import matplotlib.figure
import pytest

from bert.run.curve import draw_curve
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
    draw_curve(lines, SimpleNamespace(panels=panels), str(tmp_path / "curve.png"), "a run")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [title for title, _, _ in drawn] == [f"part {i}" for i in range(count)] + ["learning rate"]
    assert len({colour for _, colour, _ in drawn}) == count + 1
    assert [values for _, _, values in drawn[:-1]] == [[1 * i, 2 * i, 3 * i] for i in range(count)]
