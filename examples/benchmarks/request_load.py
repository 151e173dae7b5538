"""Images per second that single requests get at a given p95: a queue per segment beside plain batching.

    python examples/benchmarks/request_load.py --threads 2 --json request_load.json

Requests arrive as a Poisson process, at rates that are shares of what full batches manage. Plain batching takes what
has arrived, up to the batch size, and runs it to its end before it looks again; ``RequestQueue`` batches those that go
on with those of later batches. Both run the same AdaptiveModel on the same images under a forced even mix (see
adaptive.py), turn by turn at every rate. What is compared is the highest rate at which the p95 of the time to an answer
stays within ``--p95`` times that of a full batch run alone.
"""

import argparse
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import numpy as np
import timm
import torch
from adaptive import MIXES, forced_policy
from modes import to_exit
from timing import add_clock_arguments, interleaved, machine, use_clock, write_json
from torch import Tensor

from exit_plugins import AdaptiveModel, RequestQueue, collect_exits
from exit_plugins.exits.openmp import release_idle_workers


class PlainBatching:
    """Batches of what has arrived, each run to its end."""

    def __init__(self, model: AdaptiveModel, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.waiting: list[tuple[Tensor, Future]] = []
        self.changed, self.closing = threading.Condition(), False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, image: Tensor) -> Future:
        release_idle_workers()  # as RequestQueue does
        future: Future = Future()
        with self.changed:
            self.waiting.append((image, future))
            self.changed.notify_all()
        return future

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closing)
                batch, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
            if not batch:
                return
            out = self.model(torch.stack([image for image, _ in batch]))
            for row, (_, future) in enumerate(batch):
                future.set_result(out.exit_index[row])

    def __enter__(self) -> "PlainBatching":
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.thread.join()


def load(submit: Callable[[Tensor], Future], images: Tensor, gaps: np.ndarray) -> dict[str, float]:
    """Send a request after each of ``gaps`` seconds; the seconds to an answer and the answers per second."""
    seconds, futures = np.zeros(len(gaps)), []
    due = started = time.perf_counter()

    def noted(index: int, sent: float) -> Callable[[Future], None]:
        def note(_: Future) -> None:
            seconds[index] = time.perf_counter() - sent

        return note

    for index, gap in enumerate(gaps):
        due += gap
        time.sleep(max(0.0, due - time.perf_counter()))
        future = submit(images[index % len(images)])
        future.add_done_callback(noted(index, due))  # from when it was due: a sender that is late does not flatter
        futures.append(future)
    for future in futures:
        future.result()
    p50, p95 = np.percentile(seconds, [50, 95])
    rate = len(gaps) / (time.perf_counter() - started)
    return {"p50_ms": 1e3 * float(p50), "p95_ms": 1e3 * float(p95), "per_second": rate}


@torch.inference_mode()
def ceiling(model: AdaptiveModel, images: Tensor, batch: int, full: float) -> float:
    """How many times as many images full batches in every segment would allow, deciding and moving for nothing."""
    whole = {index: partial(to_exit, model, index, images[:batch]) for index in range(model.model.num_exits)}
    seconds = [float(np.median(times)) for times in interleaved(whole, 7, device=images.device).values()]
    left = torch.bincount(model(images).exit_index, minlength=len(seconds)).numpy() / len(images)
    return full / float(left @ seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dynperceiver_regnety_400mf")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3])
    parser.add_argument("--requests", type=int, default=400, help="of every rate and way")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--p95", type=float, default=3.0, help="times a full batch run alone")
    add_clock_arguments(parser)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.manual_seed(0)
    use_clock(args)
    with torch.inference_mode():  # as a server does: its weights stay
        model = timm.create_model(args.model).eval()
    images = torch.randn(64, *model.pretrained_cfg["input_size"]) * torch.rand(64, 1, 1, 1) * 3
    table = collect_exits(model, [(images, torch.zeros(64, dtype=torch.int64))])
    adaptive = AdaptiveModel(model, forced_policy(table.confidence, MIXES["even"](model.num_exits)))
    ways = {
        "plain batching": lambda: PlainBatching(adaptive, args.batch),
        "a queue per segment": lambda: RequestQueue(adaptive, batch_size=args.batch, capacity=1 << 20),
    }
    alone = []
    for start in range(0, 64 - args.batch + 1, args.batch):
        begun = time.perf_counter()
        adaptive(images[start : start + args.batch])
        alone.append(time.perf_counter() - begun)
    full = float(np.median(alone[1:]))
    most = ceiling(adaptive, images, args.batch, full)
    generator, rows = np.random.default_rng(0), []
    print(f"{args.model}: a full batch of {args.batch} takes {1e3 * full:.1f} ms, {args.batch / full:.1f} images/s")
    print(f"were every batch of every segment full: {most:.2f} times as many at most")
    print(f"{'way':<20} {'rate':>6} {'offered/s':>9} {'answered/s':>10} {'p50 ms':>8} {'p95 ms':>8}")
    for rate in args.rates:
        offered = rate * args.batch / full
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            gaps = generator.exponential(1 / offered, args.requests)
            for name, way in ways.items():
                with way() as queue:
                    found[name].append(load(queue.submit, images, gaps))
        for name, results in found.items():
            row = {key: float(np.median([result[key] for result in results])) for key in results[0]}
            row |= {"way": name, "rate": rate, "offered": offered, "within": row["p95_ms"] <= 1e3 * args.p95 * full}
            rows.append(row)
            print(
                f"{name:<20} {rate:>6.2f} {offered:>9.1f} {row['per_second']:>10.1f} {row['p50_ms']:>8.1f} "
                f"{row['p95_ms']:>8.1f}",
                flush=True,
            )
    best = {name: max((r["offered"] for r in rows if r["way"] == name and r["within"]), default=0.0) for name in ways}
    print(f"images/s with p95 within {args.p95:g} full batches: " + ", ".join(f"{n} {v:.1f}" for n, v in best.items()))
    write_json(
        args.json,
        {
            "command": vars(args),
            "machine": machine(),
            "full_batch_s": full,
            "ceiling": most,
            "rows": rows,
            "best": best,
        },
    )


if __name__ == "__main__":
    main()
