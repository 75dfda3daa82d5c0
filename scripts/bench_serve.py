"""Measures a server beside `transformers serve`, and the server beside decoding alone.

    python scripts/bench_serve.py runs/mini/model --pictures runs/mini/data/test [--clients 1,8,32,64] [--rounds 3]
    python scripts/bench_serve.py --size 100m --tokens 32          # a random model
    python scripts/bench_serve.py --size 100m --overhead           # full slots by HTTP, beside SlotEngine alone

Both servers get the same greedy requests by the same client, in turns. Requests are streamed; a client sends the next
as soon as its answer has ended. All texts must be equal. No request occurs twice, and equal pictures have different
digests, so that a cache of earlier requests serves shared first tokens of prompts alone.

`transformers serve` needs `pip install fastapi`. It has no continuous batching for models with images, so it answers
them one at a time.
"""

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from serve_load import Connection, Reply, Server, image_part, marked, own_server, pictures, post, transformers_server

QUESTION = "Describe the image in detail."
CONTEXT = 512
MIN_REQUESTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="folder that transformers opens")
    parser.add_argument("--pictures", type=Path, help="folder of JPEG files; noise by default")
    parser.add_argument("--size", help="measure a random model of this size instead (bench_models.py)")
    parser.add_argument("--clients", default="1,8,32,64", help="numbers of clients")
    parser.add_argument("--mixes", default="text,image", help="kinds of requests: text, image")
    parser.add_argument("--requests", type=int, default=4, help="number of requests of each client; at least 8 in all")
    parser.add_argument("--tokens", type=int, default=64, help="maximum number of tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements")
    parser.add_argument("--slots", type=int, default=32, help="slots of the server")
    parser.add_argument("--alone", action="store_true", help="leave transformers out")
    parser.add_argument("--overhead", action="store_true", help="compare with decoding alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(args.size, Path(folder) / "model") if args.size else args.model
        if model is None:
            parser.error("name a model's folder, or --size")
        print(machine())
        if args.overhead:
            overhead(model, args)
        else:
            compare(model, args)


def machine() -> str:
    from importlib.metadata import version

    packages = ("jax", "torch", "transformers", "starlette", "uvicorn")
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return (f"{os.cpu_count()} cores of {model.group(1) if model else platform.machine()}, load "
            f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
            + ", ".join(f"{package} {version(package)}" for package in packages))


def compare(model: Path, args: argparse.Namespace) -> None:
    """Prints the table of both servers."""
    servers = [own_server(model, "--slots", str(args.slots), "--context", str(CONTEXT))]
    try:
        if not args.alone:
            servers.append(transformers_server(model))
        files, number = pictures(args.pictures), 0
        for server in servers:  # the first requests of transformers take longer
            asyncio.run(drive(server, [requests(1, args, mix, files, 0)[0] for mix in ("text", "image")] * 2, 1))
        names = [server.name for server in servers]
        print(f"Latencies: p50 / p95 / p99. Rates: {' / '.join(names)}.")
        columns = ["requests", "clients", "requests/s", "tokens/s"]
        columns += [f"{what}, ms, {name}" for what in ("first token", "between pieces") for name in names]
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        shares = []
        for mix in args.mixes.split(","):
            for clients in map(int, args.clients.split(",")):
                results = [[] for _ in servers]
                for _ in range(args.rounds):
                    number += 1
                    bodies = requests(max(clients * args.requests, MIN_REQUESTS), args, mix, files, number)
                    for server, rounds in zip(servers, results, strict=True):
                        rounds.append(asyncio.run(drive(server, bodies, clients)))
                    check(*(rounds[-1].replies for rounds in results))
                print(f"| {mix} | {clients} | {' | '.join(cells(results))} |", flush=True)
                shares += [result.cpu_seconds / result.seconds for result in results[0]]
        print(f"the client took up to {max(shares):.0%} of a core")
    finally:
        for server in servers:
            server.stop()


def overhead(model: Path, args: argparse.Namespace) -> None:
    """Prints tokens per second in full slots: by HTTP, and of the engine in this process, in turns.

    Both count the prompts, which are short. The engine alone gets one step a call, as in the server, and 16.
    """
    import llava_jax
    from llava_jax.inference.slots import PromptChunk, SlotEngine, SlotRequest

    llava = llava_jax.load(model)
    engine = SlotEngine(llava, args.slots, CONTEXT)
    engine.warm_up(lambda *_: None)
    prompt = llava.encode_chat([{"role": "user", "content": f"10000. {QUESTION}"}], [])

    def alone(steps: int) -> float:
        started = time.perf_counter()
        engine.write([PromptChunk(slot, 0, prompt, request=SlotRequest(args.tokens)) for slot in range(args.slots)])
        waiting = []  # as the server: the tokens of a call are read after the next call
        for _ in range(-(-(args.tokens - 1) // steps)):
            waiting.append(engine.decode(np.ones(args.slots, bool), steps))
            if len(waiting) > 1:
                np.asarray(waiting.pop(0).tokens).tolist()
        np.asarray(waiting.pop().tokens)
        return args.slots * args.tokens / (time.perf_counter() - started)

    server = own_server(model, "--slots", str(args.slots), "--context", str(CONTEXT))
    try:
        rates = {"by HTTP": [], "alone, 1 step a call": [], "alone, 16 steps a call": []}
        share = []
        for number in range(args.rounds + 1):  # the first round warms
            result = asyncio.run(drive(server, requests(args.slots, args, "text", [], number), args.slots))
            for values, rate in zip(rates.values(), (result.tokens_per_second, alone(1), alone(16)), strict=True):
                values += [rate] if number else []
            share.append(result.cpu_seconds / result.seconds)
        base = np.median(rates["alone, 1 step a call"])
        for name, values in rates.items():
            print(f"{name}: {np.median(values):,.0f} tokens/s ({min(values):,.0f}-{max(values):,.0f}), "
                  f"{np.median(values) / base:.3f} of decoding alone")
        print(f"the client took {np.median(share):.0%} of a core")
    finally:
        server.stop()


def requests(count: int, args: argparse.Namespace, mix: str, files: Sequence[bytes], number: int) -> list[dict]:
    """Returns the bodies of requests that no other `number` has."""
    bodies = []
    for i in range(count):
        k = number * 10_000 + i
        content = f"{k}. {QUESTION}"
        if mix == "image":
            content = [image_part(marked(files[i % len(files)], k)), {"type": "text", "text": QUESTION}]
        bodies.append({"messages": [{"role": "user", "content": content}], "temperature": 0,
                       "max_tokens": args.tokens, "stream": True, "stream_options": {"include_usage": True}})
    return bodies


@dataclasses.dataclass
class Result:
    """What clients saw: their replies, the seconds of all together, and the client's own CPU seconds."""

    replies: list[Reply]
    seconds: float
    cpu_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(reply.tokens for reply in self.replies) / self.seconds


async def drive(server: Server, bodies: Sequence[Mapping], clients: int) -> Result:
    """Sends requests from some clients, each of which waits for its answer before it sends the next."""
    waiting = iter(enumerate([post(server.port, body | {"model": server.model}) for body in bodies]))
    replies: dict[int, Reply] = {}

    async def client(connection: Connection) -> None:
        for index, request in waiting:
            replies[index] = await connection.send(request)
        connection.close()

    connections = [await Connection.open(server.port) for _ in range(clients)]
    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*map(client, connections))
    result = Result([replies[i] for i in range(len(bodies))], time.perf_counter() - started, time.process_time() - cpu)
    for reply in result.replies:
        if reply.status != 200 or not reply.complete or reply.error:
            raise SystemExit(f"{server.name} answered {reply.status}: {reply.error or reply.body[:300]}")
    return result


def check(ours: Sequence[Reply], theirs: Sequence[Reply] = ()) -> None:
    """Texts must be equal up to outer blanks, which transformers does not remove."""
    differing = [(a.text, b.text) for a, b in zip(ours, theirs, strict=False) if a.text.strip() != b.text.strip()]
    if differing:
        raise SystemExit(f"{len(differing)} of {len(ours)} answers differ, such as {differing[0]}")


def cells(results: Sequence[Sequence[Result]]) -> list[str]:
    """Returns the cells of a row for each server's rounds: medians of rates, and latencies of all rounds together."""
    rates = [np.median([result.tokens_per_second for result in rounds]) for rounds in results]
    requests_per_second = [np.median([len(result.replies) / result.seconds for result in rounds]) for rounds in results]
    ratio = f" ({rates[0] / rates[1]:.1f} x)" if len(rates) == 2 else ""
    replies = [[reply for result in rounds for reply in result.replies] for rounds in results]
    first = [[reply.times[0] for reply in found if reply.times] for found in replies]
    between = [[gap for reply in found for gap in np.diff(reply.times)] for found in replies]
    return [" / ".join(f"{x:,.1f}" if x < 10 else f"{x:,.0f}" for x in requests_per_second),
            " / ".join(f"{x:,.0f}" for x in rates) + ratio,
            *(" / ".join(f"{1000 * x:,.0f}" for x in np.percentile(seconds or [0], (50, 95, 99)))
              for seconds in first + between)]


def random_model(size: str, folder: Path) -> Path:
    """Writes a random model that never ends an answer, with a tokenizer of letters and made-up words."""
    from bench_models import SIZES, parameters_of, torch_model

    from llava_jax.weights.checkpoint import save_hf

    config = dataclasses.replace(SIZES[size], template="mistral_instruct")
    model = torch_model(config)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.data[:3] = 0  # special tokens have a logit of 0, which is never the largest
    folder.parent.mkdir(exist_ok=True)
    tokenizer = folder.parent / "tokenizer"
    write_tokenizer(tokenizer, config.text.vocab_size - 64)
    save_hf(folder, config, parameters_of(model), tokenizer)
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    special = ["<unk>", "<s>", "</s>"]
    letters = ["▁", *map(chr, range(33, 127))]
    words = map("".join, itertools.product("▁", "bdfgklmnprst", "aeiou", "bcdfghjklmnpqrstvwxyz", "aeou"))
    pieces = [*special, *letters, *words][:size]
    folder.mkdir()
    blank = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                                                 {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    decoder = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    bos = {"type": "TemplateProcessing", "pair": [],
           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
           "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    added = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, name in enumerate(special)]
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": blank,
        "pre_tokenizer": None, "post_processor": bos, "decoder": decoder,
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": False,
                  "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True}))


if __name__ == "__main__":
    main()
