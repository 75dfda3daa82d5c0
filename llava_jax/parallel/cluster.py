"""Detects which process of a run this is, from the environment or from the metadata of a Cloud TPU VM.

`jax.distributed.initialize` detects it too, but offers no way to ask before it connects.
"""

import glob
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from llava_jax.errors import UserError

PORT = 8482
"""Default port of process 0, as JAX uses for TPUs."""

DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
"""Device files of TPU chips. Without any, the metadata server is not asked."""


@dataclass(frozen=True)
class ClusterInfo:
    """Position of this process in a run."""

    coordinator_address: str
    """host:port at which process 0 listens."""
    process_id: int
    num_processes: int
    hosts: tuple[str, ...] = ()
    """Host of each process, if known."""


def detect_cluster() -> ClusterInfo | None:
    """Returns the position of this process, or None if it is the only one. It tries, in this order:

    1. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
    2. TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, as GKE sets them for every pod of a slice;
    3. the metadata of a Cloud TPU VM with TPU devices: agent-worker-number, worker-network-endpoints.

    For 2 and 3, MEGASCALE_NUM_SLICES, MEGASCALE_SLICE_ID and MEGASCALE_COORDINATOR_ADDRESS, from the environment or
    from the metadata's tpu-env, describe several slices. JAX_PLATFORMS=cpu skips 2 and 3.

    Raises UserError that names a missing or invalid variable, and OSError if the metadata server does not answer.
    """
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
            raise UserError(f"JAX_COORDINATOR_ADDRESS is {address!r}: give host:port of process 0")
        reason = "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers"
        count, index = (_number(os.environ.get, name, reason) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        if not 0 <= index < count:
            raise UserError(f"JAX_PROCESS_ID is {index}: with JAX_NUM_PROCESSES {count} it must be in 0..{count - 1}")
        return ClusterInfo(address, index, count) if count > 1 else None
    if (os.environ.get("JAX_PLATFORMS") or "tpu").split(",")[0] != "tpu":
        return None
    if hosts := os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES"):
        workers = tuple(host.strip().split(":")[0] for host in hosts.split(","))
        reason = "TPU_WORKER_HOSTNAMES names several hosts, so TPU_WORKER_ID must be this one's number"
        worker = _number(os.environ.get, "TPU_WORKER_ID", reason) if len(workers) > 1 else 0
        return _in_slices(workers, worker, os.environ.get)
    if "TPU_SKIP_MDS_QUERY" in os.environ or not any(glob.glob(pattern) for pattern in DEVICES):
        return None
    endpoints, worker = _metadata("worker-network-endpoints"), _metadata("agent-worker-number")
    if not endpoints or not worker:
        return None
    # Older VMs list name:number:address for each worker, newer ones a name or an address alone.
    workers = tuple(endpoint.strip().split(":")[-1] for endpoint in endpoints.split(","))
    variables = _tpu_env()
    return _in_slices(workers, int(worker), lambda name: os.environ.get(name) or variables.get(name))


def _in_slices(workers: tuple[str, ...], worker: int, get: Callable[[str], str | None]) -> ClusterInfo | None:
    """Returns the position of a worker of a slice. Processes of several slices are numbered slice by slice."""
    slices, number, first, hosts = 1, 0, workers[0], workers
    if get("MEGASCALE_NUM_SLICES") not in (None, "", "1"):
        reason = "MEGASCALE_NUM_SLICES is set, so {} must be too"
        slices = _number(get, "MEGASCALE_NUM_SLICES", "it must be a whole number")
        number = _number(get, "MEGASCALE_SLICE_ID", reason.format("MEGASCALE_SLICE_ID"))
        first = (get("MEGASCALE_COORDINATOR_ADDRESS") or "").split(":")[0]
        if not first:
            raise UserError(reason.format("MEGASCALE_COORDINATOR_ADDRESS"))
        hosts = ()  # a slice knows only its own hosts
    count = len(workers) * slices
    if not 0 <= worker < len(workers) or not 0 <= number < slices:
        raise UserError(f"worker {worker} of {len(workers)} in slice {number} of {slices}: TPU_WORKER_ID and "
                         "MEGASCALE_SLICE_ID count from 0")
    port = os.environ.get("JAX_COORDINATOR_PORT") or PORT
    return ClusterInfo(f"{first}:{port}", number * len(workers) + worker, count, hosts) if count > 1 else None


def _number(get: Callable[[str], str | None], name: str, reason: str) -> int:
    try:
        return int(get(name) or "")
    except ValueError:
        raise UserError(f"{name} is {get(name)!r}: {reason}") from None


def _tpu_env() -> dict[str, str]:
    """Reads the metadata's `tpu-env`: lines such as MEGASCALE_NUM_SLICES: '2'."""
    pairs = (line.partition(":") for line in (_metadata("tpu-env") or "").splitlines())
    return {name.strip(): value.strip().strip("'\"") for name, _, value in pairs}


def _metadata(key: str, tries: int = 3) -> str | None:
    """Returns an attribute of this VM; None if it is missing, or if this is no VM of Google Cloud."""
    server = os.environ.get("GCE_METADATA_IP") or os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: it answers only its own VM
    for attempt in range(tries):
        try:
            with opener.open(request, timeout=3) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            problem = error
            if error.code == 404:
                return None
        except OSError as error:
            problem = error
            if isinstance(getattr(error, "reason", None), socket.gaierror):
                return None
        time.sleep(0.5 * (attempt + 1))
    raise OSError(f"{url} does not answer ({problem}), so the number of hosts is not known; set TPU_SKIP_MDS_QUERY=1 "
                  "if this host is alone, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID")
