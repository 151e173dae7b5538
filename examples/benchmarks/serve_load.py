"""Load on examples/serve.py over the loopback: images a second, p50 and p95, and whether every request was answered.

    python examples/serve.py msdnet_cifar_batch.cifar100 --port 8000 &
    python examples/benchmarks/serve_load.py --port 8000 --requests 5000 --clients 16 --json load.json

One request in a hundred is broken: no image, half of one, or an empty body; those must be answered by 400.
"""

import argparse
import http.client
import io
import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


class Answer(NamedTuple):
    """``status`` 0: the request was lost."""

    broken: bool
    status: int
    seconds: float
    body: dict


def pictures(number: int = 32, size: int = 32) -> list[bytes]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(number):
        file = io.BytesIO()
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(file, "PNG")
        found.append(file.getvalue())
    return found


def load(
    port: int, requests: int, clients: int, broken_every: int = 100, encode: Callable[[bytes], bytes] = bytes
) -> tuple[list[Answer], float]:
    """Every answer, and the seconds all took; each client sends one request after the other.

    One in ``broken_every`` requests is broken (0: none); ``encode`` makes the body of a picture.
    """
    good = list(map(encode, pictures()))
    broken = [b"this is no image", good[0][: len(good[0]) // 2], b""]
    numbers = count()

    def client(_: int) -> list[Answer]:
        answers = []
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while (number := next(numbers)) < requests:
            is_broken = broken_every > 0 and number % broken_every == broken_every - 1
            body = broken[number // broken_every % 3] if is_broken else good[number % len(good)]
            start = time.perf_counter()
            try:
                connection.request(
                    "POST", "/predict", body, {"Content-Type": "application/json"} if encode is not bytes else {}
                )
                response = connection.getresponse()
                said, status = json.loads(response.read()), response.status
            except (OSError, http.client.HTTPException, ValueError):
                said, status = {}, 0
                connection.close()
            answers.append(Answer(is_broken, status, time.perf_counter() - start, said))
        connection.close()
        return answers

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for some in pool.map(client, range(clients)) for answer in some]
    return answers, time.perf_counter() - start


def summary(answers: list[Answer], seconds: float) -> dict:
    took = np.array([answer.seconds for answer in answers if answer.status == 200])
    return {
        "requests": len(answers),
        "lost": sum(answer.status == 0 for answer in answers),
        "wrong": sum(answer.status != (400 if answer.broken else 200) for answer in answers if answer.status),
        "statuses": {str(status): number for status, number in sorted(Counter(a.status for a in answers).items())},
        "exits": dict(sorted(Counter(a.body["exit"] for a in answers if a.status == 200).items())),
        "images_per_second": len(took) / seconds,
        "p50_ms": 1000 * float(np.percentile(took, 50)),
        "p95_ms": 1000 * float(np.percentile(took, 95)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--json", help="write the figures here as well")
    args = parser.parse_args()
    figures = summary(*load(args.port, args.requests, args.clients))
    print(json.dumps(figures, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
