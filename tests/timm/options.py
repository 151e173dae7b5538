"""What holds of a model under every one of its options."""

from functools import partial
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn
from torch.export import Dim

from exit_plugins import MultiExitLoss
from exit_plugins.exits.compiled import CompiledSegments
from exit_plugins.exits.protocol import select_samples


class _AllExits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.model.forward_exits(x)


def check_option(name: str, options: dict) -> nn.Module:
    """Two training steps reach every parameter, and samples may leave at any exit; returns the model."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).train()
    x, target = torch.randn(4, *model.pretrained_cfg["input_size"]), torch.tensor([3, 1, 4, 1])
    loss, optimizer = MultiExitLoss(model.num_exits), torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        value = loss(model(x), target)
        value.backward()
        optimizer.step()
        assert value.isfinite()
        assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]

    model.eval()
    with torch.no_grad():
        expected = model.forward_exits(x)
        torch.testing.assert_close(model(x), expected[-1])
        state, rows = model.begin_exits(x), torch.arange(4)
        for index, logits in enumerate(expected):
            mine, state = model.forward_exit(index, state)
            torch.testing.assert_close(mine, logits[rows], rtol=1e-4, atol=1e-5)
            if index < model.num_exits - 1 and len(rows) > 1:
                state, rows = select_samples(state, torch.arange(1, len(rows))), rows[1:]
    return model


def check_compiled(model: nn.Module) -> None:
    """Segments compile and all exits export, with the same answers.

    Code generation is left out: torch.compile captures and guards, and runs the captured graph as it is.
    """
    x = torch.randn(4, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        expected = model.forward_exits(x)
        torch._dynamo.reset()
        with patch.object(torch, "compile", partial(torch.compile, backend="eager")):
            compiled = CompiledSegments(model)
        torch.testing.assert_close(compiled.forward_exits(x), expected, rtol=1e-4, atol=1e-5)
        program = torch.export.export(_AllExits(model), (x,), dynamic_shapes=({0: Dim("batch")},))
        torch.testing.assert_close(program.module()(x[:3]), tuple(e[:3] for e in expected), rtol=1e-4, atol=1e-5)
