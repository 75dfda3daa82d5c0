"""Serves a model: `python -m llava_jax.serve MODEL`."""

import asyncio
import dataclasses
import gc
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from llava_jax import cli
from llava_jax.config import Mesh
from llava_jax.errors import UserError
from llava_jax.files import to_path
from llava_jax.progress import Progress
from llava_jax.serve.limits import Limits

if TYPE_CHECKING:
    from llava_jax import Llava
    from llava_jax.serve.app import Status

HELP = """Serves a model over OpenAI's API, with a chat page at /.

  python -m llava_jax.serve runs/mini/model
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"model": "model", "messages": [{"role": "user", "content": "What is red?"}]}'

An API key is read from the environment variable LLAVA_JAX_API_KEY. Clients send it as a bearer token, browsers as the
password of HTTP Basic.
"""
KEY = "LLAVA_JAX_API_KEY"
DEFAULT_CONTEXT = 4096

log = logging.getLogger("llava_jax.serve")


@dataclass(frozen=True)
class ServeOptions:
    """Options of the command line."""

    model: tyro.conf.Positional[str]
    """Directory of the model."""
    host: str = "127.0.0.1"
    """Address to listen at. With another than a loopback address, set an API key."""
    port: int = 8000
    """Port to listen at; 0 chooses a free one."""
    name: str | None = None
    """Name of the model in the API; default: the last part of its path."""
    slots: int = 16
    """Number of requests that are answered at the same time."""
    context: int | None = None
    """Maximum number of tokens of a prompt and its answer; default: the model's, at most 4096."""
    adapter: tuple[str, ...] = ()
    """NAME=DIR of LoRA adapters, each of which is served as a model of that name."""
    quantize: Literal["int8"] | None = None
    """Form of the weights: int8 halves or quarters their memory."""
    kv_cache: Literal["int8"] | None = None
    """Form of the key-value cache: int8 halves or quarters its memory."""
    mesh: Mesh = Mesh(fsdp=1)
    """Devices that the model is split over, such as --mesh.tensor 4."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Compute dtype; default: bfloat16 on TPU and GPU, float32 on CPU."""
    template: str | None = None
    """Name of the conversation template, if the model's files do not name the one that it was trained with."""
    vision: str | None = None
    """Folder of the vision tower that a LLaVA in the original layout names but does not contain."""
    image_cache_bytes: int = 2**30
    """Maximum number of bytes of cached image features, on the host."""
    limits: tyro.conf.OmitArgPrefixes[Limits] = Limits()
    """Limits of requests."""

    def check(self) -> None:
        """Raises UserError, one line, for an invalid value."""
        from llava_jax.serve.media import check_hosts

        for name in ("slots", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}: it must be at least 1")
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port is {self.port}: it must be from 0 to 65535")
        for field in dataclasses.fields(Limits):
            value = getattr(self.limits, field.name)
            if field.type in (int, float) and not value > 0:
                raise UserError(f"--{field.name.replace('_', '-')} is {value}: it must be above 0")
        check_hosts(self.limits.fetch_hosts)
        if not to_path(self.model).is_dir():
            raise UserError(f"{self.model}: no such directory")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def base_name(self) -> str:
        return self.name or Path(self.model).resolve().name

    def adapters(self) -> dict[str, str]:
        """Returns name -> folder of the adapters. Raises UserError for a text that is no NAME=DIR, or a second name."""
        folders: dict[str, str] = {}
        for text in self.adapter:
            name, _, folder = text.partition("=")
            if not name or not folder:
                raise UserError(f"--adapter {text}: expected NAME=DIR")
            if name in folders or name == self.base_name:
                raise UserError(f"--adapter {text}: the name {name} is used twice")
            folders[name] = folder
        return folders


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line until a signal; returns 0, or 1 if the device was lost. Raises UserError."""
    args = sys.argv[1:] if args is None else args
    options = cli.parse(ServeOptions, args, prog="python -m llava_jax.serve", description=HELP)
    options.check()
    adapters = options.adapters()
    key = os.environ.get(KEY) or None
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("llava_jax").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # its warnings are about single requests
    listener = _listen(options)
    if key is None and not options.is_loopback:
        log.warning("warning: everybody who reaches %s can use this server: set %s", options.host, KEY)
    return asyncio.run(_run(options, _load(options, adapters), listener, key))


def _listen(options: ServeOptions) -> socket.socket:
    try:
        from llava_jax.serve.connections import listen
    except ModuleNotFoundError as error:
        raise UserError(f"the {error.name} package is missing: pip install 'llava_jax[serve]'") from None
    try:
        return listen(options.host, options.port)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno > 0 else error.strerror  # a name that is not found: below 0
        raise UserError(f"--host {options.host} --port {options.port}: {reason}; choose others") from error


def _load(options: ServeOptions, adapters: dict[str, str]) -> "Llava":
    from llava_jax import load
    from llava_jax.parallel.sharding import make_mesh

    mesh = None if options.mesh == Mesh(fsdp=1) else make_mesh(options.mesh)
    llava = load(options.model, options.dtype, mesh, options.template, vision=options.vision,
                 adapters=adapters, quantize=options.quantize)
    limit = llava.config.text.max_length
    if options.context is not None and options.context > limit:
        raise UserError(f"--context is {options.context}: the model's context has {limit} tokens")
    return llava


async def _run(options: ServeOptions, llava: "Llava", listener: socket.socket, key: str | None) -> int:
    """Serves until a signal, and returns the exit code."""
    from llava_jax.inference.slots import SlotEngine
    from llava_jax.serve import metrics
    from llava_jax.serve.app import Status, make_app
    from llava_jax.serve.connections import serve
    from llava_jax.serve.media import MediaLoader
    from llava_jax.serve.scheduler import Scheduler

    metrics.count_compilations()
    limits, status, loop, failed = options.limits, Status(), asyncio.get_running_loop(), asyncio.Event()
    context = options.context or min(DEFAULT_CONTEXT, llava.config.text.max_length)
    engine = SlotEngine(llava, options.slots, context, options.kv_cache)
    scheduler = Scheduler(engine, llava.detokenizer, limits, options.image_cache_bytes, _WarmUp(status),
                          lambda: loop.call_soon_threadsafe(failed.set))
    media = MediaLoader(limits, llava.processor, llava.config.exif)
    models = {name: index for index, name in enumerate((options.base_name, *llava.adapters))}
    loopback_only = key is None and options.is_loopback
    app = make_app(llava, scheduler, media, limits, models, context, key, loopback_only, status)

    async def work() -> None:
        scheduler.start()
        while not (scheduler.ready or scheduler.failed):
            await asyncio.sleep(0.05)
        if scheduler.failed:
            return
        gc.collect()
        gc.freeze()  # 540,000 objects of JAX and the model, which every full collection would visit for 0.3 to 1 s
        host, port = listener.getsockname()[:2]
        print(f"ready at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        await failed.wait()

    async def drain() -> None:
        was_ready, status.draining = scheduler.ready, True
        log.info("draining")
        if was_ready:
            await asyncio.to_thread(scheduler.drain, limits.drain_seconds)
        else:
            await media.close()
            os._exit(0)  # a compilation in another thread cannot be stopped

    await serve(app, listener, limits, work, drain)
    await media.close()
    return 1 if scheduler.failed else 0


class _WarmUp:
    """Shows the progress of the warm-up, for the scheduler's thread."""

    def __init__(self, status: "Status"):
        self._status, self._progress = status, None

    def __call__(self, done: int, total: int, stage: str) -> None:
        self._status.report(done, total, stage)
        if self._progress is None:
            self._progress = Progress(total, unit="programs", name="warm-up", note=lambda: self._status.stage)
        while self._progress.done < done:
            self._progress.update()
        if done == total:
            self._progress.close()


if __name__ == "__main__":
    cli.run(main)
