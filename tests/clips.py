"""Video files made by PyAV, whose frames can be told from each other."""

from pathlib import Path

import av
import numpy as np


def frames(count: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """RGB frames uint8 [count, height, width, 3] of another grey each, with a brighter upper left quarter."""
    width, height = size
    made = np.empty((count, height, width, 3), np.uint8)
    made[:] = np.linspace(16, 200, count).astype(np.uint8)[:, None, None, None]
    made[:, : height // 2, : width // 2] += 50
    return made


def write(path: Path, count: int = 50, rate: int = 10, size: tuple[int, int] = (64, 48), codec: str = "mpeg4",
          rotation: int = 0) -> str:
    """Writes a clip of `frames`. The suffix chooses the container. Returns the path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.options = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx" else {}
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames(count, size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    return str(path)
