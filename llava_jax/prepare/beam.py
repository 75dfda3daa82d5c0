"""Runs tasks as an Apache Beam pipeline, on machines of a cluster that has a runner for it."""

from collections.abc import Callable, Sequence
from typing import Any

from llava_jax.errors import UserError


def run_pipeline(function: Callable[[Any], Any], tasks: Sequence[Any], runner: str, options: Sequence[str]) -> None:
    """Calls `function(task)` for every task in the workers of a Beam runner, and waits until all are done.

    A runner may call it again, even at the same time, if a worker fails or is slow. Raises UserError if Beam is missing
    or refuses runner or options, and OSError with the last line of Beam's report if a call fails.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("--runner needs Apache Beam: pip install 'llava_jax[beam]'") from None
    try:
        with beam.Pipeline(runner, PipelineOptions([f"--{option}" for option in options])) as pipeline:
            # Without Reshuffle runners fuse the steps, and one worker gets all tasks.
            _ = pipeline | beam.Create(tasks) | beam.Reshuffle() | beam.Map(function)
    except (ValueError, SystemExit) as error:
        reason = "invalid value of an option" if isinstance(error, SystemExit) else " ".join(str(error).split())
        raise UserError(f"--runner {runner}, --runner-options {' '.join(options)}: {reason}") from None
    except RuntimeError as error:
        raise OSError(str(error).strip().rpartition("\n")[2]) from error
