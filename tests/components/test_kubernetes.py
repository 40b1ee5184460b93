"""What reaches Kubernetes is valid: rendered jobs and docs/launch/train.yaml against the official schemas.

The Volcano job is compared with its CRD when MUONREC_VOLCANO_CRD names the file (config/crd/volcano/bases/
batch.volcano.sh_jobs.yaml of volcano-sh/volcano). What schemas cannot say, `inconsistencies` does. Nothing here has met
a cluster: scheduling, webhooks, image pulls and volumes are beyond these tests.
"""

import copy
import os
import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("torchx", reason="pip install 'muonrec[torchx]'")
pytest.importorskip("kubernetes", reason="pip install 'muonrec[kubernetes]'")
pytest.importorskip("kubernetes_validate", reason="pip install 'muonrec[dev]'")

import jsonschema
import kubernetes_validate
from kubernetes.utils.quantity import parse_quantity
from torchx.runner import get_runner

from components import stages

ROOT = Path(__file__).parents[2]
VERSIONS = ["1.30", "1.37"]  # the oldest that clouds still serve, and the newest that is known here
MOUNTS = "type=volume,src=muonrec-data,dst=/data,readonly,type=volume,src=muonrec-out,dst=/out".split(",")
SIZE = {"cpu": 8, "gpu": 4, "memMB": 64_000, "mounts": MOUNTS}
APPS = {
    "data": lambda: stages.data(cpu=16, memMB=64_000, mounts=MOUNTS),
    "train": lambda: stages.train("num_epochs=3", j="2x4", out="/out", **SIZE),
    "evaluate": lambda: stages.evaluate(run="/out/a", j="2x4", **SIZE),
    "train on one node": lambda: stages.train(),
}


def rendered(app):
    """The Volcano job that TorchX would submit."""
    with get_runner() as runner:
        info = runner.dryrun(app, scheduler="kubernetes", cfg={"queue": "default", "validate_spec": False})
    return yaml.safe_load(str(info.request))


def pods_of(job):
    """The pods of a Volcano job, by name of their task."""
    return {
        task["name"]: {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": task["name"]}, **task["template"]}
        for task in job["spec"]["tasks"]
    }


def faults(manifest, version):
    """What the schema of ``manifest``'s kind refuses, and what does not fit together in its pod."""
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    spec = manifest["spec"]
    return inconsistencies(spec if manifest["kind"] == "Pod" else spec.get("template", {}).get("spec", {}))


def inconsistencies(spec):
    """What an API server refuses in a pod's spec though its schema allows it."""
    found = []
    if spec.get("restartPolicy", "Never") not in ("Never", "OnFailure", "Always"):
        found.append(f"restartPolicy {spec['restartPolicy']}")
    names = [volume["name"] for volume in spec.get("volumes", [])]
    for container in spec.get("containers", []):
        for name in (container["name"], *names):
            if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
                found.append(f"name {name}")
        found += [f"volume {m['name']}" for m in container.get("volumeMounts", []) if m["name"] not in names]
        resources = container.get("resources", {})
        limits, requests = resources.get("limits", {}), resources.get("requests", {})
        found += [
            f"request {name}"
            for name, value in requests.items()
            if name in limits and parse_quantity(value) > parse_quantity(limits[name])
        ]
    return found


@pytest.mark.filterwarnings(r"ignore:\s*Role ")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", APPS)
def test_every_rendered_pod_is_valid(name, version):
    for task, pod in pods_of(rendered(APPS[name]())).items():
        assert faults(pod, version) == [], task


@pytest.mark.parametrize("version", VERSIONS)
def test_the_plain_job_and_its_service_are_valid(version):
    service, job = yaml.safe_load_all((ROOT / "docs" / "launch" / "train.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert faults(service, version) == [] and faults(job, version) == []


def test_the_plain_job_finds_its_first_pod():
    service, job = yaml.safe_load_all((ROOT / "docs" / "launch" / "train.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    # The label that the job controller gives, and the name that the service gives.
    assert service["spec"]["selector"] == {"job-name": name} and pod["subdomain"] == service["metadata"]["name"]
    command = pod["containers"][0]["command"][-1]
    assert f"--rdzv-endpoint {name}-0.{service['metadata']['name']}:29500" in command
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2
    assert "--nnodes 2" in command and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in str(pod["containers"][0]["env"])
    patience = int(re.search(r"--shutdown-timeout (\d+)", command)[1])
    assert pod["terminationGracePeriodSeconds"] > patience >= 120


@pytest.mark.filterwarnings(r"ignore:\s*Role ")
def test_a_pod_has_what_a_run_needs():
    job = rendered(APPS["train"]())
    assert list(pods_of(job)) == ["train-0", "train-1"] and job["spec"]["maxRetry"] == 3
    for pod in pods_of(job).values():
        spec = pod["spec"]
        (container,) = spec["containers"]
        # TorchX keeps 100 millicores and 1024 MB back for the node.
        assert container["resources"] == {
            "limits": {"cpu": "8000m", "memory": "64000M", "nvidia.com/gpu": "4"},
            "requests": {"cpu": "7900m", "memory": "62976M", "nvidia.com/gpu": "4"},
        }
        volumes = {volume.pop("name"): volume for volume in spec["volumes"]}
        where = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert where["/dev/shm"] == {"emptyDir": {"medium": "Memory"}}
        assert where["/data"] == {"persistentVolumeClaim": {"claimName": "muonrec-data"}}
        assert where["/out"] == {"persistentVolumeClaim": {"claimName": "muonrec-out"}}
        assert [m.get("readOnly", False) for m in container["volumeMounts"]] == [False, True, False]
        assert spec["terminationGracePeriodSeconds"] == 135 and "--shutdown-timeout 120" in container["command"][-1]
        assert spec["securityContext"]["fsGroup"] == 1000
        assert spec["restartPolicy"] == "Never"


@pytest.mark.filterwarnings(r"ignore:\s*Role ")
def test_fields_of_ones_own_are_added_to_the_pod(tmp_path):
    file = tmp_path / "pod.yaml"
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    own = {"nodeSelector": {"pool": "gpu"}, "tolerations": tolerations, "terminationGracePeriodSeconds": 600}
    file.write_text(yaml.safe_dump({"metadata": {"labels": {"team": "ranking"}}, "spec": own}))
    for pod in pods_of(rendered(stages.train(j="2x1", pod=str(file)))).values():
        assert {key: pod["spec"][key] for key in own} == own
        assert pod["metadata"]["labels"]["team"] == "ranking" and "enableServiceLinks" in pod["spec"]
        assert faults(pod, VERSIONS[-1]) == []


# Deliberately broken --------------------------------------------------------------------------------------------------


def container(pod):
    return pod["spec"]["containers"][0]


BROKEN = {
    "a field that is misspelled": lambda pod: pod["spec"].update(terminationGracePeriodSecond=3),
    "a field of a container that is misspelled": lambda pod: container(pod).update(imge="a"),
    "a period that is no number": lambda pod: pod["spec"].update(terminationGracePeriodSeconds="long"),
    "no containers": lambda pod: pod["spec"].pop("containers"),
    "a container without a name": lambda pod: container(pod).pop("name"),
    "a variable that is no text": lambda pod: container(pod)["env"].append({"name": "A", "value": {"b": 1}}),
    "a command that is no list": lambda pod: container(pod).update(command="bash -c true"),
    "a claim without a name": lambda pod: pod["spec"]["volumes"][1].update(persistentVolumeClaim={}),
    "a volume that does not exist": lambda pod: container(pod)["volumeMounts"].append({"name": "x", "mountPath": "/x"}),
    "a request above its limit": lambda pod: container(pod)["resources"]["requests"].update(memory="1Ti"),
    "a restart policy that does not exist": lambda pod: pod["spec"].update(restartPolicy="Sometimes"),
    "a name that is none for DNS": lambda pod: container(pod).update(name="Train_0"),
}


@pytest.mark.filterwarnings(r"ignore:\s*Role ")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pod_is_refused(name):
    pod = next(iter(pods_of(rendered(APPS["train"]())).values()))
    assert faults(pod, VERSIONS[-1]) == []
    BROKEN[name](pod)
    assert faults(pod, VERSIONS[-1]) != []


# Volcano --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def volcano():
    """The schema of a Volcano job, unknown fields refused."""
    path = os.environ.get("MUONREC_VOLCANO_CRD")
    if not path:
        pytest.skip("set MUONREC_VOLCANO_CRD to batch.volcano.sh_jobs.yaml of volcano-sh/volcano")
    crd = next(doc for doc in yaml.safe_load_all(Path(path).read_text()) if doc)
    (version,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1alpha1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def closed(schema):
    """A CRD's structural schema as a JSON schema that refuses what it does not know."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if schema.pop("x-kubernetes-int-or-string", None):
        schema.pop("anyOf", None)
        schema["type"] = ["integer", "string"]
    if schema.pop("nullable", None) and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    open_on_purpose = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and "properties" in schema and not open_on_purpose:
        schema["additionalProperties"] = False
    return schema


@pytest.mark.filterwarnings(r"ignore:\s*Role ")
@pytest.mark.parametrize("name", APPS)
def test_every_rendered_job_follows_volcanos_crd(name, volcano):
    job = rendered(APPS[name]())
    assert (job["apiVersion"], job["kind"]) == ("batch.volcano.sh/v1alpha1", "Job")
    assert [error.message for error in volcano.iter_errors(job)] == []
    for change in ({"maxRetries": 3}, {"maxRetry": "three"}, {"tasks": {}}):
        broken = copy.deepcopy(job)
        broken["spec"].update(change)
        assert list(volcano.iter_errors(broken)), change
