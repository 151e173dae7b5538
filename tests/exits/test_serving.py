"""RequestQueue: every request gets the answer it would get alone, whatever it was batched with."""

import threading
import time
from concurrent.futures import CancelledError, wait
from queue import Full

import pytest
import torch
from small_models import ConvExits, CountedRows, NestedExits, settle
from torch import nn

import exit_plugins
from exit_plugins import AdaptiveModel, ExitPolicy
from exit_plugins.exits.serving import RequestQueue

WAIT = 30  # seconds until a test gives up


def some_leave(kind: type[nn.Module], count: int = 24) -> tuple[nn.Module, ExitPolicy, torch.Tensor]:
    """A model, a policy under which samples leave everywhere, and samples."""
    torch.manual_seed(0)
    images = torch.randn(count, 3, 32, 32) * torch.rand(count, 1, 1, 1) * 3
    model = settle(kind(), images)
    with torch.no_grad():
        sure = torch.stack([logits.softmax(1).amax(1) for logits in model.forward_exits(images)])
    ordered = sure.sort(1).values
    policy = ExitPolicy([float(row[count // 2] + row[count // 2 + 1]) / 2 for row in ordered])
    return model, policy, images


class Gate(nn.Module):
    """A model whose segment ``index`` waits until it is let through. ``entered``: it waits; ``order``: what ran."""

    def __init__(self, model: nn.Module, index: int) -> None:
        super().__init__()
        self.inner, self.index, self.num_exits = model, index, model.num_exits
        self.entered, self.open = threading.Event(), threading.Event()
        self.order: list[int] = []

    def begin_exits(self, x):
        return self.inner.begin_exits(x)

    def forward_exit(self, index, state):
        self.order.append(index)
        if index == self.index:
            self.entered.set()
            assert self.open.wait(WAIT)
        return self.inner.forward_exit(index, state)


@pytest.mark.parametrize("kind", [ConvExits, NestedExits])
@pytest.mark.parametrize("batch_size", [1, 5, 8])
def test_answers_are_those_of_single_runs(kind, batch_size):
    model, policy, images = some_leave(kind)
    adaptive = AdaptiveModel(model, policy)
    with RequestQueue(adaptive, batch_size=batch_size) as requests, CountedRows(adaptive.runner) as counted:
        futures = [requests.submit(image) for image in images]
        answers = [future.result(WAIT) for future in futures]
        statistics = requests.statistics
    alone = [adaptive(image[None]) for image in images]
    exits = torch.cat([out.exit_index for out in alone])
    assert len(exits.unique()) > 1
    assert torch.equal(torch.stack([out.exit_index for out in answers]), exits)
    torch.testing.assert_close(torch.stack([out.logits for out in answers]), torch.cat([o.logits for o in alone]))
    torch.testing.assert_close(
        torch.stack([out.confidence for out in answers]), torch.cat([out.confidence for out in alone])
    )
    # Nothing deeper runs for a sample that has left, and nothing twice.
    assert counted.rows == [int((exits >= k).sum()) for k in range(model.num_exits)] == list(statistics.samples)
    assert statistics.answered == len(images) and statistics.overdue == statistics.failed == 0
    assert len(requests) == 0


def test_survivors_of_two_full_batches_go_on_as_one():
    model, policy, images = some_leave(ConvExits)
    gate = Gate(model, 0)
    adaptive = AdaptiveModel(gate, ExitPolicy([policy.thresholds[0], float("inf"), float("inf")]))
    leaves = AdaptiveModel(model, adaptive.policy)(images).exit_index == 0
    sure, unsure = images[leaves], images[~leaves]
    with RequestQueue(adaptive, batch_size=4, max_wait=WAIT) as requests:
        first = requests.submit(sure[0])
        assert gate.entered.wait(WAIT)
        rest = [requests.submit(image) for two in (1, 3) for half in (sure, unsure) for image in half[two : two + 2]]
        gate.open.set()
        wait([first, *rest], WAIT)
        statistics = requests.statistics
    # One alone and two full batches; of each of these two samples go on, together.
    assert statistics.samples == (9, 4, 4) and statistics.batches == (3, 1, 1)


@pytest.mark.parametrize(("max_wait", "order"), [(WAIT, [0, 0, 1, 2, 1, 2]), (0.0, [0, 1, 2, 0, 1, 2])])
def test_full_batches_go_first_unless_somebody_has_waited_too_long(max_wait, order):
    model, _, images = some_leave(ConvExits)
    gate = Gate(model, 0)
    with RequestQueue(AdaptiveModel(gate, ExitPolicy([float("inf")] * 3)), batch_size=4, max_wait=max_wait) as requests:
        first = requests.submit(images[0])
        assert gate.entered.wait(WAIT)
        rest = [requests.submit(image) for image in images[1:5]]
        gate.open.set()
        wait([first, *rest], WAIT)
    assert gate.order == order


def test_overdue_requests_leave_with_the_deepest_answer_there_is():
    model, _, images = some_leave(ConvExits)
    gate = Gate(model, 1)
    adaptive = AdaptiveModel(gate, ExitPolicy([float("inf")] * 3))
    with RequestQueue(adaptive, batch_size=1) as requests:
        patient = requests.submit(images[0])
        assert gate.entered.wait(WAIT)
        # It is queued behind the one that waits in segment 1, and its deadline passes there.
        hasty = requests.submit(images[1], deadline=0.01)
        time.sleep(0.02)
        gate.open.set()
        assert hasty.result(WAIT).exit_index == 0 and patient.result(WAIT).exit_index == 2
        assert requests.statistics.overdue == 1
    expected = AdaptiveModel(model, ExitPolicy([-1.0] * 3))(images[1:2])
    torch.testing.assert_close(hasty.result().logits, expected.logits[0])


def test_a_deadline_far_off_changes_nothing():
    model, policy, images = some_leave(NestedExits)
    adaptive = AdaptiveModel(model, policy)
    with RequestQueue(adaptive) as requests:
        futures = [requests.submit(image, deadline=WAIT) for image in images]
        exits = torch.stack([future.result(WAIT).exit_index for future in futures])
    assert torch.equal(exits, torch.cat([adaptive(image[None]).exit_index for image in images]))


def test_a_full_queue_refuses_and_a_patient_submit_gets_the_next_place():
    model, _, images = some_leave(ConvExits)
    gate = Gate(model, 0)
    with RequestQueue(AdaptiveModel(gate, ExitPolicy([-1.0] * 3)), batch_size=1, capacity=2) as requests:
        first, second = requests.submit(images[0]), requests.submit(images[1])
        with pytest.raises(Full, match="2 requests"):
            requests.submit(images[2])
        threading.Timer(0.05, gate.open.set).start()
        third = requests.submit(images[2], timeout=WAIT)
        assert [future.result(WAIT).exit_index for future in (first, second, third)] == [0, 0, 0]


def test_an_error_reaches_the_request_it_belongs_to_and_no_other():
    model, policy, images = some_leave(ConvExits)

    class Breaks(Gate):
        def forward_exit(self, index, state):
            logits, after = super().forward_exit(index, state)
            if index == 1 and float(state.amax()) > 1e6:
                raise ArithmeticError("too bright")
            return logits, after

    broken = Breaks(model, 0)
    images[3] *= 1e9
    adaptive = AdaptiveModel(broken, ExitPolicy([float("inf")] * 3))
    with RequestQueue(adaptive, batch_size=8) as requests:
        futures = [requests.submit(image) for image in images[:8]]
        broken.open.set()
        with pytest.raises(ArithmeticError, match="too bright"):
            futures[3].result(WAIT)
        others = [future.result(WAIT) for k, future in enumerate(futures) if k != 3]
        assert [int(out.exit_index) for out in others] == [2] * 7
        assert requests.statistics.failed == 1 and requests.statistics.answered == 7
        assert requests.submit(images[0]).result(WAIT).exit_index == 2  # and the queue lives on


def test_requests_run_under_the_policy_they_came_with():
    model, _, images = some_leave(ConvExits)
    gate = Gate(model, 0)
    adaptive = AdaptiveModel(gate, ExitPolicy([-1.0] * 3))
    with RequestQueue(adaptive) as requests:
        blocking = requests.submit(images[0])
        assert gate.entered.wait(WAIT)
        before = requests.submit(images[1])
        adaptive.policy = ExitPolicy([float("inf")] * 3)
        after = requests.submit(images[2])
        gate.open.set()
        assert [int(f.result(WAIT).exit_index) for f in (blocking, before, after)] == [0, 0, 2]


def test_sizes_are_batched_apart():
    model, policy, images = some_leave(ConvExits)
    sizes = [image if k % 2 else image[:, :24, :28] for k, image in enumerate(images)]
    adaptive = AdaptiveModel(model, policy)
    with RequestQueue(adaptive) as requests:
        futures = [requests.submit(image) for image in sizes]
        for image, future in zip(sizes, futures, strict=True):
            torch.testing.assert_close(future.result(WAIT).logits, adaptive(image[None]).logits[0])


def test_closing_finishes_what_is_inside_or_cancels_it():
    model, _, images = some_leave(ConvExits)
    nobody = ExitPolicy([float("inf")] * 3)
    requests = RequestQueue(AdaptiveModel(model, nobody))
    futures = [requests.submit(image) for image in images]
    requests.close()
    assert all(future.done() and future.result().exit_index == 2 for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        requests.submit(images[0])
    requests.close()  # twice does no harm

    gate = Gate(model, 1)
    requests = RequestQueue(AdaptiveModel(gate, nobody), batch_size=1)
    futures = [requests.submit(image) for image in images[:3]]
    assert gate.entered.wait(WAIT)
    threading.Timer(0.05, gate.open.set).start()
    requests.close(cancel=True)
    for future in futures[1:]:
        with pytest.raises(CancelledError):
            future.result(WAIT)
    assert not wait(futures, WAIT).not_done and len(requests) == 0


def test_a_cancelled_request_leaves_and_makes_room():
    model, _, images = some_leave(ConvExits)
    gate = Gate(model, 0)
    with RequestQueue(AdaptiveModel(gate, ExitPolicy([-1.0] * 3)), batch_size=1) as requests:
        first = requests.submit(images[0])
        assert gate.entered.wait(WAIT)
        second = requests.submit(images[1])
        assert second.cancel()
        gate.open.set()
        assert first.result(WAIT).exit_index == 0
    assert requests.statistics.answered == 1 and len(requests) == 0


def test_many_threads_share_a_queue():
    model, policy, images = some_leave(NestedExits)
    adaptive = AdaptiveModel(model, policy)
    expected = [int(adaptive(image[None]).exit_index) for image in images]
    found: list[list[int]] = []
    with RequestQueue(adaptive, capacity=16) as requests:

        def ask() -> None:
            futures = [requests.submit(image, timeout=WAIT) for image in images]
            found.append([int(future.result(WAIT).exit_index) for future in futures])

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
    assert found == [expected] * 6


def test_what_is_no_sample_is_refused_at_once():
    model, policy, images = some_leave(ConvExits)
    with pytest.raises(TypeError, match="AdaptiveModel"):
        RequestQueue(model)
    with pytest.raises(ValueError, match="batch_size"):
        RequestQueue(AdaptiveModel(model, policy), batch_size=0)
    with exit_plugins.RequestQueue(AdaptiveModel(model, policy)) as requests:
        for wrong, message in [(images, "one sample"), (images[0].to(torch.uint8), "floating point")]:
            with pytest.raises(ValueError, match=message):
                requests.submit(wrong)
        with pytest.raises(ValueError, match="deadline"):
            requests.submit(images[0], deadline=0)
        with pytest.raises(RuntimeError):  # four channels: the model's own words
            requests.submit(torch.randn(4, 32, 32)).result(WAIT)
