import pytest
import torch
from small_models import ConvExits, NestedExits
from torch import nn

from exit_plugins.exits.protocol import MultiExit, batch_size, check_multi_exit, exit_device, select_samples

MODELS = [ConvExits, NestedExits]


@pytest.mark.parametrize("kind", MODELS)
def test_training_gives_every_exit_and_evaluation_the_last(kind):
    model, images = kind(), torch.randn(4, 3, 16, 16)
    assert [tuple(z.shape) for z in model.train()(images)] == [(4, 5)] * model.num_exits
    model.eval()
    torch.testing.assert_close(model(images), model.forward_exits(images)[-1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_any_samples_can_go_on_from_any_exit(kind):
    model, images = kind().eval(), torch.randn(6, 3, 16, 16)
    expected = model.forward_exits(images)
    chosen = torch.tensor([4, 1])
    for cut in range(model.num_exits - 1):
        state = model.begin_exits(images)
        for index in range(cut + 1):
            _, state = model.forward_exit(index, state)
        assert batch_size(state) == 6
        state = select_samples(state, chosen)
        for index in range(cut + 1, model.num_exits):
            logits, state = model.forward_exit(index, state)
            torch.testing.assert_close(logits, expected[index][chosen], rtol=1e-5, atol=1e-6)


def test_module_that_is_no_multi_exit_model_is_told_what_it_lacks():
    with pytest.raises(TypeError, match="Linear is not .*: it has no num_exits, begin_exits, forward_exit"):
        check_multi_exit(nn.Linear(1, 1))
    model = ConvExits()
    model.num_exits = 0
    with pytest.raises(TypeError, match="num_exits is 0"):
        check_multi_exit(model)


def test_mixin_alone_says_what_to_define():
    class Half(MultiExit, nn.Module):
        num_exits = 1

    with pytest.raises(NotImplementedError, match=r"Half must define begin_exits\(x\) -> state"):
        Half()(torch.zeros(1))


def test_any_module_with_the_three_members_is_one():
    class Duck(nn.Module):
        num_exits = 1

        def begin_exits(self, x):
            return x

        def forward_exit(self, index, state):
            return state, state

    duck = Duck()
    assert check_multi_exit(duck) is duck
    assert exit_device(duck) == torch.device("cpu")


def test_state_whose_leaves_disagree_is_refused():
    with pytest.raises(ValueError, match=r"leading sizes \[2, 3\]"):
        batch_size({"a": torch.zeros(2, 1), "b": (torch.zeros(3, 1),)})
