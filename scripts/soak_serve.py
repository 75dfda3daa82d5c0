"""Sends a server many requests at once for minutes: good, malformed, disconnecting and slow ones.

    python scripts/soak_serve.py runs/mini/model --pictures runs/mini/data/test [--minutes 20] [--clients 64]

Fails unless every request is answered or refused in OpenAI's form, no status is 5xx, the memory of the server and its
processes stays, all slots are free at the end, and all greedy texts equal those of `Llava.generate`.
"""

import argparse
import asyncio
import collections
import re
import socket
import sys
import time
from pathlib import Path

import numpy as np
from bench_serve import CONTEXT, machine
from serve_load import Connection, Reply, Server, image_part, own_server, pictures, post

import llava_jax

TESTS = Path(__file__).parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "serve")]
from malformed import malformed  # noqa: E402

SHARES = {"malformed": 0.05, "disconnecting": 0.05, "slow": 0.02}
NUM_MALFORMED = 500
MAX_GROWTH = 0.05
"""Largest accepted growth of memory, from the first third of the time to the last."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder of JPEG files; noise by default")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="maximum number of tokens of an answer")
    args = parser.parse_args()
    print(machine())
    files = pictures(args.pictures, 16)
    questions = good_requests(files, args.tokens)
    expected = answers(args.model, questions)
    server = own_server(args.model, "--slots", str(args.slots), "--context", str(CONTEXT), "--receive-seconds", "10")
    try:
        problems = asyncio.run(Soak(server, questions, expected, args).run())
    finally:
        server.stop()
    if errors := re.findall(r"(?s)Traceback.{,2000}", server.output()):
        problems.append(f"{len(errors)} errors in the log, such as {errors[0]}")
    if problems:
        raise SystemExit("\n".join(problems))


def good_requests(files: list[bytes], tokens: int) -> list[dict]:
    """Returns bodies of greedy requests: one image, several turns, two images, text alone."""
    bodies = []
    for i, file in enumerate(files):
        image, other = image_part(file), image_part(files[i - 1])
        text = {"type": "text", "text": "Describe the image in detail."}
        turns = [{"role": "user", "content": [image, {"type": "text", "text": "How many objects are there?"}]},
                 {"role": "assistant", "content": "two"}, {"role": "user", "content": "Where is the circle?"}]
        bodies += [[{"role": "user", "content": [image, text]}], turns,
                   [{"role": "user", "content": f"{i} " * i + "?"}],
                   [{"role": "user", "content": [image, text, other, {"type": "text", "text": "And this?"}]}]]
    return [{"messages": messages, "temperature": 0, "max_tokens": tokens} for messages in bodies]


def answers(folder: Path, bodies: list[dict]) -> list[tuple[str, int]]:
    """Returns text and number of tokens by `Llava.generate`, of one request at a time."""
    from base64 import b64decode

    llava, expected = llava_jax.load(folder), []
    for body in bodies:
        messages, images = [], []
        for message in body["messages"]:
            content = message["content"]
            if not isinstance(content, str):
                images += [b64decode(part["image_url"]["url"].partition(",")[2]) for part in content
                           if part["type"] == "image_url"]
                content = [part if part["type"] == "text" else {"type": "image"} for part in content]
            messages.append({"role": message["role"], "content": content})
        completion = llava.generate(messages, images, max_new_tokens=body["max_tokens"])
        expected.append((completion.text, len(completion.tokens)))
    return expected


class Soak:
    """The clients, what they saw, and the server's memory."""

    def __init__(self, server: Server, questions: list[dict], expected: list, args):
        self.server, self.questions, self.expected, self.args = server, questions, expected, args
        self.wrong = list(malformed(0, NUM_MALFORMED))
        self.rng = np.random.default_rng(0)
        self.counts, self.problems, self.memory = collections.Counter(), [], []

    async def run(self) -> list[str]:
        """Runs all clients and prints what they saw. Returns what is wrong."""
        self.end = time.monotonic() + 60 * self.args.minutes
        sampler = asyncio.create_task(self.sample_memory())
        started, cpu = time.monotonic(), time.process_time()
        await asyncio.gather(*(self.client() for _ in range(self.args.clients)))
        sampler.cancel()
        seconds = time.monotonic() - started
        print(f"{seconds:.0f} s, {sum(self.counts.values())} requests; the client took "
              f"{(time.process_time() - cpu) / seconds:.0%} of a core")
        for name, count in sorted(self.counts.items()):
            print(f"  {name}: {count}")
        self.check_memory()
        await self.check_slots()
        return self.problems[:20]

    async def client(self) -> None:
        connection = None
        while time.monotonic() < self.end:
            if connection is None or connection.lost:
                connection = await Connection.open(self.server.port)
            kind = self.rng.choice([*SHARES, "good"], p=[*SHARES.values(), 1 - sum(SHARES.values())])
            await getattr(self, kind)(connection)
            if kind != "good":
                connection.close()
                connection = None

    def request(self) -> tuple[int, bytes]:
        index = int(self.rng.integers(len(self.questions)))
        options = {"stream": True, "stream_options": {"include_usage": True}} if self.rng.random() < 0.5 else {}
        return index, post(self.server.port, self.questions[index] | {"model": self.server.model} | options)

    async def good(self, connection: Connection) -> None:
        index, request = self.request()
        self.check("good", index, await connection.send(request))

    def check(self, kind: str, index: int, reply: Reply) -> None:
        """Counts an answer, which must equal the expected one."""
        self.counts[f"{kind}: status {reply.status}"] += 1
        if reply.status != 200 or not reply.complete or reply.error:
            self.problems.append(f"{kind}: status {reply.status}, complete {reply.complete}, {reply.error}, "
                                 f"{reply.body[-200:]}")
        elif (reply.text, reply.tokens) != self.expected[index]:
            self.problems.append(f"request {index}: {reply.text!r}, {reply.tokens} instead of {self.expected[index]}")

    async def malformed(self, connection: Connection) -> None:
        case = self.wrong[int(self.rng.integers(len(self.wrong)))]
        reply = await connection.send(case.on_the_wire(), 60)
        self.counts[f"malformed: status {reply.status}"] += 1
        if reply.status not in case.statuses or "message" not in (reply.error or {}):
            self.problems.append(f"{case.name}: status {reply.status}, not {case.statuses}; {reply.body[:200]}")

    async def disconnecting(self, connection: Connection) -> None:
        """Leaves while the request is sent, while it waits, or while its answer is written."""
        _, request = self.request()
        connection.begin()
        sent = len(request) if self.rng.random() < 0.8 else int(self.rng.integers(len(request)))
        connection.transport.write(request[:sent])
        deadline = time.monotonic() + self.rng.exponential(0.3)
        pieces = int(self.rng.integers(8))
        while time.monotonic() < deadline and len(connection.blocks) < pieces and not connection.done.done():
            await asyncio.sleep(0.005)
        self.counts["disconnecting"] += 1

    async def slow(self, connection: Connection) -> None:
        """Sends the request in small parts, or reads the answer slowly."""
        index, request = self.request()
        connection.begin()
        if self.rng.random() < 0.5:
            for part in np.array_split(np.frombuffer(request, np.uint8), 10):
                connection.transport.write(part.tobytes())
                await asyncio.sleep(0.3)
        else:
            connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.transport.write(request)
            for _ in range(10):
                connection.transport.pause_reading()
                await asyncio.sleep(0.3)
                connection.transport.resume_reading()
                await asyncio.sleep(0)
        self.check("slow", index, await connection.receive())

    async def sample_memory(self) -> None:
        while True:
            self.memory.append(sum(map(resident_bytes, processes(self.server.process.pid))))
            await asyncio.sleep(1)

    def check_memory(self) -> None:
        memory, third = np.array(self.memory) / 2**20, len(self.memory) // 3
        first, last = memory[:third].mean(), memory[-third:].mean()
        tenths = ", ".join(f"{part.mean():.0f}" for part in np.array_split(memory, 10))
        print(f"memory: {first:.0f} MiB in the first third, {last:.0f} MiB in the last, maximum "
              f"{memory.max():.0f} MiB; in tenths of the time: {tenths}")
        if last > first * (1 + MAX_GROWTH):
            self.problems.append(f"memory has grown by {last / first - 1:.1%}")

    async def check_slots(self) -> None:
        """Waits until all slots are free; the last clients may have just left."""
        for _ in range(50):
            metrics = await asyncio.to_thread(lambda: self.server.get("/metrics").body.decode())
            values = dict(re.findall(r"(?m)^llava_jax_(slots|busy_slots|waiting) (\d+)$", metrics))
            if values["busy_slots"] == values["waiting"] == "0":
                break
            await asyncio.sleep(0.2)
        else:
            self.problems.append("slots are not free")
        print("at the end: " + ", ".join(f"{name} {value}" for name, value in values.items()))


def processes(pid: int) -> list[int]:
    """Returns a process and its descendants."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [p for child in path.read_text().split() for p in processes(int(child))]
    return found


def resident_bytes(pid: int) -> int:
    try:
        return 4096 * int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0


if __name__ == "__main__":
    main()
