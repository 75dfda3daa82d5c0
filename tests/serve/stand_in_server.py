"""Serves stand-ins at a free port: `python stand_in_server.py LIMITS`. The last word of a chat says what happens:

  hold   the answer stops after its pieces until its client leaves
  drain  the answer ends when the server drains
  flood  pieces come without end, until the client has left
"""

import asyncio
import json
import sys
import threading

import stand_ins

from llava_jax.serve.app import Status, make_app
from llava_jax.serve.connections import listen, serve
from llava_jax.serve.jobs import Finished, Piece
from llava_jax.serve.limits import Limits
from llava_jax.serve.stats import Stats


class Scheduler(stand_ins.FakeScheduler):
    """Shows its unfinished jobs as busy slots."""

    def __init__(self):
        super().__init__()
        self.draining = threading.Event()

    def _answer(self, job):
        word = "".join(map(chr, job.tokens)).split()[-1]
        if word == "flood":
            while not job.cancelled.wait(1e-4):
                job.emit(Piece("x" * 1000))
            job.emit(Finished("cancelled"))
            self.ended.append(job)
        elif word == "drain":
            job.emit(Piece("before "))
            self.draining.wait()
            job.emit(Piece("after"))
            job.emit(Finished("stop"))
            self.ended.append(job)
        else:
            self.hold = word == "hold"
            super()._answer(job)

    def stats(self):
        return Stats(slots=3, busy_slots=len(self.jobs) - len(self.ended))


async def main():
    limits, scheduler, status = Limits(**json.loads(sys.argv[1])), Scheduler(), Status()
    listener = listen("127.0.0.1", 0)
    app = make_app(stand_ins.FakeLlava(), scheduler, stand_ins.FakeMedia(), limits, {"base": 0}, stand_ins.CONTEXT,
                   loopback_only=True, status=status)

    async def work():
        print(listener.getsockname()[1], flush=True)
        await asyncio.Event().wait()

    async def drain():
        status.draining = True
        print("draining", flush=True)
        if await asyncio.to_thread(sys.stdin.readline) == "end answers\n":
            scheduler.draining.set()

    await serve(app, listener, limits, work, drain)


if __name__ == "__main__":
    asyncio.run(main())
