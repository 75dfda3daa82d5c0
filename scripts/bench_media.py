"""Times the opening of images for the server, beside decoding in this process: `python scripts/bench_media.py`."""

import asyncio
import base64
import io
import time
from collections.abc import Callable

import numpy as np
from bench_serve import machine
from PIL import Image

from llava_jax.images import ImageProcessor, open_image
from llava_jax.serve import media
from llava_jax.serve.limits import Limits

REPEATS = 15


def photo(width: int, height: int, block: int, kind: str, **options: int) -> bytes:
    """Returns a file of noise, of blocks of pixels that JPEG can compress."""
    noise = np.random.default_rng(0).integers(0, 256, (height // block, width // block, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height)).save(file, kind, **options)
    return file.getvalue()


def milliseconds(function: Callable[..., object], *args: object) -> float:
    """Returns the shortest time of several calls."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function(*args)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main() -> None:
    files = {"JPEG of 336 x 336": photo(336, 336, 8, "JPEG", quality=90),
             "JPEG of 12 megapixels": photo(4000, 3000, 8, "JPEG", quality=92),
             "PNG of 20 MB": photo(2600, 2600, 1, "PNG")}
    processor = ImageProcessor()
    start = time.perf_counter()
    loader = media.MediaLoader(Limits(image_bytes=2**25, decode_processes=1), processor, False)
    with asyncio.Runner() as runner:
        def load(url: str) -> None:
            runner.run(loader.load(url, ""))

        def load_anew(url: str) -> None:
            loader._cache.clear()
            load(url)

        load("data:;base64," + base64.b64encode(photo(8, 8, 1, "PNG")).decode())
        print(machine())
        print(f"process and first image: {time.perf_counter() - start:.2f} s")
        for name, content in files.items():
            url = f"data:;base64,{base64.b64encode(content).decode()}"
            anew, cached = milliseconds(load_anew, url), milliseconds(load, url)
            here = milliseconds(lambda file: processor(open_image(file)), content)
            print(f"{name} ({len(content) / 1e6:.1f} MB): {anew:.1f} ms; only decoding, here: {here:.1f}; "
                  f"again: {cached:.1f}")
        runner.run(loader.close())


if __name__ == "__main__":
    main()
