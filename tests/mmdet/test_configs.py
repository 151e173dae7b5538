"""The configs: each builds, its pyramid fits its backbone, and mmcv without operators is reported before it matters."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

CONFIGS = Path(__file__).parents[2] / "mm_configs"
NAMES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob("[!_]*/*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_config_builds_a_detector_whose_parts_fit(name: str) -> None:
    config = Config.fromfile(CONFIGS / name)
    assert config.model.data_preprocessor.bgr_to_rgb
    with DefaultScope.overwrite_default_scope("mmdet"), torch.device("meta"):
        model = MODELS.build(config.model).eval()
        assert list(model.backbone.out_channels) == config.model.neck.in_channels
        for statistic in ("mean", "std"):  # what the weights of our models and timm's expect
            expected = [255 * value for value in model.backbone.model.pretrained_cfg[statistic]]
            assert config.model.data_preprocessor[statistic] == pytest.approx(expected)
        maps = model.extract_feat(torch.empty(1, 3, 128, 192, device="meta"))
    anchors = config.model.get("rpn_head", config.model.get("bbox_head")).anchor_generator
    assert [128 // feature_map.shape[2] for feature_map in maps] == list(anchors.strides)


def test_the_type_alone_finds_the_backbone_in_a_fresh_process() -> None:
    program = (
        "from mmengine.registry import MODELS\n"
        "MODELS.build(dict(type='exit_plugins.DynPerceiver', arch='dynperceiver_test'))\n"
        "MODELS.build(dict(type='exit_plugins.TimmBackbone', arch='resnet10t'))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_one_setting_swaps_the_dynamic_and_the_plain_backbone() -> None:
    dynamic, plain = (
        Config.fromfile(CONFIGS / "bccd" / f"retinanet_{name}_fpn_bccd.py")
        for name in ("dynperceiver_regnety_400mf", "regnety_400mf")
    )
    dynamic.model.backbone = plain.model.backbone
    assert dynamic.to_dict() == plain.to_dict()


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("ModuleNotFoundError(\"No module named 'mmcv._ext'\", name='mmcv._ext')", "without its compiled operators"),
        (
            "ImportError('undefined symbol: _ZN3c10')",
            "undefined symbol: _ZN3c10); they were compiled for another torch",
        ),
    ],
)
def test_mmcv_without_working_operators_says_how_to_get_them(failure: str, message: str, tmp_path: Path) -> None:
    script = tmp_path / "no_operators.py"
    script.write_text(
        "import sys\n"
        "class NoOperators:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'mmcv._ext':\n"
        f"            raise {failure}\n"
        "sys.meta_path.insert(0, NoOperators())\n"
        "from mmengine.config import Config\n"
        f"Config.fromfile({str(CONFIGS / NAMES[0])!r})\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode != 0
    last_words = run.stderr.split("RuntimeError: ")[-1]
    assert message in last_words
    assert "python -m exit_plugins.install_mmdet" in last_words and "Error" not in last_words
