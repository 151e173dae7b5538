import numpy as np
import pytest
import torch
from small_models import ConvExits, NestedExits

from exit_plugins import exit_costs, exit_latency


def test_macs_and_parameters_equal_the_count_by_hand():
    costs = exit_costs(ConvExits(num_classes=5), (3, 16, 16))
    macs, params, total_macs, total_params = [], [], 0, 0
    side = 16
    for a, b in ((3, 8), (8, 12), (12, 16)):
        side //= 2
        total_macs += side * side * b * a * 9 + b * 5  # convolution and head
        total_params += a * b * 9 + b + 2 * b + b * 5 + 5  # with biases and the norm's two
        macs.append(total_macs)
        params.append(total_params)
    assert costs.macs.tolist() == macs
    assert costs.params.tolist() == params


def test_last_exit_reads_every_parameter_and_the_model_is_untouched():
    model = NestedExits().train()
    before = {name: (tensor.clone(), tensor.device) for name, tensor in model.state_dict().items()}
    costs = exit_costs(model, (3, 16, 16))
    assert costs.params[-1] == sum(p.numel() for p in model.parameters())
    assert (np.diff(costs.macs) > 0).all() and (np.diff(costs.params) > 0).all()
    assert model.training
    for name, tensor in model.state_dict().items():
        assert tensor.device == before[name][1] and torch.equal(tensor, before[name][0])


def test_latency_is_cumulative_and_leaves_the_mode_alone():
    model = ConvExits().train()
    seconds = exit_latency(model, torch.randn(2, 3, 16, 16), repeats=3, warmup=1)
    assert seconds.shape == (3,) and (seconds > 0).all() and (np.diff(seconds) >= 0).all()
    assert model.training


def test_sizes_and_repeats_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"input_size is \(channels, height, width\)"):
        exit_costs(ConvExits(), (16, 16))
    with pytest.raises(ValueError, match="repeats >= 1"):
        exit_latency(ConvExits(), torch.zeros(1, 3, 16, 16), repeats=0)
    with pytest.raises(TypeError, match="not a multi-exit model"):
        exit_costs(torch.nn.Linear(2, 2))
