"""What is exported must say what torch says: every exit's logits, and adaptive runs of all kinds."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..adaptive import AdaptiveModel, ExitOutput
from ..confidence import confidence
from ..policy import ExitPolicy
from ..protocol import MultiExitModule, check_input_size, forward_exits
from .exported import ExportedSegments, GraphRunner

__all__ = ["trial_images", "verify_graph", "verify_segments"]

_TOLERANCE = 1e-4


def trial_images(model: MultiExitModule, input_size: Sequence[int]) -> Tensor:
    """Sixteen images to verify with: noise of differing contrast, so that confidences differ. (16, C, H, W) float32."""
    check_input_size(model, input_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, *input_size, generator=generator)
    images *= torch.linspace(0.2, 2.0, 16).view(-1, *[1] * len(input_size))
    with torch.no_grad():
        forward_exits(model, images[:2])  # an image the model refuses shall be refused in the model's words
    return images


@torch.no_grad()
def verify_segments(model: MultiExitModule, exported: ExportedSegments, images: Tensor) -> None:
    """RuntimeError unless every exit, and adaptive runs of all kinds, agree with torch at several batch sizes.

    Images are (B, C, H, W).
    """
    for size in (1, 2, len(images)):
        expected = forward_exits(model, images[:size])
        for index, (mine, theirs) in enumerate(zip(exported.forward_exits(images[:size]), expected, strict=True)):
            _compare(f"exit {index} at batch {size}", mine, theirs)
    for name, policy in _trial_policies(model, images):
        for size in (1, len(images)):
            mine, theirs = (
                AdaptiveModel(exported, policy)(images[:size]),
                AdaptiveModel(model, policy, fuse=False)(images[:size]),
            )
            _compare_outputs(f"{name} at batch {size}", mine, theirs)


@torch.no_grad()
def verify_graph(model: MultiExitModule, policy: ExitPolicy, runner: GraphRunner, images: Tensor) -> None:
    """RuntimeError unless the one file answers as torch does, images (B, C, H, W) of several batch sizes."""
    for name, trial in _trial_policies(model, images, policy):
        for size in (1, 2, len(images)):
            theirs = AdaptiveModel(model, trial, fuse=False)(images[:size])
            _compare_outputs(f"{name} at batch {size}", runner(images[:size], trial.thresholds), theirs)


def _trial_policies(
    model: MultiExitModule, images: Tensor, policy: ExitPolicy | None = None
) -> list[tuple[str, ExitPolicy]]:
    """Nobody, everybody and some leave early. Thresholds lie between confidences: a tie may fall either way."""
    policy = policy or ExitPolicy([0.0] * model.num_exits)
    rows = [
        confidence(logits, policy.measure, float(t)).sort().values
        for logits, t in zip(forward_exits(model, images), policy.temperatures, strict=True)
    ]
    # The widest gap in the middle half of the confidences.
    some = []
    for row in rows:
        quarter = len(row) // 4
        at = quarter + int((row[quarter + 1 : -quarter] - row[quarter : -quarter - 1]).argmax())
        some.append(float(row[at] + row[at + 1]) / 2)
    trials = {
        "everybody leaving at exit 0": [-np.inf] * len(rows),
        "nobody leaving early": [np.inf] * len(rows),
        "some leaving early": some,
        "everybody leaving at the last exit but one": [np.inf] * (len(rows) - 2) + [-np.inf] * 2,
    }
    return [
        (name, ExitPolicy(thresholds[: len(rows)], policy.measure, policy.temperatures, max_exit=policy.max_exit))
        for name, thresholds in trials.items()
    ]


def _compare_outputs(what: str, mine: ExitOutput, theirs: ExitOutput) -> None:
    if not torch.equal(mine.exit_index, theirs.exit_index):
        raise RuntimeError(f"the export lets samples leave elsewhere than torch does ({what}); it was not written.")
    _compare(what, mine.logits, theirs.logits)
    _compare(what, mine.confidence, theirs.confidence)


def _compare(what: str, mine: Tensor, theirs: Tensor) -> None:
    worst = float((mine - theirs).abs().max()) if mine.shape == theirs.shape else float("nan")
    # Logits of a large scale carry float32's relative error.
    if not worst <= _TOLERANCE * max(1.0, float(theirs.abs().max())):
        raise RuntimeError(
            f"the export differs from torch by {worst:.1e} ({what}), more than {_TOLERANCE:.0e}; it was not written."
        )
