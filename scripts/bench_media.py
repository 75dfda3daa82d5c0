"""Times the opening of images for the server, beside decoding in this process: `python scripts/bench_media.py`."""

import asyncio
import base64
import io
import os
import time
from pathlib import Path

import numpy as np
from bench_serve import machine
from PIL import Image

from llava_jax.images import ImageProcessor, open_image
from llava_jax.serve import media
from llava_jax.serve.limits import Limits


def photo(width: int, height: int, block: int, kind: str, **options: int) -> bytes:
    """Returns a file of noise, of blocks of pixels that JPEG can compress."""
    noise = np.random.default_rng(0).integers(0, 256, (height // block, width // block, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height)).save(file, kind, **options)
    return file.getvalue()


def child_time(loader: media.MediaLoader) -> float:
    """Returns the seconds of CPU that the only decoding process has used."""
    process, = loader._processes
    fields = Path(f"/proc/{process._process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def main() -> None:
    files = {"JPEG of 336 x 336": photo(336, 336, 8, "JPEG", quality=90),
             "JPEG of 12 megapixels": photo(4000, 3000, 8, "JPEG", quality=92),
             "PNG of 20 MB": photo(2600, 2600, 1, "PNG")}
    processor = ImageProcessor()
    start = time.perf_counter()
    loader = media.MediaLoader(Limits(image_bytes=2**25, decode_processes=1), processor, False)

    await loader.load("data:;base64," + base64.b64encode(photo(8, 8, 1, "PNG")).decode(), "")
    print(machine())
    print(f"process and first image: {time.perf_counter() - start:.2f} s")
    for name, content in files.items():
        url, repeats = f"data:;base64,{base64.b64encode(content).decode()}", 500 if len(content) < 1e6 else 10
        server, child, times = time.process_time(), child_time(loader), []
        for _ in range(repeats):
            loader._cache.clear()
            start = time.perf_counter()
            await loader.load(url, "")
            times.append(time.perf_counter() - start)
        server, child = time.process_time() - server, child_time(loader) - child
        again = time.process_time()
        for _ in range(repeats):
            await loader.load(url, "")
        again = time.process_time() - again
        here = time.process_time()
        for _ in range(repeats):
            processor(open_image(content))
        here = time.process_time() - here
        server, child, again, here = (1000 * seconds / repeats for seconds in (server, child, again, here))
        print(f"{name} ({len(content) / 1e6:.1f} MB): {1000 * min(times):.1f} ms; CPU: server {server:.1f}, "
              f"its process {child:.1f}; again {again:.1f}; decoding here {here:.1f}")
    await loader.close()


if __name__ == "__main__":
    asyncio.run(main())
