"""Measures `synthesize run` with a fake of OpenAI's API that fails on every fifth request, and kills it five times.

    python scripts/bench_synthesize.py [--images 10000] [--kills 5] [--requests-per-minute 3000] [--folder DIR]

Writes captions and boxes of so many images, serves the fake (tests/endpoint/fake_openai.py) in a process of its own,
with a rate limit that it enforces, and asks for a conversation about each image with 50 requests at a time. The command
gets SIGKILL after equal parts of the way, and the same command goes on. The faults, in turn: 429, 500, 502 with a page
of HTML, a slow answer, a truncated one, one cut off in the middle, a closed connection, an empty and a filtered answer,
one without sense, one in the wrong form, and none at all; and now and then 429 with Retry-After, which pauses all
requests. Prints

- whether every image has exactly one record, accepted or rejected;
- how many answers were paid for that are not in the log: those that the server cut off in the middle, and those in
  flight at a kill. No request may be in the log twice;
- the largest resident memory of the command;
- the throughput: requests that the server let through, of those that its limit allows in the time between the first
  and the last of every stretch between two kills, but for the tail of the last, when fewer tasks are left than may be
  asked at a time.

The exit code is 1 if one of these is not as it should be.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "endpoint"))

FAULTS = ("429-bare", "500", "502", "slow", "length", "cut", "drop", "empty", "filter", "nonsense", "wrong", "never")
EVERY = 40  # one in so many faults is "429-ms", which pauses all requests for 1.5 s
ANIMALS = ("dog", "cat", "horse", "sheep", "cow", "bear", "zebra", "giraffe", "elephant", "bird")
CONCURRENCY, TIMEOUT, LATENCY = 50, 10, 0.3  # requests; seconds
MEGABYTES = 500  # of memory, at most


def write_images(path: Path, count: int) -> None:
    """Writes images with five captions and two to nine boxes each. The first caption identifies the image."""
    with open(path, "w") as file:
        for i in range(count):
            animal = ANIMALS[i % len(ANIMALS)]
            captions = [f"Room {i} with a {animal} and a chair.", f"A {animal} stands to the left of a chair.",
                        f"There is a {animal} in a room.", "A wooden chair in a bright room.", f"One {animal}."]
            boxes = [{"category": animal, "bbox": [5, 20, 30, 40]}]
            boxes += [{"category": "chair", "bbox": [40 + 5 * k, 20, 15, 50]} for k in range(1 + i % 8)]
            file.write(json.dumps({"id": f"{i:06d}", "image": f"{i:06d}.jpg", "width": 100, "height": 80,
                                   "captions": captions, "boxes": boxes}) + "\n")


def serve(requests_per_minute: float) -> None:
    """Runs the fake until stdin is closed. Prints its address, and at the end its counts."""
    from fake_openai import FakeOpenAI

    wrong = Counter()

    def fault(number: int) -> str | None:
        turn, fails = divmod(number, 5)
        if fails != 4:
            return None
        if turn % EVERY == EVERY - 1:
            return "429-ms"
        name = FAULTS[turn % len(FAULTS)]
        wrong["now"] += name == "wrong"
        return None if name == "wrong" else name

    def answer(messages: list[dict[str, str]]) -> str:
        room, animal = re.search(r"Room (\d+) with a (\w+)", messages[-1]["content"]).groups()
        if wrong["now"]:
            wrong["now"] -= 1
            return f"There is a {animal} in room {room}, and this is no conversation."
        pairs = [("Which animal is in the picture?", f"A {animal} is in room {room}."),
                 ("What stands to its right?", f"To the right of the {animal} there is a chair."),
                 ("Is the picture taken outdoors?", "No, it shows the inside of a bright room.")]
        return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{text}" for question, text in pairs)

    fake = FakeOpenAI(answer=answer, faults=fault, requests_per_minute=requests_per_minute, latency=LATENCY, slow=3.0)
    with fake.serve() as url:
        print(url, flush=True)
        sys.stdin.read()
    print(json.dumps({"times": fake.times, "paid": fake.paid.total(), "refused": fake.refused}))


def run_and_kill(command: list[str], log: Path, images: int, kills: int) -> tuple[list[tuple[float, float]], int]:
    """Returns (start, end) of every run of the command, and its maximum resident memory in bytes."""
    stretches, memory = [], 0
    for part in range(1, kills + 2):
        goal = images * part // (kills + 1) if part <= kills else None
        started = time.monotonic()
        process = subprocess.Popen(command)
        while process.poll() is None:
            time.sleep(0.05)
            status = Path(f"/proc/{process.pid}/status").read_text() if process.poll() is None else ""
            memory = max([memory, *(1024 * int(kib) for kib in re.findall(r"VmHWM:\s+(\d+)", status))])
            if goal is not None and log.exists() and _lines(log) >= goal:
                process.kill()
                process.wait()
        stretches.append((started, time.monotonic()))
        print(f"{_lines(log):,} answers after {sum(end - start for start, end in stretches):.0f} s", flush=True)
    if process.returncode:
        sys.exit(f"the command ended with {process.returncode}")
    return stretches, memory


def throughput(stretches: list[tuple[float, float]], times: list[float], per_minute: float) -> float:
    """Returns the share of the requests that the limit allows."""
    passed = seconds = 0.0
    for number, (started, ended) in enumerate(stretches):
        own = [at for at in times if started <= at <= ended]
        if number == len(stretches) - 1:
            own = own[:-CONCURRENCY]
        passed, seconds = passed + len(own) - 1, seconds + own[-1] - own[0]
    return passed / (seconds * per_minute / 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--requests-per-minute", type=float, default=3000)
    parser.add_argument("--least-share", type=float, default=0.95, help="minimum share of the rate limit")
    parser.add_argument("--folder", type=Path, help="folder for data and outputs; default: a temporary one")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.requests_per_minute)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        share = measure(folder, args.images, args.kills, args.requests_per_minute)
        if share < args.least_share:
            sys.exit(1)


def measure(folder: Path, images: int, kills: int, per_minute: float) -> float:
    """Returns the share of the rate limit that was reached, or -1 if another check fails."""
    data, out = folder / "images.jsonl", folder / "out"
    write_images(data, images)
    server = subprocess.Popen([sys.executable, __file__, "--serve", "--requests-per-minute", str(per_minute)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    url = server.stdout.readline().strip()
    command = [sys.executable, "-m", "llava_jax.synthesize", "run", "--data", str(data), "--out", str(out),
               "--model", "teacher", "--base-url", url, "--detail", "0", "--complex", "0", "--timeout", str(TIMEOUT),
               "--concurrency", str(CONCURRENCY), "--requests-per-minute", str(per_minute)]
    stretches, memory = run_and_kill(command, out / "answers.jsonl", images, kills)
    seen = json.loads(server.communicate("")[0])

    found = Counter(record["id"] for record in json.loads((out / "conversation.json").read_text()))
    accepted = found.total()
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    found.update(row["id"] for row in rejected)
    keys = [json.loads(line)["key"] for line in (out / "answers.jsonl").read_text().splitlines()]
    lost, cut = seen["paid"] - len(keys), seen["refused"]["cut"]
    share = throughput(stretches, seen["times"], per_minute)
    reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(row["reason"] for row in rejected).items())
    once = found == Counter(f"{i:06d}" for i in range(images))
    print(f"images: {images:,}; accepted {accepted:,}, rejected {len(rejected):,} ({reasons or 'none'}); "
          f"each exactly once: {once}")
    print(f"requests let through: {len(seen['times']):,}; answers paid: {seen['paid']:,}; in the log: {len(keys):,}, "
          f"each once: {len(set(keys)) == len(keys)}")
    print(f"paid and lost: {lost}, of which {cut} were cut off by the server, the others in flight at {kills} kills "
          f"(at most {kills * CONCURRENCY})")
    print(f"largest resident memory: {memory / 1e6:.0f} MB")
    print(f"throughput: {share:.1%} of {per_minute:,.0f} requests a minute; refused for the rate: "
          f"{seen['refused'].get('rate', 0)}; {sum(end - start for start, end in stretches):.0f} s in all")
    paid_once = len(set(keys)) == len(keys) and 0 <= lost - cut <= kills * CONCURRENCY
    return share if once and paid_once and memory < MEGABYTES * 1e6 else -1.0


def _lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


if __name__ == "__main__":
    main()
