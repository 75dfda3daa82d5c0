"""scripts/gke.sh: the manifest that it renders, read with YAML, and its calls of a kubectl that only records them."""

import re

import pytest
import yaml

SETTINGS = {
    "GKE_NAME": "llava", "GKE_TPU": "v5e", "GKE_TOPOLOGY": "8x8", "GKE_IMAGE": "us-docker.pkg.dev/lab/r/llava:1",
    "GKE_INPUTS": "gs://bucket/my inputs",
}
TRAIN = ["python", "-m", "llava_jax.train", "llava_1_5_7b"]
HAS_JOBSET = ["get", "crd", "jobsets.jobset.x-k8s.io"]


def rendered(play, *command, **settings) -> dict:
    result = play.run("gke.sh", "render", *command or TRAIN, **SETTINGS | settings)
    assert result.returncode == 0, result.stderr
    assert not re.search(r"\$\{[A-Z]+\}", result.stdout.replace("${HOSTS} kept", ""))
    return yaml.safe_load(result.stdout)


def parts(manifest: dict) -> tuple[dict, dict, dict]:
    """A slice's Job, its pod, and the training container."""
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    return job, pod, pod["containers"][0]


# chips of a topology, and the machines of four chips that hold them
@pytest.mark.parametrize("tpu, topology, slices, accelerator, hosts, chips", [
    ("v5e", "8x8", "1", "tpu-v5-lite-podslice", 16, 4),
    ("v5e", "16x16", "2", "tpu-v5-lite-podslice", 64, 4),
    ("v5e", "1x1", "1", "tpu-v5-lite-podslice", 1, 1),
    ("v6e", "4x8", "1", "tpu-v6e-slice", 8, 4),
    ("v6e", "2x4", "3", "tpu-v6e-slice", 2, 4),
    ("v4", "2x2x4", "1", "tpu-v4-podslice", 4, 4),
    ("v5p", "4x4x4", "2", "tpu-v5p-slice", 16, 4),
    ("tpu7x", "2x2x1", "1", "tpu7x", 1, 4),
])
def test_one_pod_for_each_machine(play, tpu, topology, slices, accelerator, hosts, chips):
    manifest = rendered(play, GKE_TPU=tpu, GKE_TOPOLOGY=topology, GKE_SLICES=slices)
    job, pod, train = parts(manifest)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["annotations"] == \
        {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == int(slices)
    assert job["completions"] == job["parallelism"] == hosts
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": topology}
    assert train["resources"] == {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}}
    mounts = {mount["name"] for container in (*pod["initContainers"], train) for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_each_run_has_a_secret_of_its_own(play):
    secrets = [entry["value"] for _ in range(2) for entry in parts(rendered(play))[2]["env"]
               if entry["name"] == "LLAVA_JAX_SECRET"]
    assert len(set(secrets)) == 2 and all(re.fullmatch("[0-9a-f]{32}", secret) for secret in secrets)


def test_exit_codes_decide_what_happens(play):
    """0 ends it; 2 fails all at once; 75 and a lost node restart for nothing; any other code counts as a restart."""
    spec = rendered(play, GKE_RETRIES="7")["spec"]
    job, pod, _ = parts({"spec": spec})
    policy = spec["failurePolicy"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (7, "BlockingRecreate")
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")  # a pod's failure is its Job's
    rules = job["podFailurePolicy"]["rules"]
    assert {rule["action"] for rule in rules} == {"FailJob"}

    def outcome(code: int | None) -> str:
        """As documented: the Job's first matching rule gives reason and message, these the JobSet's action."""
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        for index, rule in enumerate(rules):
            exits, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
            if exits and exits["containerName"] == "train" and exits["operator"] == "In" and code in exits["values"] \
                    or conditions == [{"type": "DisruptionTarget", "status": "True"}] and code is None:
                reason, message = "PodFailurePolicy", f"exit code {code} matching FailJob rule at index {index}"
                break
        for rule in policy["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
        return "RestartJobSet"

    assert outcome(2) == "FailJobSet"
    assert outcome(75) == outcome(None) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(1) == outcome(137) == "RestartJobSet"


@pytest.mark.parametrize("argument", [
    "it's \"so\"", "a: b # c", "- {x}, [y]", "$HOME `id`", "back\\slash \\n", "tab\tand\nline", "", "ü",
    "& ${HOSTS} kept",
])
def test_arguments_stay_as_they_are(play, argument):
    manifest = rendered(play, *TRAIN, argument, "last")
    assert parts(manifest)[2]["args"] == [*TRAIN, argument, "last"]


def test_what_kubernetes_would_replace_is_escaped(play):
    assert parts(rendered(play, "echo", "$(HOME)"))[2]["args"] == ["echo", "$$(HOME)"]


def test_the_command_is_the_first_process_and_finds_the_inputs(play):
    _, pod, train = parts(rendered(play))
    assert train["command"] == ["bash", "-c", 'ln -sfn /inputs/* . && exec "$@"', "bash"]
    inputs, = pod["initContainers"]
    assert inputs["command"] == ["gcloud", "storage", "rsync", "--recursive", "gs://bucket/my inputs", "/inputs"]
    assert pod["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("settings, words", [
    ({"GKE_NAME": "LLaVA"}, "GKE_NAME LLaVA"),
    ({"GKE_IMAGE": None}, "GKE_IMAGE is not set"),
    ({"GKE_TPU": "v5litepod"}, "v6e and tpu7x"),
    ({"GKE_TOPOLOGY": "4x4x4"}, "2 dimensions, such as 8x8"),
    ({"GKE_TPU": "v5p"}, "3 dimensions, such as 4x4x4"),
    ({"GKE_TOPOLOGY": "8x"}, "8x:"),
    ({"GKE_TOPOLOGY": "3x3"}, "its 9 chips"),
    ({"GKE_TOPOLOGY": "2x2", "GKE_SLICES": "2"}, "two machines"),
    ({"GKE_SLICES": "0"}, "GKE_SLICES 0"),
    ({"GKE_RETRIES": "x"}, "GKE_RETRIES x"),
    ({"GKE_INPUTS": "/data"}, "gs://"),
])
def test_a_wrong_setting_starts_nothing(play, settings, words):
    result = play.run("gke.sh", "start", *TRAIN, **SETTINGS | settings)
    assert result.returncode == 2 and result.stdout == "" and play.calls("kubectl") == []
    line, = result.stderr.splitlines()
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize("args, words", [
    (["begin"], "no such command"), (["start"], "no command to run"), (["logs", "a"], "logs [WORKER [SLICE]]"),
    (["render", "x\x07"], "control character"),
])
def test_a_wrong_command_line_starts_nothing(play, args, words):
    result = play.run("gke.sh", *args, **SETTINGS)
    assert result.returncode == 2 and words in result.stderr.splitlines()[-1] and play.calls("kubectl") == []


def test_start_sends_what_render_prints(play):
    assert play.run("gke.sh", "start", *TRAIN, **SETTINGS).returncode == 0
    assert play.calls("kubectl") == [HAS_JOBSET, ["create", "-f", "-"]]
    created, shown = yaml.safe_load((play.folder / "created.yaml").read_text()), rendered(play)
    for manifest in (created, shown):
        assert parts(manifest)[2]["env"].pop()["name"] == "LLAVA_JAX_SECRET"  # new each time
    assert created == shown


def test_start_where_jobset_is_missing(play):
    play.plan({"when": "get crd", "exit": 1, "stderr": 'Error from server (NotFound): "jobsets" not found\n'})
    result = play.run("gke.sh", "start", *TRAIN, **SETTINGS)
    assert result.returncode == 2 and "the cluster has no JobSet" in result.stderr
    play.plan({"when": "get crd", "exit": 1, "stderr": "warning\nThe connection was refused\n"})
    result = play.run("gke.sh", "start", *TRAIN, **SETTINGS)
    assert result.returncode == 2 and result.stderr == "error: kubectl: The connection was refused\n"
    assert play.calls("kubectl") == [HAS_JOBSET, HAS_JOBSET]


def test_start_of_a_name_that_exists(play):
    play.plan({"when": "create", "exit": 1, "stderr": "Error from server (AlreadyExists)\n"})
    result = play.run("gke.sh", "start", *TRAIN, **SETTINGS)
    assert result.returncode == 1 and "AlreadyExists" in result.stderr and "gke.sh stop" in result.stderr


def test_status_logs_and_stop_need_the_name_alone(play):
    name = {"GKE_NAME": "llava"}
    assert play.run("gke.sh", "status", **name).returncode == 0
    assert play.run("gke.sh", "logs", "3", "1", **name).returncode == 0
    result = play.run("gke.sh", "stop", **name)
    assert result.returncode == 0 and "node pools stay" in result.stderr
    chosen = "jobset.sigs.k8s.io/jobset-name=llava"
    assert [call for call in play.calls("kubectl") if call != HAS_JOBSET] == [
        ["get", "jobset", "llava"],
        ["get", "pods", "--output=wide", f"--selector={chosen}"],
        ["logs", "--follow", "--tail=100", "--container=train",
         f"--selector={chosen},jobset.sigs.k8s.io/job-index=1,batch.kubernetes.io/job-completion-index=3"],
        ["delete", "jobset", "llava", "--ignore-not-found"],
    ]
    play.plan({"when": "get jobset", "exit": 1})
    assert play.run("gke.sh", "status", **name).returncode == 1
