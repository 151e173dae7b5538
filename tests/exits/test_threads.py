"""One adaptive model, many threads, the policy swapped meanwhile: every call runs under one policy."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from small_models import ConvExits, settle

from exit_plugins import AdaptiveModel, ExitPolicy
from exit_plugins.exits.confidence import confidence
from exit_plugins.exits.export import export_segments


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = settle(ConvExits(), torch.randn(32, 3, 16, 16))
    images = torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        for head in model.heads:
            head.weight.mul_(20)
        outputs = model.forward_exits(images)

    def policy(measure: str, share: float) -> ExitPolicy:
        return ExitPolicy([float(confidence(z, measure).quantile(share)) for z in outputs], measure)

    policies = [policy(m, s) for m in ("max_softmax", "entropy", "margin") for s in (0.3, 0.7)]
    return model, images, [*policies, ExitPolicy([np.inf] * 3, max_exit=1)], outputs


def expected(policy: ExitPolicy, outputs, index) -> list[int]:
    sure = torch.stack([confidence(z[index], policy.measure) for z in outputs]).numpy()
    return policy.choose(sure).tolist()


@pytest.mark.parametrize("count", [1, 40])
def test_policy_swapped_in_mid_run_holds_from_the_next_call_on(case, count):
    model, images, (old, _, new, *_), outputs = case
    adaptive = AdaptiveModel(model, old)
    inner = adaptive.runner.forward_exit
    seen = set()

    class Swapping(torch.nn.Module):
        begin_exits, num_exits = model.begin_exits, 3

        def forward_exit(self, index, state):
            answer = inner(index, state)
            seen.add(index)
            adaptive.policy = new
            return answer

    # What runs the segments (torch, compiled, exported) does not choose the policy: one loop is behind all of them.
    adaptive.__dict__["runner"] = Swapping()
    for start in range(0, len(images), count):
        index = torch.arange(start, min(start + count, len(images)))
        adaptive.policy = old
        assert adaptive(images[index]).exit_index.tolist() == expected(old, outputs, index)
        assert adaptive.policy is new
    assert seen == {0, 1, 2}


COMPILED: list[int] = []


def counting(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    COMPILED.append(len(inputs))
    return graph.forward


def runs(kind: str, model, policy: ExitPolicy, folder: Path) -> AdaptiveModel:
    """The model in torch, compiled (captured graphs, no code generation) or exported."""
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        return export_segments(model, policy, folder / "export", (3, 16, 16))
    if kind == "torch":
        return AdaptiveModel(model, policy)
    torch._dynamo.reset()
    COMPILED.clear()
    with patch.object(torch, "compile", partial(torch.compile, backend=counting)):
        return AdaptiveModel(model, policy, compile=True)


@pytest.mark.parametrize("kind", ["torch", "compiled", "onnx"])
def test_threads_that_swap_policies_get_the_answers_of_one(case, kind, tmp_path):
    model, images, policies, outputs = case
    adaptive, stop, faults, calls = runs(kind, model, policies[0], tmp_path), threading.Event(), [], []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            index = torch.as_tensor(rng.integers(0, len(images), int(rng.choice([1, 2, 5, 17]))))
            found = adaptive(images[index]).exit_index.tolist()
            calls.append(1)
            if found not in [expected(policy, outputs, index) for policy in policies]:
                faults.append(found)

    def swap() -> None:
        rng = np.random.default_rng(99)
        while not stop.wait(1e-4):  # a loop without a pause would keep the others from running
            adaptive.policy = policies[rng.integers(len(policies))]

    swapper, workers = threading.Thread(target=swap), [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in (swapper, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    swapper.join()
    assert len(calls) == 320 and not faults
    if kind == "compiled":
        # Cold threads do not compile side by side: three segments, each for single samples, for batches, and at most
        # once more for a range of batch sizes.
        assert 3 <= len(COMPILED) <= 9
