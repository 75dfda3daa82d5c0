"""Writes the server's figures in Prometheus's text format."""

import dataclasses
import os
from collections.abc import Iterator, Mapping

from llava_jax.serve.stats import SECONDS, Histogram, Stats

PREFIX = "llava_jax_"
GAUGES = ("slots", "busy_slots", "waiting", "image_cache_bytes")
"""Fields of Stats that can go down. The other numbers are counters."""

compilations = 0
"""Number of programs that XLA has compiled in this process. It does not grow after the warm-up."""


def count_compilations() -> None:
    """Starts to count compilations."""
    import jax

    def listen(event: str, seconds: float, **details: object) -> None:
        global compilations
        compilations += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)


def render(stats: Stats, requests: Mapping[tuple[str, int], int]) -> str:
    """Returns the page of /metrics.

    No label comes from a request, so that clients cannot make the page grow. `requests` maps (route, status) to the
    number of requests.
    """
    lines = [line for field in dataclasses.fields(stats) for line in _family(field.name, getattr(stats, field.name))]
    lines += _family("compilations", compilations)
    lines.append(f"# TYPE {PREFIX}http_requests_total counter")
    lines += [f'{PREFIX}http_requests_total{{route="{route}",status="{status}"}} {count}'
              for (route, status), count in sorted(requests.items())]
    if (memory := _resident_bytes()) is not None:
        lines += ["# TYPE process_resident_memory_bytes gauge", f"process_resident_memory_bytes {memory}"]
    return "\n".join(lines) + "\n"


def _family(name: str, value: int | float | Mapping[str, int] | Histogram) -> Iterator[str]:
    name = PREFIX + name
    if isinstance(value, Histogram):
        yield f"# TYPE {name} histogram"
        count = 0
        for bound, values in zip((*SECONDS, "+Inf"), value.counts, strict=True):
            count += values
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {value.total}"
        yield f"{name}_count {count}"
    elif isinstance(value, Mapping):
        yield f"# TYPE {name}_total counter"
        yield from (f'{name}_total{{reason="{reason}"}} {count}' for reason, count in value.items())
    elif name.removeprefix(PREFIX) in GAUGES:
        yield f"# TYPE {name} gauge"
        yield f"{name} {value}"
    else:
        yield f"# TYPE {name}_total counter"
        yield f"{name}_total {value}"


def _resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return None
