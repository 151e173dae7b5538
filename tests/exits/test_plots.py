import io

import numpy as np
import pytest
from PIL import Image
from small_tables import costs_of, realistic_table

from exit_plugins import ExitPolicy, ExitTable, anytime_curve, budgeted_curve
from exit_plugins.exits import plots
from exit_plugins.exits.calibration import calibration
from exit_plugins.exits.evaluation import evaluate_policy
from exit_plugins.exits.similarity import cka_matrix

NAMES = [f"kind {i}" for i in range(10)]


@pytest.fixture(scope="module")
def made():
    table, costs = realistic_table(5, 300), costs_of(5)
    points = budgeted_curve(table, table, costs, 5, method="shared")
    return table, costs, points


def render(figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=60)
    return np.asarray(Image.open(buffer).convert("L"))


def test_budget_curve_draws_every_point_where_it_lies(made):
    table, costs, points = made
    figure = plots.budget_curve({"ours": points, "theirs": points[:3]}, anytime_curve(table, costs * 1e6))
    (axes,) = figure.axes
    ours, theirs, exits = axes.lines
    np.testing.assert_allclose(ours.get_ydata(), [100 * p.accuracy for p in sorted(points, key=lambda p: p.cost)])
    np.testing.assert_allclose(exits.get_xdata(), costs)  # in the unit the label names
    assert axes.get_xlabel() == "mean cost per image [MMACs]"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["ours", "theirs", "one exit for all"]
    # Told apart without colour too.
    assert ours.get_marker() != theirs.get_marker()
    assert render(figure).std() > 5


def test_stacked_shares_add_up_and_exits_differ_in_grey(made):
    _, _, points = made
    figure = plots.exit_shares(points)
    bars = figure.axes[0].patches
    assert len(bars) == 25
    heights = np.array([bar.get_height() for bar in bars]).reshape(5, 5)  # exits, budgets
    np.testing.assert_allclose(heights.sum(0), 100)
    np.testing.assert_allclose(heights[:, 1], 100 * points[1].result.shares)
    grey = [np.dot(bar.get_facecolor()[:3], (0.299, 0.587, 0.114)) for bar in bars[::5]]
    assert (np.diff(grey) < -0.08).all()  # each exit clearly darker than the one before
    assert len({bar.get_hatch() for bar in bars[::5]}) == 5


def test_class_exits_are_ordered_and_named(made):
    table, costs, points = made
    result = evaluate_policy(points[2].policy, table, costs)
    axes = plots.class_exits(result, NAMES, most=3).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    mean_exit = {NAMES[c]: s @ np.arange(5) for c, s in zip(result.classes, result.class_shares, strict=True)}
    ranked = sorted(mean_exit, key=mean_exit.get)
    assert set(labels[:3]) == set(ranked[:3]) and set(labels[3:]) == set(ranked[-3:])


def test_reliability_and_similarity_draw_the_figures_given(made):
    table, _, _ = made
    found = calibration(table)
    figure = plots.reliability(found)
    assert [axes.get_title() for axes in figure.axes] == [
        f"exit {k + 1}: ECE {100 * c.ece:.1f} %" for k, c in enumerate(found)
    ]
    matrix = cka_matrix(list(table.confidence), table.target)
    heat = plots.cka_heatmap(matrix)
    assert [t.get_text() for t in heat.axes[0].texts] == [f"{v:.2f}" for v in matrix.ravel()]
    assert render(heat).std() > 5


def test_easiest_and_hardest_are_those_of_the_first_and_last_exit():
    confidence = [[0.9, 0.95, 0.1, 0.2, 0.99], [0.5, 0.5, 0.5, 0.5, 0.5]]
    table = ExitTable(confidence, [[0, 0, 0, 0, 1], [0] * 5], [0] * 5)
    easy, hard = plots.sample_indices(table, ExitPolicy([0.8, 0]), count=5)
    assert easy.tolist() == [1, 0, 4]  # surest first, and the wrong answer last however sure
    assert hard.tolist() == [2, 3]  # the less sure first


@pytest.mark.parametrize("form", ["pil", "hwc", "chw", "grey", "pairs"])
def test_images_of_any_form_are_shown_and_only_those_needed_are_read(form, made):
    table, _, points = made
    pixels = np.random.default_rng(0).integers(0, 256, size=(300, 8, 8, 3), dtype=np.uint8)
    read = []

    class Images:
        def __getitem__(self, i):
            read.append(i)
            return {
                "pil": lambda: Image.fromarray(pixels[i]),
                "hwc": lambda: pixels[i],
                "chw": lambda: pixels[i].transpose(2, 0, 1) / 255.0,
                "grey": lambda: pixels[i, ..., 0],
                "pairs": lambda: (Image.fromarray(pixels[i]), 3),
            }[form]()

    figure = plots.easiest_and_hardest(Images(), table, points[2].policy, NAMES, count=4)
    assert len(read) == 8
    shown = np.asarray(figure.axes[0].images[0].get_array())
    shown = shown if shown.dtype == np.uint8 else np.round(shown * 255)
    expected = pixels[read[0]] if form != "grey" else pixels[read[0], ..., :1].repeat(3, -1)
    np.testing.assert_array_equal(shown, expected)
    assert render(figure).std() > 5


def test_save_writes_the_format_of_the_ending(made, tmp_path):
    figure = plots.exit_shares(made[2])
    plots.save(figure, tmp_path / "a.png")
    plots.save(figure, tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" and b"<svg" in (tmp_path / "a.svg").read_bytes()
    with pytest.raises(ValueError, match="no ending that says a picture format"):
        plots.save(figure, tmp_path / "a")
    with pytest.raises(ValueError):
        plots.save(figure, tmp_path / "a.xyz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.svg"]


def test_nothing_to_draw_is_refused(made):
    for draw in (plots.budget_curve, plots.exit_shares, plots.reliability):
        with pytest.raises(ValueError, match="there is no"):
            draw([])
    with pytest.raises(ValueError, match="square matrix"):
        plots.cka_heatmap(np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("value", "expected"), [(4e8, (1e6, "M")), (2.5e9, (1e9, "G")), (0.012, (1e-3, "m")), (0, (1, ""))]
)
def test_units_are_readable(value, expected):
    assert plots.si_unit(value) == expected
