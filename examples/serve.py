"""A server of one early-exit model: POST an image, get its label, confidence, exit and milliseconds as JSON.

    python examples/serve.py msdnet_cifar_batch.cifar100 --port 8000
    curl --data-binary @flower.jpg localhost:8000/predict
    curl localhost:8000/metrics          # for Prometheus

The source is what BatchPredictor takes: an export, a policy file (with --checkpoint), a card, or a shipped network.
Those that do not leave at an exit are batched anew before the next (exits.serving.RequestQueue). With --table and
--budget the thresholds follow a mean cost while images drift. Answers: 200; 400 for what is no image; 408, 411 and 413
for uploads that are slow, of unknown length or too large; 503 when --capacity requests are inside. SIGTERM ends the
server after the requests it has. Needs the extra ``serve``.
"""

import argparse
import asyncio
import contextlib
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from queue import Full

import numpy as np
import torch
import uvicorn
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from exit_plugins import ExitOutput, ExitTable
from exit_plugins.exits.control import BudgetController
from exit_plugins.exits.serving import RequestQueue
from exit_plugins.exits.thresholds import policy_path
from exit_plugins.timm.images import UnreadableImage
from exit_plugins.timm.predictor import BatchPredictor, Predictor


class Refused(Exception):
    """A request that is answered by a status and a reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Metrics:
    """What /metrics tells."""

    def __init__(self, num_exits: int) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("exit_plugins_requests", "Requests by status", ["status"], registry=self.registry)
        self.exits = Counter("exit_plugins_exits", "Images that left here", ["exit"], registry=self.registry)
        for number in range(1, num_exits + 1):
            self.exits.labels(str(number))
        steps = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
        self.seconds = Histogram(
            "exit_plugins_seconds", "From the whole upload to the answer", registry=self.registry, buckets=steps
        )
        self.inside = Gauge("exit_plugins_inside", "Requests inside", registry=self.registry)
        self.cost = Gauge("exit_plugins_mean_cost", "Mean MACs an image", registry=self.registry)
        self.budget = Gauge("exit_plugins_budget", "MACs an image the controller holds", registry=self.registry)


class Service:
    """The model, its queue, and what is counted; ``inside`` requests at most ``capacity``."""

    def __init__(self, predictor: Predictor, args: argparse.Namespace) -> None:
        self.predictor, self.args, self.inside = predictor, args, 0
        self.queue = RequestQueue(predictor.adaptive, batch_size=args.batch_size, capacity=args.capacity)
        # Each on one thread: OpenMP's for all of them would slow down the queue's.
        self.readers = ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))
        self.metrics = Metrics(predictor.policy.num_exits)
        self.controller: BudgetController | None = None
        self.answered = self.spent = 0
        if args.budget is not None:
            if args.table is None or predictor.macs is None:
                raise SystemExit("--budget needs --table with a calibration table, and a model whose MACs are known.")
            path = policy_path(ExitTable.load(args.table), predictor.macs)
            self.controller = BudgetController(path, args.budget)
            predictor.adaptive.policy = self.controller.policy
            self.metrics.budget.set(args.budget)

    async def body(self, request: Request) -> bytes:
        """The upload, never more than ``max_bytes`` of it."""
        most = self.args.max_bytes
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            raise Refused(411, "say how long the image is (Content-Length)")
        if int(length) > most:
            raise Refused(413, f"an image may have {most} bytes")

        async def whole() -> bytes:
            return b"".join([part async for part in request.stream()])  # the server holds it to its length

        try:
            content = await asyncio.wait_for(whole(), self.args.timeout)
        except asyncio.TimeoutError:
            raise Refused(408, f"the image did not come within {self.args.timeout:g} seconds") from None
        if not content:
            raise Refused(400, "send the bytes of an image as the body")
        return content

    async def answer(self, request: Request) -> dict:
        if self.inside >= self.args.capacity:
            raise Refused(503, "too many requests are inside; come again later")
        self.inside += 1
        try:
            content = await self.body(request)
            start = time.perf_counter()
            loop = asyncio.get_running_loop()
            pixels = await loop.run_in_executor(self.readers, self.predictor.read, content, "the upload")
            out = await asyncio.wrap_future(self.queue.submit(pixels.to(self.predictor.device)))
            (row,) = self.predictor.rows(ExitOutput(*(value[None] for value in out)))
            seconds = time.perf_counter() - start
        except UnreadableImage as error:
            raise Refused(400, str(error)) from error
        except Full:
            raise Refused(503, "too many requests are inside; come again later") from None
        finally:
            self.inside -= 1
        self.count(row, seconds)
        return {**row, "milliseconds": round(1000 * seconds, 3)}

    def count(self, row: dict, seconds: float) -> None:
        self.metrics.exits.labels(str(row["exit"])).inc()
        self.metrics.seconds.observe(seconds)
        self.answered += 1
        self.spent += row["macs"] or 0
        if self.controller is not None:
            self.controller.update(np.array([row["exit"] - 1]))
            self.predictor.adaptive.policy = self.controller.policy

    async def predict(self, request: Request) -> Response:
        try:
            response = JSONResponse(await self.answer(request))
        except Refused as refused:
            headers = {"Retry-After": "1"} if refused.status == 503 else {}
            if refused.status != 400:
                headers["Connection"] = "close"  # the rest of the upload is not read
            response = JSONResponse({"error": str(refused)}, refused.status, headers)
        except ClientDisconnect:
            response = Response(status_code=400)
        self.metrics.requests.labels(str(response.status_code)).inc()
        return response

    async def tell(self, _: Request) -> Response:
        self.metrics.inside.set(self.inside)
        self.metrics.cost.set(self.spent / self.answered if self.answered else 0)
        return PlainTextResponse(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    async def health(self, _: Request) -> Response:
        return PlainTextResponse("ok")

    def close(self) -> None:
        self.queue.close()
        self.readers.shutdown()


def app_of(service: Service) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette):
        yield
        service.close()

    routes = [Route("/predict", service.predict, methods=["POST"]), Route("/metrics", service.tell)]
    return Starlette(routes=[*routes, Route("/health", service.health)], lifespan=lifespan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--checkpoint", help="weights for a policy file")
    parser.add_argument("--mode", default="fused")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--capacity", type=int, default=256, help="requests inside at most")
    parser.add_argument("--max-bytes", type=int, default=20_000_000, help="of an upload")
    parser.add_argument("--max-pixels", type=int, default=50_000_000, help="of a decoded image")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds an upload may take")
    parser.add_argument("--table", help="calibration table, for --budget")
    parser.add_argument("--budget", type=float, help="mean MACs an image to hold")
    args = parser.parse_args()
    # Pillow refuses twice as many pixels as it says, from the header alone, and warns of half of that.
    Image.MAX_IMAGE_PIXELS = args.max_pixels // 2
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with torch.inference_mode():  # its weights stay as they are, and no call has to look whether they did
        predictor = BatchPredictor(args.source, args.checkpoint, mode=args.mode)
    service = Service(predictor, args)
    uvicorn.run(app_of(service), host=args.host, port=args.port, log_level="info", access_log=False)


if __name__ == "__main__":
    main()
