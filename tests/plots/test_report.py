"""Tables, figures and progress show the numbers they are given."""

import io

import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from ovq.cli.common import print_table
from ovq.runtime.progress import Reporter
from ovq_lab.eval.rows import ResultRow
from ovq_lab.plots.draw import save_demo_figures
from ovq_lab.plots.panels import new_panels, save
from ovq_lab.plots.tables import result_table, slice_table


def row(mixer, num_slots, length, accuracy, state_bytes=1024, slices=None, merge=None):
    return ResultRow(
        mixer=mixer,
        num_slots=num_slots,
        length=length,
        accuracy=accuracy,
        state_bytes=state_bytes,
        num_questions=10,
        slices=slices or {},
        merge=merge,
    )


ROWS = [
    row("ovq", 64, 256, 0.91, 3 * 1024, merge="existing"),
    row("ovq", 64, 1024, 0.52, 4 * 1024, merge="existing"),
    row("ovq", 256, 256, 0.93, 5 * 1024, merge="existing"),
    row("ovq", 256, 1024, 0.94, 6 * 1024, merge="existing"),
    row("ovq", 256, 256, 0.97, 6 * 1024, merge="nearest"),
    row("ovq", 256, 1024, 0.98, 6 * 1024, merge="nearest"),
    row("full_attention", None, 256, 0.95, 2**20),
    row("full_attention", None, 1024, 0.96, 2**22),
    row("sliding_attention", None, 256, 0.17, 900),
    row("sliding_attention", None, 1024, 0.08, 900),
]


def printed(table):
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_tables_lose_no_digits_in_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setattr("ovq.cli.common.out_console", Console(width=30, force_terminal=True))
    # A column that does not wrap takes all the room.
    table = Table("name", "recall", "bytes", title="all of it")
    table.columns[0].no_wrap = True
    table.add_row("one model of a long name", "0.123456789", "123,456,789 in all")
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    [row] = [line for line in lines if "model" in line]
    assert [part.strip() for part in row.split("│")[1:3]] == ["one model of a long name", "0.123456789"]
    assert any("123,456,789" in line for line in lines)


def test_the_result_table_has_a_row_for_each_model():
    cells = [
        [part.strip() for part in line.split("│")[1:-1]]
        for line in printed(result_table(ROWS, title="t")).splitlines()
    ]
    assert [line for line in cells if line] == [
        ["OVQ, 64 slots", "0.910", "0.520", "4.0 KiB"],
        ["OVQ, 256 slots", "0.930", "0.940", "6.0 KiB"],
        ["OVQ, nearest, 256 slots", "0.970", "0.980", "6.0 KiB"],
        ["full attention", "0.950", "0.960", "4.0 MiB"],
        ["window alone", "0.170", "0.080", "900 B"],
    ]


def test_the_slice_table_is_of_the_longest_length():
    rows = [
        row("ovq", 64, 256, 0.5, slices={"near": 0.1}),
        row("ovq", 64, 1024, 0.5, slices={"near": 0.75, "far": 0.25}),
        row("ovq", 256, 1024, 0.5, slices={"near": 1.0, "far": 0.5}),
    ]
    text = printed(slice_table(rows, title="t"))
    cells = [[part.strip() for part in line.split("│")[1:-1]] for line in text.splitlines()]
    assert [line for line in cells if line] == [["near", "0.750", "1.000"], ["far", "0.250", "0.500"]]


def test_figures_show_the_rows(tmp_path, drawn):
    paths = save_demo_figures(ROWS, tmp_path, train_length=256)
    assert [path.name for path in paths] == ["accuracy.png", "state.png"]
    colors = []
    for figure, value in zip(drawn, (lambda row: row.accuracy, lambda row: row.state_bytes), strict=True):
        [axes] = figure.axes
        lines = {container.get_label(): container.lines[0] for container in axes.containers}
        shown = {
            (label, x, y) for label, line in lines.items() for x, y in zip(*line.get_data(), strict=True)
        }
        assert shown == {(row.label, row.length, value(row)) for row in ROWS}
        assert axes.get_xscale() == "log"
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["256", "1k"]
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        colors.append({label: line.get_color() for label, line in lines.items()})
        assert len(set(colors[-1].values())) == len(lines)
    assert colors[0] == colors[1]
    names = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in drawn]
    assert names == 2 * [[*dict.fromkeys(row.label for row in ROWS), "longest in training"]]


def test_figures_are_pictures_without_text_on_text(tmp_path, drawn, full_pictures):
    for path in save_demo_figures(ROWS, tmp_path, train_length=256):
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.size[0] == 960
    for figure in drawn:
        [axes], [legend] = figure.axes, figure.legends
        figure.draw_without_rendering()
        texts = [axes.xaxis.label, axes.yaxis.label, legend.get_title(), *legend.get_texts(), *axes.texts]
        # Ticks beyond the axis are not drawn.
        bottom, top = axes.get_ylim()
        ticks = [x for x in axes.get_yticklabels() if bottom <= x.get_position()[1] <= top]
        texts += [label for label in (*axes.get_xticklabels(), *ticks) if label.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        inside = figure.bbox
        for i, box in enumerate(boxes):
            assert inside.x0 <= box.x0
            assert box.x1 <= inside.x1
            assert not any(box.overlaps(other) for other in boxes[:i]), texts[i]
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_a_long_legend_takes_no_height_from_the_panels(tmp_path, drawn):
    for num_lines in (3, 15):
        figure, [axes] = new_panels(1)
        for i in range(num_lines):
            axes.plot([0, 1], [i, i], label=f"a line with a name that needs a row of its own, {i}")
        save(figure, tmp_path / "panel.png", title="lines")
    few, many = (figure.axes[0].get_window_extent().height for figure in drawn)
    assert many == pytest.approx(few, rel=0.05)


def test_one_size_of_the_dictionary_is_enough_for_a_figure(tmp_path):
    assert len(save_demo_figures([row("ovq", 64, 256, 0.5)], tmp_path, train_length=128)) == 2


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_reaches_the_console(is_terminal):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100, record=True)
    with Reporter(console) as reporter:
        work = reporter.start("counting", total=3)
        work.update(1, note="one")
        work.update(3, note="three")
    text = console.export_text()
    assert "counting" in text
    assert "three" in text
    if not is_terminal:
        # The first, the last, and none between, as no ten seconds went by.
        assert text.splitlines() == ["counting: 0/3 (0 s)", "counting: 3/3 (three, 0 s)"]


def test_long_work_is_reported_on_between(monkeypatch):
    now = iter([0.0, 0.0, 5.0, 11.0, 11.0, 12.0, 12.0])
    monkeypatch.setattr("ovq.runtime.progress.time.monotonic", lambda: next(now))
    console = Console(file=io.StringIO(), force_terminal=False, width=100, record=True)
    with Reporter(console) as reporter:
        work = reporter.start("counting", total=3)
        work.update(1)
        work.update(2)
        work.update(3)
    assert console.export_text().splitlines() == [
        "counting: 0/3 (0 s)",
        "counting: 2/3 (11 s)",
        "counting: 3/3 (12 s)",
    ]
