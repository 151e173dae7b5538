"""Two multi-exit models small enough to be run thousands of times, with states of different shapes."""

import torch
from torch import Tensor, nn

from exit_plugins.exits import MultiExit


class ConvExits(MultiExit, nn.Module):
    """Three convolutional segments; the state is one tensor."""

    num_exits = 3

    def __init__(self, num_classes: int = 5, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        widths = (in_chans, 8, 12, 16)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in zip(widths, widths[1:], strict=False)
        )
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for width in widths[1:])

    def begin_exits(self, x: Tensor) -> Tensor:
        return x

    def forward_exit(self, index: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.stages[index](state)
        return self.heads[index](state.mean((2, 3))), state


class NestedExits(MultiExit, nn.Module):
    """Four segments of a map and of tokens; the state is a dict in a dict with a tuple in it that grows."""

    num_exits = 4

    def __init__(self, num_classes: int = 5, in_chans: int = 3, width: int = 8) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(in_chans, width, 4, 4)
        self.latent = nn.Parameter(torch.randn(1, 6, width))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.heads = nn.ModuleList(nn.Linear(width + i * num_classes, num_classes) for i in range(4))

    def begin_exits(self, x: Tensor) -> dict:
        return {"map": self.stem(x), "branch": {"tokens": self.latent.expand(x.shape[0], -1, -1), "said": ()}}

    def forward_exit(self, index: int, state: dict) -> tuple[Tensor, dict]:
        x = state["map"] + self.convs[index](state["map"]).relu()
        tokens, said = state["branch"]["tokens"], state["branch"]["said"]
        keys = x.flatten(2).transpose(1, 2)
        query = self.norms[index](tokens)
        tokens = tokens + (query @ keys.transpose(1, 2)).softmax(-1) @ keys
        logits = self.heads[index](torch.cat((tokens.mean(1), *said), 1))
        return logits, {"map": x, "branch": {"tokens": tokens, "said": (*said, logits)}}


class CountedRows:
    """Counts the samples each segment of a model runs on, while it is open."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rows = [0] * model.num_exits

    def __enter__(self) -> "CountedRows":
        inner = self.model.forward_exit

        def counted(index: int, state):
            logits, state = inner(index, state)
            self.rows[index] += len(logits)
            return logits, state

        self.model.forward_exit = counted
        return self

    def __exit__(self, *_) -> None:
        del self.model.forward_exit


def settle(model: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """Move every weight and statistic off its initial value, so that exits disagree and samples differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum, kept = None, module.momentum  # a plain average: one batch sets the statistics
                module.reset_running_stats()
                module._kept = kept
        model.train()(images)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = module.__dict__.pop("_kept")
    return model.eval()
