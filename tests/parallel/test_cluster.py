"""Which process this is: from made-up environments, and from a metadata server on the loopback."""

import http.server
import threading

import pytest

from llava_jax.errors import UserError
from llava_jax.parallel import cluster
from llava_jax.parallel.cluster import ClusterInfo, detect_cluster

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_PLATFORMS", "TPU_PROCESS_ADDRESSES",
         "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "TPU_SKIP_MDS_QUERY", "JAX_COORDINATOR_PORT", "MEGASCALE_NUM_SLICES",
         "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")


@pytest.fixture
def env(monkeypatch, tmp_path):
    """Sets variables in an environment that has none of those that count, on a machine without TPU devices."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cluster, "DEVICES", (str(tmp_path / "accel[0-9]*"),))
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.fixture
def metadata(env, monkeypatch, tmp_path):
    """A machine with a TPU device, and what its metadata server answers (404 for anything else); counts questions."""
    attributes, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            key = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            asked.append(key)
            self.send_response(200 if key in attributes else 404)
            self.end_headers()
            self.wfile.write(attributes.get(key, "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    env(GCE_METADATA_IP=f"127.0.0.1:{server.server_address[1]}")
    (tmp_path / "accel0").touch()
    attributes["asked"] = asked
    yield attributes
    server.shutdown()
    server.server_close()


def test_a_machine_of_its_own_asks_nobody(env):
    assert detect_cluster() is None


def test_three_variables(env):
    env(JAX_COORDINATOR_ADDRESS="10.0.0.1:1234", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3")
    assert detect_cluster() == ClusterInfo("10.0.0.1:1234", 3, 4)
    env(JAX_NUM_PROCESSES="1", JAX_PROCESS_ID="0")
    assert detect_cluster() is None


@pytest.mark.parametrize("wrong, message", [
    ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS is 'host': give host:port"),
    ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'.*must be whole numbers"),
    ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is ''.*must be whole numbers"),
    ({"JAX_PROCESS_ID": "2"}, r"JAX_PROCESS_ID is 2: .* in 0\.\.1"),
])
def test_variables_that_are_wrong(env, wrong, message):
    env(**{"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"} | wrong)
    with pytest.raises(UserError, match=message):
        detect_cluster()


def test_a_pod_of_gke(env):
    env(TPU_WORKER_HOSTNAMES="job-0-0.svc,job-0-1.svc", TPU_WORKER_ID="1")
    assert detect_cluster() == ClusterInfo("job-0-0.svc:8482", 1, 2, ("job-0-0.svc", "job-0-1.svc"))
    env(JAX_PLATFORMS="cpu")
    assert detect_cluster() is None
    env(JAX_PLATFORMS="tpu,cpu", TPU_WORKER_ID="2")
    with pytest.raises(UserError, match="worker 2 of 2 in slice 0 of 1"):
        detect_cluster()
    env(TPU_WORKER_HOSTNAMES="localhost")
    assert detect_cluster() is None


def test_pods_of_two_slices_on_gke(env):
    env(TPU_WORKER_HOSTNAMES="job-1-0,job-1-1", TPU_WORKER_ID="1", MEGASCALE_NUM_SLICES="2", MEGASCALE_SLICE_ID="1",
        MEGASCALE_COORDINATOR_ADDRESS="job-0-0.svc:8080")
    assert detect_cluster() == ClusterInfo("job-0-0.svc:8482", 3, 4)
    env(TPU_WORKER_HOSTNAMES="job-1-0", TPU_WORKER_ID="0", JAX_COORDINATOR_PORT="9000")
    assert detect_cluster() == ClusterInfo("job-0-0.svc:9000", 1, 2)
    env(MEGASCALE_COORDINATOR_ADDRESS="")
    with pytest.raises(UserError, match="MEGASCALE_NUM_SLICES is set, so MEGASCALE_COORDINATOR_ADDRESS must be too"):
        detect_cluster()


@pytest.mark.parametrize("endpoints", ["10.0.0.1,10.0.0.2", "unknown:0:10.0.0.1,unknown:1:10.0.0.2"])
def test_a_tpu_vm_of_compute_engine(metadata, endpoints):
    metadata |= {"worker-network-endpoints": endpoints, "agent-worker-number": "1"}
    assert detect_cluster() == ClusterInfo("10.0.0.1:8482", 1, 2, ("10.0.0.1", "10.0.0.2"))


def test_two_slices_of_compute_engine(metadata):
    metadata |= {"worker-network-endpoints": "10.0.1.1,10.0.1.2", "agent-worker-number": "0",
                 "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
                            "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'\n"}
    assert detect_cluster() == ClusterInfo("10.0.0.1:8482", 2, 4)


def test_one_tpu_vm_is_alone(metadata, env):
    metadata |= {"worker-network-endpoints": "10.0.0.1", "agent-worker-number": "0"}
    assert detect_cluster() is None
    env(TPU_SKIP_MDS_QUERY="1")
    metadata["asked"].clear()
    assert detect_cluster() is None and not metadata["asked"]


def test_devices_elsewhere_than_at_google(metadata):
    assert detect_cluster() is None


def test_a_metadata_server_that_does_not_answer(env, tmp_path, monkeypatch):
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    env(GCE_METADATA_IP="127.0.0.1:9")
    with pytest.raises(OSError, match="worker-network-endpoints does not answer .*set TPU_SKIP_MDS_QUERY=1"):
        detect_cluster()
