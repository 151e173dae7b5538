"""Every piece of Python in the README and in docs/ runs, page by page from the top, on small networks."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

IMPORTS = "import timm, torch, exit_plugins\n"
SMALL = {"dynperceiver_regnety_400mf": "dynperceiver_test", "224": "64"}
RANDOM = {"pretrained=True": "pretrained=False"}  # there is no hub in a test

# Page -> (what it takes for granted, what stands in the place of what).
PAGES = {
    "README.md": (
        "",
        {
            "(96, 224)": "(32, 64)", "resnet18": "test_resnet", "resnet50": "test_resnet", **SMALL,
            'backbone="test_resnet", exits=4, train="heads", pretrained=True': 'backbone="test_resnet", exits=4, '
            'train="heads"',
        },
    ),
    "docs/index.md": ("", SMALL),
    "docs/toolkit.md": ("", SMALL),
    "docs/deploy.md": ("", SMALL),
    "docs/models.md": (IMPORTS + 'model = timm.create_model("msdnet_test")\n', {}),
    "docs/any_model.md": (
        IMPORTS + 'network, small, large = (timm.create_model("test_resnet") for _ in range(3))\n',
        {
            "mobilenetv3_small_100,resnet50": "test_resnet,test_resnet", "resnet18": "test_resnet",
            "tf_efficientnet_lite0": "test_efficientnet", "pretrained_backbone=True": "pretrained_backbone=False",
            "latent_depths=(3, 3, 9, 9)": "latent_depths=(1, 1, 1, 1)", **RANDOM,
        },
    ),
    "docs/video.md": (
        IMPORTS + "from exit_plugins import temporal_shift\nfrom exit_plugins.timm.video import FrameStream\n"
        'network = timm.create_model("dynperceiver_test", num_classes=5)\n'
        "policy = exit_plugins.ExitPolicy([0.9, 0.9, 0.9, 0])\n"
        "clips, frame = torch.randn(1, 8, 3, 64, 64), torch.randn(3, 64, 64)\n",
        {
            "tsm_dynperceiver_resnet50_0_5x": "tsm_dynperceiver_test",
            "network, num_frames=8, online": 'timm.create_model("dynperceiver_test"), num_frames=8, online',
        },
    ),
    "docs/peft.md": (
        "import torch\n", {"vit_base_patch16_224.augreg_in21k": "test_vit", "224": "160", **RANDOM},
    ),
    "docs/detection.md": ("import torch\nbackbone, image = torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 32, 32)\n", {
        "backbone = dict(": "settings = dict(",
    }),
    "docs/predict.md": (
        "from sklearn.datasets import load_sample_image\nfrom PIL import Image\n"
        'Image.fromarray(load_sample_image("flower.jpg")).resize((32, 32)).save("flower.png")\n',
        {},
    ),
}  # fmt: skip
NEEDS = {"docs/peft.md": "peft", "docs/detection.md": "onnxscript"}


def code_of(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def test_no_page_is_left_out():
    pages = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    elsewhere = {"docs/new_architecture.md"}  # a whole file, tried in tests/timm/test_new_architecture.py
    assert {page for page in pages if code_of(page)} == set(PAGES) | elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch, capsys):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    monkeypatch.chdir(tmp_path)
    given, instead = PAGES[page]
    code = code_of(page)
    for old, new in instead.items():
        code = code.replace(old, new)
    names: dict = {}
    exec(compile(given + code, page, "exec"), names)
    if page == "README.md":
        said = re.search(r"It prints `(.*)`", (ROOT / page).read_text(encoding="utf-8")).group(1)
        assert said in capsys.readouterr().out.splitlines()
    if page == "docs/toolkit.md":
        assert names["policy"].max_exit == 2
        assert names["safe"].certificate["samples"]["count"] == len(names["apart"])
        assert (tmp_path / "policy.json").is_file() and not (tmp_path / "val.part").exists()


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert re.match("https?:", target) or (ROOT / target).exists(), target


def test_every_page_is_in_the_site():
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_load(text)["nav"]
    listed = [page for entry in nav for value in entry.values() for page in ([value] if isinstance(value, str) else [
        name for item in value for name in item.values()
    ])]  # fmt: skip
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.fixture
def docs_scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")


def test_the_tables_of_models_are_the_ones_that_are_counted(docs_scripts):
    from model_table import TABLES, row
    from page_tables import fill

    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for name in ("msdnet_cifar_batch", "dynperceiver_mobilenetv3_0_75x"):  # all of them take a while
        assert "| " + " | ".join(row(name)) + " |" in text
    told = {name: TABLES[name]() if name == "shipped" else name for name in TABLES}
    again = fill(text, told.__getitem__)
    assert again.partition("<!-- table: shipped -->")[2] == text.partition("<!-- table: shipped -->")[2]
    assert "<!-- table: models -->\n\nmodels\n\n<!-- /table -->" in again


def test_only_what_is_marked_is_written(docs_scripts):
    from page_tables import fill, table

    page = "before\n\n<!-- table: a -->\nold\n\n| x |\n<!-- /table -->\n\nbetween\n<!-- table: b -->\n<!-- /table -->\n"
    once = fill(page, lambda name: table([name, "2"], [["3", "4"]]))
    assert once == (
        "before\n\n<!-- table: a -->\n\n| a | 2 |\n| --- | --- |\n| 3 | 4 |\n\n<!-- /table -->\n\nbetween\n"
        "<!-- table: b -->\n\n| b | 2 |\n| --- | --- |\n| 3 | 4 |\n\n<!-- /table -->\n"
    )
    assert fill(once, lambda name: table([name, "2"], [["3", "4"]])) == once


@pytest.mark.parametrize(
    "page",
    [
        "<!-- table: a -->\nold\n",
        "old\n<!-- /table -->\n",
        "<!-- table: a -->\n<!-- table: b -->\n<!-- /table -->\n",
        "<!-- table a -->\n<!-- /table -->\n",
        "text <!-- table: a -->\n<!-- /table -->\n",
    ],
)
def test_half_a_mark_is_an_error(docs_scripts, page):
    from page_tables import fill

    with pytest.raises(ValueError, match="each table stands between"):
        fill(page, str)
