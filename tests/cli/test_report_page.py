"""The report's page: its figures against the table they come from, and a real browser that shows and steers them."""

import json
import re

import numpy as np
import pytest
from browser import BROWSER, browser
from scipy.stats import binom
from test_trust import run

from exit_plugins import ExitTable
from exit_plugins.cli.page import write_page
from exit_plugins.cli.report import disagreement_bounds
from exit_plugins.exits.thresholds import policy_path

MODEL = "msdnet_test"

# The least contrast of texts and the ground, as WCAG 2.2 defines it.
CONTRAST = """(() => {
    const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = c => {
        const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(channel);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = light(getComputedStyle(document.body).backgroundColor);
    const inks = [...document.querySelectorAll('p, figcaption, .wrong, .tiles span, h2')];
    return Math.min(...inks.map(e => light(getComputedStyle(e).color)).map(
        ink => (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05)));
})()"""


@pytest.fixture(scope="module")
def page(images, checkpoint, policy_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    words = [MODEL, "--checkpoint", checkpoint, "--data", images, "--split", "test", "--solve-split", "val"]
    assert run("report", *words, "--budgets", "2", "-o", path) == 0
    return path


def data_of(page) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL).group(1))


def test_what_the_slider_shows_is_what_the_path_does(page, images, checkpoint, tmp_path):
    tables = {}
    for split in ("val", "test"):
        words = [MODEL, "--checkpoint", checkpoint, "--data", images, "--split", split]
        assert run("evaluate", *words, "--save-table", tmp_path / f"{split}.npz") == 0
        tables[split] = ExitTable.load(tmp_path / f"{split}.npz")
    found, table = data_of(page), tables["test"]
    costs = np.array([exit_["cost"] for exit_ in found["exits"]])
    path = policy_path(tables["val"], costs, 33)
    assert len(found["points"]) == 33 and found["similarity"] is not None
    for point, policy in zip(found["points"], path, strict=True):
        exits = policy.choose(table.confidence)
        assert point["accuracy"] == pytest.approx(table.correct[exits, range(len(table))].mean())
        assert point["cost"] == pytest.approx(costs[exits].mean())
        assert point["shares"] == pytest.approx(np.bincount(exits, minlength=3) / len(table))
        differ = int((table.prediction[exits, range(len(table))] != table.prediction[-1]).sum())
        assert binom.cdf(differ, len(table), point["bound"]) == pytest.approx(0.1 / 33)  # Clopper and Pearson
    shown = [p for group in found["pictures"] for p in group["easiest"] + group["hardest"]]
    assert shown and all(p["source"].startswith("data:image/png;base64,") for p in shown)


def test_bounds_hold_as_often_as_they_say():
    rng = np.random.default_rng(0)
    costs = [1.0, 2.0]

    def table(count) -> ExitTable:
        sure = rng.uniform(size=(2, count))
        first = (rng.uniform(size=count) < 0.5 * (1 - sure[0])).astype(int)  # differs the more, the less sure
        return ExitTable(sure, np.stack([first, np.zeros(count, int)]), np.zeros(count, int))

    path = policy_path(table(500), costs, 9)
    world = table(200_000)
    true = [(world.prediction[p.choose(world.confidence), range(len(world))] != 0).mean() for p in path]
    failed = sum((disagreement_bounds(path, table(60)) < true).any() for _ in range(200))
    assert failed <= binom.ppf(0.999, 200, 0.1)


def test_nothing_in_the_data_is_taken_for_markup(tmp_path):
    evil = "</script><script>alert(1)</script><!-- {{title}}"
    write_page(tmp_path / "p.html", evil, "{{data}}", evil, {"name": evil})
    text = (tmp_path / "p.html").read_text()
    assert text.count("<script") == 2 and data_of(tmp_path / "p.html") == {"name": evil}
    assert "alert(1)</script>" not in text and "<p>{{data}}</p>" in text


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_a_browser_shows_it_at_every_width_in_both_schemes(page, tmp_path):
    pytest.importorskip("websockets")
    found = data_of(page)
    with browser(tmp_path) as tab:
        tab.open(f"{page.as_uri()}#3")
        assert tab.ask("document.getElementById('budget').value") == "3"  # an address can name a budget
        # The keyboard alone: to the slider, and along it.
        tab.press("Tab")
        assert tab.ask("document.activeElement.id") == "budget"
        tab.press("End")
        last = found["points"][-1]
        assert f"{100 * last['accuracy']:.2f} %" in tab.ask("document.getElementById('tiles').textContent")
        tab.press("ArrowLeft")
        point = found["points"][-2]
        tiles = tab.ask("document.getElementById('tiles').textContent")
        assert f"{100 * point['accuracy']:.2f} %" in tiles and f"≤ {100 * point['bound']:.2f} %" in tiles
        legend = tab.ask("document.getElementById('legend').textContent")
        assert all(f"exit {k + 1}: {100 * share:.1f} %" in legend for k, share in enumerate(point["shares"]))
        assert f"accuracy {100 * point['accuracy']:.2f} %" in tab.ask(
            "document.getElementById('budget').getAttribute('aria-valuetext')"
        )
        # Every control has a name, every picture a text, every drawing a title.
        assert tab.ask("[...document.images].every(i => i.alt)") is True
        assert tab.ask("[...document.querySelectorAll('svg')].every(s => s.querySelector('title')?.textContent)")
        assert tab.ask("document.querySelectorAll('#points tbody tr').length") == len(found["points"])
        tab.ask("document.getElementById('copy').click(); new Promise(done => setTimeout(done, 200))")
        assert "33 rows copied" in tab.ask("document.getElementById('copied').textContent")
        for scheme in ("light", "dark"):
            for width in (360, 800, 1600):
                tab.look(width, scheme)
                assert tab.ask("document.documentElement.scrollWidth") <= width, f"wider than {width} pixels"
            assert tab.ask(CONTRAST) >= 4.5, f"text too faint in the {scheme} scheme"  # WCAG 2.2, AA
        assert tab.faults() == []
