"""The service under load, and what it answers to clients that misuse it.

Starts ``lexiseg serve`` with the packaged ZegCLIP and lets clients ask at once, each again as soon as it was answered,
or after the seconds that a 503 says. The service states a queue: a picture waits for at most so many others, for the
batch that runs and for its own. So "others" counts the pictures that were answered while one waited, which does not
depend on what else the machine does: its p99 must stay below queue + 2 batches. Memory is that of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.measure import parser, report
from lexiseg.samples import sample_path

QUEUE, BATCH, SECONDS = 32, 8, 60
CLASSES = "giraffe; elephant; butterfly; tree; leaves, bush; grass"
JSON = {"Content-Type": "application/json"}


def body(image: bytes, classes: str = CLASSES) -> bytes:
    """A request as JSON."""
    return json.dumps({"image": base64.b64encode(image).decode(), "classes": classes}).encode()


def head(length: int) -> bytes:
    """The head of a request whose body is so long."""
    line = "POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{line}Content-Length: {length}\r\n\r\n".encode()


def memory(process: int) -> float:
    """Resident MiB of a process."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


async def ask(
    client: httpx.AsyncClient, data: bytes, until: float, waits: list[tuple[float, int]], codes: Counter[Any]
) -> None:
    """One client: ask until the time is over."""
    while time.monotonic() < until:
        start, before = time.monotonic(), codes[200]
        try:
            reply = await client.post("/v1/segment", content=data, headers=JSON)
        except httpx.HTTPError as error:
            codes[type(error).__name__] += 1
            continue
        codes[reply.status_code] += 1
        if reply.status_code == 200:
            waits.append((time.monotonic() - start, codes[200] - before))
        elif reply.status_code == 503:
            await asyncio.sleep(float(reply.headers["Retry-After"]))


async def first_line(port: int, data: bytes) -> str:
    """Send bytes and no more; the status of what is answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    line = (await reader.readline()).decode()
    writer.close()
    return " ".join(line.split()[1:2])


async def hang_up(port: int, data: bytes) -> None:
    """Send a whole request and leave."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head(len(data)) + data)
    await writer.drain()
    await asyncio.sleep(0.2)
    writer.close()


async def run(port: int, process: int, options: argparse.Namespace) -> dict[str, Any]:
    """The load, with misuse meanwhile and after it."""
    data = body(sample_path("demo").read_bytes())
    limits = httpx.Limits(max_connections=None)
    codes: Counter[Any] = Counter()
    waits: list[tuple[float, int]] = []
    sizes: list[float] = []
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=2 * SECONDS, limits=limits) as client:
        until = time.monotonic() + options.seconds
        slow = asyncio.create_task(first_line(port, head(1000) + b"{"))
        clients = [asyncio.create_task(ask(client, data, until, waits, codes)) for _ in range(options.clients)]
        while time.monotonic() < until:
            await asyncio.sleep(options.seconds / 20)
            sizes.append(memory(process))
            await hang_up(port, data)
        await asyncio.gather(*clients)
        bomb = io.BytesIO()
        Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
        many = "; ".join(f"class {index}" for index in range(10_000))
        misuse = {
            "slow upload": await slow,
            "300 MB upload": await first_line(port, head(300 * 2**20) + b"{"),
            "picture bomb": (await client.post("/v1/segment", content=body(bomb.getvalue()), headers=JSON)).status_code,
            "10,000 classes": (await client.post("/v1/segment", content=body(b"", many), headers=JSON)).status_code,
        }
        metrics = (await client.get("/metrics")).text
        left = re.search(r'lexiseg_requests_total\{path="/v1/segment",status="499"\} (\d+)', metrics)
        misuse["clients seen to leave (of 20)"] = left[1] if left else "0"
    rate = len(waits) / options.seconds
    p50, p99 = np.percentile(waits, (50, 99), axis=0)
    return {
        "pictures a second": rate, "p50 s": float(p50[0]), "p99 s": float(p99[0]),
        "p99 others": float(p99[1]),
        "answers": {str(code): count for code, count in sorted(codes.items(), key=str)},
        "MiB": [round(sizes[len(sizes) // 5]), round(max(sizes)), round(sizes[-1])], "misuse": misuse,
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--clients", type=int, default=50, help="clients that ask at once")
    arguments.add_argument("--seconds", type=float, default=120, help="how long")
    options = arguments.parse_args()
    limits = {"queue": QUEUE, "batch": BATCH, "seconds": SECONDS}
    words = [word for name, value in limits.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "lexiseg", "serve", "--model", "zegclip-emoji", "--port", "0", "--device", "cpu"]
    with subprocess.Popen([*command, *words], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = next(line for line in server.stdout if "http://" in line)
            port = int(re.search(r":(\d+)/", line)[1])  # type: ignore[index]
            found = asyncio.run(run(port, server.pid, options))
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(30)
    misuse, answers, sizes = found.pop("misuse"), found.pop("answers"), found.pop("MiB")
    fine = set(answers) <= {"200", "503"} and found["p99 others"] <= QUEUE + 2 * BATCH
    report(
        "The service under load", [found], options, limits=limits, clients=options.clients,
        answers=answers, misuse=misuse, memory=f"{sizes[0]} MiB after a fifth of the time, {sizes[1]} at most, "
        f"{sizes[2]} at the end", stopped=f"exit code {server.returncode} after SIGTERM",
        verdict=f"no error but 503 and p99 of the others at most {QUEUE + 2 * BATCH}: {'yes' if fine else 'no'}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
