"""What is to happen as training goes on, led by the one thing that timm's loops tell of it: the scheduler's updates."""

from collections.abc import Callable
from typing import Any

__all__ = ["follow_updates"]


def follow_updates(scheduler: Any, updates_per_epoch: int, tell: Callable[[int], None]) -> None:
    """Have ``tell`` called with the number of updates done: with 0 at once, then whenever timm's ``scheduler`` learns.

    timm's loops call ``step_update`` after every update and ``step`` after every epoch, whether or not the schedule
    reacts to it, and one of the two before the first update of a resumed run.
    """
    step, step_update = scheduler.step, scheduler.step_update

    def after_epochs(epoch: int, *args: Any, **kwargs: Any) -> Any:
        tell(epoch * updates_per_epoch)
        return step(epoch, *args, **kwargs)

    def after_updates(num_updates: int, *args: Any, **kwargs: Any) -> Any:
        tell(num_updates)
        return step_update(num_updates, *args, **kwargs)

    scheduler.step, scheduler.step_update = after_epochs, after_updates
    tell(0)
