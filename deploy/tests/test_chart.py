"""The Helm chart and what kustomize gets from it: rendered, validated, and refused where it must be."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import warnings
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[1]
CHART = DEPLOY / "helm" / "dpfa"
CRDS = Path(os.environ.get("DPFA_CRDS", DEPLOY.parents[1] / "shared" / "crds"))
EXAMPLES = sorted(CHART.glob("values*.yaml"))
# Every optional part at least once, on top of a whole example: (values file, --set, or --set-json where it says :=).
FEATURES = {
    "train-job-on-one-node": ("values-one-node.yaml", ["training.kind=TrainJob"]),
    "somebody-elses-runtime": (
        "values-one-cluster.yaml",
        ["training.runtime.create=false", "training.runtime.name=torch-distributed"],
    ),
    "job-in-a-queue": ("values-one-node.yaml", ["training.queue=private-training", "vpa.enabled=true"]),
    "script-from-values": ("values-one-node.yaml", ["training.inlineScript=print('mine')"]),
    "further-environment": (
        "values-one-cluster.yaml",
        ["training.env[0].name=NCCL_DEBUG", "training.env[0].value=INFO"],
    ),
    "private-registry": (
        "values-one-cluster.yaml",
        ["image.pullSecrets[0].name=regcred", "image.digest=sha256:" + "0" * 64],
    ),
    "evidence": (
        "values-one-cluster.yaml",
        ["evidence.enabled=true", "evidence.model=run-1/model", "evidence.signingKey.existingSecret=dpfa-signing-key"],
    ),
    "evidence-on-sqlite": (
        "values-one-node.yaml",
        ["evidence.enabled=true", "evidence.model=run-1/model", "evidence.signingKey.existingSecret=dpfa-signing-key"],
    ),
    "append-only-backup": ("values-one-cluster.yaml", ["backup.keep=null"]),
    "pushgateway": (
        "values-one-cluster.yaml",
        ["monitoring.pushgateway=push.monitoring:9091", "networkPolicy.pushgateway.to[0].podSelector.matchLabels.a=b"],
    ),
    "no-metrics": ("values-one-node.yaml", ["monitoring.port=null"]),
    "rolling": ("values-one-cluster.yaml", ["serving.strategy=rolling"]),
    "canary": ("values-one-cluster.yaml", ["serving.strategy=canary"]),
    "canary-that-waits-for-a-person": (
        "values-one-cluster.yaml",
        ["serving.strategy=canary", "serving.canary.steps[0].weight=5"],
    ),
    "gate-with-sqlite": (
        "values-one-node.yaml",
        [
            "serving.enabled=true",
            "serving.strategy=blueGreen",
            "serving.model.path=run-1/model",
            "gate.maxEpsilon=3",
            "gate.maxDelta:=0.00001",
            "gate.publicKey.existingConfigMap=dpfa-public-key",
        ],
    ),
    "gate-without-ledger": ("values-one-cluster.yaml", ["gate.ledger=false", "gate.requireAudit=true"]),
    "istio": ("values-one-cluster.yaml", ["istio.enabled=true", "istio.hosts[0]=model.example.org"]),
    "istio-canary": (
        "values-region-a.yaml",
        [
            "istio.enabled=true",
            "istio.hosts[0]=model.example.org",
            "istio.gateway.create=false",
            "istio.gateway.name=istio-system/shared",
        ],
    ),
    "no-network-policy": ("values-one-cluster.yaml", ["networkPolicy.enabled=false"]),
}
ONE_NODE = "values-one-node.yaml"
CLUSTER = "values-one-cluster.yaml"
# Values that must be refused: (values file, --set, a piece of the error).
REFUSED = {
    "unknown-key": (CLUSTER, ["trainning.enabled=true"], "trainning"),
    "unknown-inner-key": (CLUSTER, ["training.privacy.epsilon=3"], "epsilon"),
    "kind": (CLUSTER, ["training.kind=PyTorchJob"], "training/kind"),
    "strategy": (CLUSTER, ["serving.strategy=bluegreen"], "serving/strategy"),
    "text-for-a-number": (CLUSTER, ["training.nodes=two"], "training/nodes"),
    "half-a-node": (CLUSTER, ["training.nodes:=1.5"], "training/nodes"),
    "no-epsilon": (CLUSTER, ["training.privacy.targetEpsilon=0"], "training/privacy/targetEpsilon"),
    "negative-epsilon": (CLUSTER, ["training.privacy.targetEpsilon=-1"], "training/privacy/targetEpsilon"),
    "delta-of-one": (CLUSTER, ["training.privacy.targetDelta=1"], "training/privacy/targetDelta"),
    "gate-without-epsilon": (CLUSTER, ["gate.maxEpsilon=0"], "gate/maxEpsilon"),
    "tag-latest": (CLUSTER, ["image.tag=latest"], "image/tag"),
    "long-name": (CLUSTER, ["fullnameOverride=a-prefix-of-more-than-26-letters"], "fullnameOverride"),
    "digest": (CLUSTER, ["image.digest=sha256:abc"], "image/digest"),
    "low-port": (CLUSTER, ["serving.port=80"], "serving/port"),
    "weight": (CLUSTER, ["serving.canary.steps[0].weight=100"], "weight"),
    "weight-as-text": (CLUSTER, ["serving.canary.steps[0].weight=ten"], "weight"),
    "schedule": (CLUSTER, ["backup.schedule=hourly"], "backup/schedule"),
    "own-ledger-in-the-environment": (CLUSTER, ["training.env[0].name=DPFA_LEDGER"], "training/env/0/name"),
    "path-out-of-the-claim": (CLUSTER, ["serving.model.path=../other"], "serving/model/path"),
    "path-in-the-claim-and-out": (CLUSTER, ["serving.model.path=run-1/../../other"], "serving/model/path"),
    "sqlite-on-many-nodes": (ONE_NODE, ["ledger.sqlite.accessMode=ReadWriteMany"], "ledger/sqlite/accessMode"),
    "peer-that-is-everybody": (CLUSTER, ["networkPolicy.backup.to[0].cidr=0.0.0.0/0"], "cidr"),
    "sqlite-in-several-regions": (ONE_NODE, ["regions={a,b}", "region=a"], "several regions"),
    "sqlite-behind-a-hub": (ONE_NODE, ["multiKueue.dispatched=true"], "sqlite with multiKueue"),
    "sqlite-over-nodes": (ONE_NODE, ["training.kind=TrainJob", "training.nodes=2"], "sqlite with training.nodes"),
    "sqlite-anywhere": (ONE_NODE, ["ledger.sqlite.node="], "ledger.sqlite.node is empty"),
    "witness-beside-its-ledger": (ONE_NODE, ["ledger.witness.existingClaim=dpfa-ledger"], "use another disk"),
    "two-witnesses": (ONE_NODE, ["ledger.witness.existingSecret=other"], "one witness"),
    "witness-file-for-a-server": (
        CLUSTER,
        ["ledger.witness.existingSecret=", "ledger.witness.existingClaim=w"],
        "pods on several nodes",
    ),
    "no-ledger": (CLUSTER, ["ledger.postgresql.existingSecret="], "ledger.postgresql.existingSecret is empty"),
    "region-that-is-none": ("values-region-a.yaml", ["region=region-c"], "is not one of regions"),
    "no-data-set": (CLUSTER, ["training.privacy.dataset="], "training.privacy.dataset is empty"),
    "no-target": (CLUSTER, ["training.privacy.targetEpsilon=null"], "targetEpsilon is not set"),
    "no-batch": (CLUSTER, ["training.privacy.expectedBatchSize=null"], "expectedBatchSize is not set"),
    "no-records": (CLUSTER, ["training.data.existingClaim="], "training.data.existingClaim is empty"),
    "half-a-budget": (CLUSTER, ["training.privacy.datasetBudgetDelta=null"], "go together"),
    "target-above-budget": (CLUSTER, ["training.privacy.targetEpsilon=7"], "above datasetBudgetEpsilon"),
    "job-of-two-nodes": (CLUSTER, ["training.kind=Job"], "not started as a gang"),
    "checkpoints-of-one-node": (CLUSTER, ["checkpoints.accessMode=ReadWriteOnce"], "ReadWriteMany"),
    "hub-without-clusters": ("values-hub.yaml", ["multiKueue.clusters=null"], "multiKueue.clusters"),
    "hub-without-queue": ("values-hub.yaml", ["training.queue="], "training.queue"),
    "runtime-of-nobody": (CLUSTER, ["training.runtime.create=false"], "training.runtime.name"),
    "backup-to-nowhere": (CLUSTER, ["backup.existingSecret="], "backup.existingSecret is empty"),
    "model-of-nobody": (CLUSTER, ["serving.model.path="], "serving.model.path is empty"),
    "gate-without-limit": (CLUSTER, ["gate.maxDelta=null"], "gate.maxEpsilon and gate.maxDelta"),
    "gate-without-key": (CLUSTER, ["gate.publicKey.existingConfigMap="], "gate.publicKey.existingConfigMap is empty"),
    "evidence-without-key": (CLUSTER, ["evidence.enabled=true", "evidence.model=run-1/model"], "unsigned evidence"),
    "undrainable": (CLUSTER, ["serving.pdb.minAvailable=2"], "no node could be drained"),
    "hpa-upside-down": (CLUSTER, ["serving.hpa.minReplicas=9"], "minReplicas is above"),
    "mesh-for-nothing": (ONE_NODE, ["istio.enabled=true", "istio.hosts[0]=a"], "nothing to route to"),
    "mesh-without-host": (CLUSTER, ["istio.enabled=true"], "istio.hosts is empty"),
    "every-path": (CLUSTER, ["istio.paths[0]=/"], "istio/paths/0"),
}
# What upstream's CRDs, Kubernetes' schemas and the rules below must find: (variant, kind, where, value).
MISTAKES: dict[str, tuple[str, str, Callable[[dict[str, Any]], None]]] = {
    "runtimRef": ("values-one-cluster.yaml", "TrainJob", lambda it: _rename(it["spec"], "runtimeRef", "runtimRef")),
    "podTemplateOverrides": (
        "values-one-cluster.yaml",
        "TrainJob",
        lambda it: _rename(it["spec"], "runtimePatches", "podTemplateOverrides"),
    ),
    "managedBy-nobody": (
        "values-hub.yaml",
        "TrainJob",
        lambda it: it["spec"].update(managedBy="kueue.x-k8s.io/multi-kueue"),
    ),
    "no-process": ("values-one-cluster.yaml", "TrainJob", lambda it: it["spec"]["trainer"].update(numProcPerNode=0)),
    "name-with-a-dot": ("values-one-cluster.yaml", "TrainJob", lambda it: it["metadata"].update(name="run.1")),
    "two-frameworks": (
        "values-one-cluster.yaml",
        "TrainingRuntime",
        lambda it: it["spec"]["mlPolicy"].update(jax={}),
    ),
    "restart-action": (
        "values-one-cluster.yaml",
        "TrainingRuntime",
        lambda it: it["spec"]["template"]["spec"]["failurePolicy"]["rules"][0].update(action="Fail"),
    ),
    "old-trainer-api": (
        "values-one-cluster.yaml",
        "TrainJob",
        lambda it: it.update(apiVersion="trainer.kubeflow.org/v1"),
    ),
    "templatName": (
        "values-one-cluster.yaml",
        "Rollout",
        lambda it: _rename(
            it["spec"]["strategy"]["blueGreen"]["prePromotionAnalysis"]["templates"][0], "templateName", "templatName"
        ),
    ),
    "setWeight-as-text": (
        "values-region-a.yaml",
        "Rollout",
        lambda it: it["spec"]["strategy"]["canary"]["steps"][1].update(setWeight="10"),
    ),
    "no-active-service": (
        "values-one-cluster.yaml",
        "Rollout",
        lambda it: it["spec"]["strategy"]["blueGreen"].pop("activeService"),
    ),
    "metric-without-provider": (
        "values-one-cluster.yaml",
        "AnalysisTemplate",
        lambda it: it["spec"]["metrics"][0].pop("provider"),
    ),
    "sizeLimt": (
        "values-one-node.yaml",
        "Job",
        lambda it: _rename(it["spec"]["template"]["spec"]["volumes"][2]["emptyDir"], "sizeLimit", "sizeLimt"),
    ),
    "port-as-text": ("values-one-cluster.yaml", "Service", lambda it: it["spec"]["ports"][0].update(port="80")),
    "no-such-kind": ("values-one-node.yaml", "CronJob", lambda it: it.update(kind="CronJobs")),
    "no-such-version": ("values-one-node.yaml", "CronJob", lambda it: it.update(apiVersion="batch/v1beta1")),
}


def _rename(it: dict[str, Any], old: str, new: str) -> None:
    it[new] = it.pop(old)


@pytest.fixture(scope="module")
def manifests() -> ModuleType:
    spec = spec_from_file_location("dpfa_manifests", DEPLOY / "manifests.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def schemas(manifests: ModuleType) -> Any:
    found = manifests.Schemas(CRDS)
    missing = sorted({"TrainJob", "TrainingRuntime", "Rollout", "AnalysisTemplate"} - found.kinds())
    if missing:
        absent = f"{CRDS} has no CRD of {', '.join(missing)} (DPFA_CRDS): manifests of these kinds are NOT CHECKED"
        if "DPFA_CRDS" in os.environ:
            pytest.fail(absent)
        warnings.warn(absent, stacklevel=2)
    return found


@pytest.fixture(scope="module")
def helm(tool: Callable[[str], str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    program = tool("helm")

    def run(verb: list[str], values: Path, *settings: str) -> subprocess.CompletedProcess[str]:
        options = [
            option
            for each in settings
            for option in (("--set-json", each.replace(":=", "=")) if ":=" in each else ("--set", each))
        ]
        command = [program, *verb, str(CHART), "--namespace", "dpfa", "--values", str(values), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture(scope="module")
def rendered(helm: Callable[..., Any], manifests: ModuleType) -> dict[str, list[dict[str, Any]]]:
    """By example or feature: its manifests, and the pods that custom kinds will start."""
    variants = {each.name: (each.name, []) for each in EXAMPLES} | FEATURES
    found = {}
    for name, (values, settings) in variants.items():
        done = helm(["template", "dpfa"], CHART / values, *settings)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        found[name] = manifests.documents(done.stdout)
        found[name] += manifests.pods(found[name])
    return found


def only(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    found = [each for each in documents if each["kind"] == kind]
    assert found, f"no {kind}"
    return found[0]


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda each: each.name)
def test_lint_finds_nothing(values: Path, helm: Callable[..., Any]) -> None:
    done = helm(["lint", "--strict"], values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", REFUSED)
def test_bad_values_are_refused_by_name(name: str, helm: Callable[..., Any]) -> None:
    values, settings, expected = REFUSED[name]
    good = helm(["template", "dpfa"], CHART / values)
    assert good.returncode == 0, good.stderr
    done = helm(["template", "dpfa"], CHART / values, *settings)
    assert done.returncode != 0, f"{settings} was rendered"
    assert expected in done.stderr.replace("'", "").replace("at /", ""), done.stderr


def test_every_value_is_described_and_every_object_closed() -> None:
    schema, values = (
        json.loads((CHART / "values.schema.json").read_text()),
        yaml.safe_load((CHART / "values.yaml").read_text()),
    )

    def walk(schema: dict[str, Any], value: Any, path: str) -> None:
        assert not path or schema.get("description"), f"{path} has no description"
        if isinstance(value, dict) and "properties" in schema:
            assert schema["additionalProperties"] is False, f"{path or 'the root'} takes unknown keys"
            more = set(schema["properties"]) - set(value) - {"global"}
            assert not more or path == "backup.keep", f"{path}: {more} are in the schema and not in values.yaml"
            for key, each in value.items():
                walk(schema["properties"][key], each, f"{path}.{key}".lstrip("."))

    walk(schema, values, "")
    undocumented = [
        line
        for line in (CHART / "values.yaml").read_text().splitlines()
        if line.strip()
        and "#" not in line
        and not line.rstrip().endswith(":")
        and "namespaceSelector" not in line
        and not line.lstrip().startswith(("requests:", "limits:"))
    ]
    assert undocumented == []


# ---- manifests ------------------------------------------------------------------------------------------------------


def test_every_manifest_fits_its_schema(rendered: dict[str, list[dict[str, Any]]], schemas: Any) -> None:
    unlike = {json.dumps(it, sort_keys=True): it for found in rendered.values() for it in found}
    assert [problem for it in unlike.values() for problem in schemas.problems(it)] == []
    kinds = {it["kind"] for found in rendered.values() for it in found}
    assert {
        "TrainJob",
        "TrainingRuntime",
        "Job",
        "Rollout",
        "Deployment",
        "AnalysisTemplate",
        "VirtualService",
    } <= kinds


@pytest.mark.parametrize("name", MISTAKES)
def test_the_schemas_find_planted_mistakes(name: str, rendered: dict[str, list[dict[str, Any]]], schemas: Any) -> None:
    variant, kind, spoil = MISTAKES[name]
    manifest = copy.deepcopy(only(rendered[variant], kind))
    assert schemas.problems(manifest) == []
    spoil(manifest)
    # Without its CRD a kind cannot be checked; the fixture has said so.
    if kind in schemas.kinds() or kind in ("Job", "CronJob", "Service"):
        assert schemas.problems(manifest), f"{name} passed"


def unsafe(documents: list[dict[str, Any]]) -> set[str]:
    """What a pod may do that it should not, or that a claim, policy or token is not as promised."""
    found = set()
    for it in documents:
        kind, spec = it["kind"], it.get("spec", {})
        if kind in ("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding", "Secret"):
            found.add(kind)
        if kind == "ServiceAccount" and it.get("automountServiceAccountToken") is not False:
            found.add("token")
        if kind == "PersistentVolumeClaim":
            if it["metadata"].get("annotations", {}).get("helm.sh/resource-policy") != "keep":
                found.add("claim is deleted")
            if "ledger" in it["metadata"]["name"] and spec["accessModes"] != ["ReadWriteOnce"]:
                found.add("ledger on a network")
        if kind == "VerticalPodAutoscaler" and spec["updatePolicy"]["updateMode"] != "Off":
            found.add("VPA evicts")
        if kind == "PeerAuthentication" and spec["mtls"]["mode"] != "STRICT":
            found.add("mTLS is optional")
        if kind == "NetworkPolicy":
            rules = [*spec.get("ingress", []), *spec.get("egress", [])]
            if any(not rule.get("from") and not rule.get("to") for rule in rules):
                found.add("network open to everybody")
        pod = {
            "Pod": lambda spec: spec,
            "Job": lambda spec: spec["template"]["spec"],
            "Deployment": lambda spec: spec["template"]["spec"],
            "CronJob": lambda spec: spec["jobTemplate"]["spec"]["template"]["spec"],
        }.get(kind, lambda spec: None)(spec)
        if pod is None:
            continue
        security = pod.get("securityContext", {})
        if not security.get("runAsNonRoot") or security.get("seccompProfile") != {"type": "RuntimeDefault"}:
            found.add("root or unconfined")
        if any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")) or any(
            "hostPath" in volume for volume in pod.get("volumes", [])
        ):
            found.add("host")
        # The runtimes of others may leave it out: the ServiceAccount has no token either way.
        if pod.get("automountServiceAccountToken") is True:
            found.add("token")
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            own = container.get("securityContext", {})
            if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
                found.add("privileged")
            if not own.get("readOnlyRootFilesystem") or own.get("capabilities") != {"drop": ["ALL"]}:
                found.add("writable root or capabilities")
            limits = container.get("resources", {})
            if not {"cpu", "memory"} <= set(limits.get("requests", {})) & set(limits.get("limits", {})):
                found.add("no resources")
            for each in container.get("env", []):
                if (
                    each["name"].startswith("DPFA_LEDGER")
                    and "://" in each.get("value", "")
                    and "sqlite:" not in each["value"]
                ):
                    found.add("password in a manifest")
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            opens_file = any(
                each["name"].startswith("DPFA_LEDGER") and "sqlite:" in each.get("value", "")
                for each in container.get("env", [])
            )
            if opens_file and "kubernetes.io/hostname" not in pod.get("nodeSelector", {}):
                found.add("ledger on any node")
            if opens_file and "ledger" not in mounted:
                found.add("ledger in a container")
            if "signing-key" in mounted and container["name"] != "report":
                found.add("signing key at large")
    return found


SPOILT: dict[str, tuple[str, str, Callable[[dict[str, Any]], Any]]] = {
    "token": (ONE_NODE, "ServiceAccount", lambda it: it.update(automountServiceAccountToken=True)),
    "privileged": (ONE_NODE, "Job", lambda it: _container(it)["securityContext"].update(privileged=True)),
    "writable root or capabilities": (
        CLUSTER,
        "Pod",
        lambda it: it["spec"]["containers"][0]["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    "root or unconfined": (CLUSTER, "Pod", lambda it: it["spec"]["securityContext"].pop("seccompProfile")),
    "host": (CLUSTER, "Pod", lambda it: it["spec"].update(hostNetwork=True)),
    "no resources": (ONE_NODE, "Job", lambda it: _container(it)["resources"]["limits"].pop("memory")),
    "ledger on any node": (ONE_NODE, "Job", lambda it: it["spec"]["template"]["spec"].pop("nodeSelector")),
    "ledger in a container": (ONE_NODE, "Job", lambda it: _container(it).update(volumeMounts=[])),
    "ledger on a network": (
        ONE_NODE,
        "PersistentVolumeClaim",
        lambda it: it["spec"].update(accessModes=["ReadWriteMany"]),
    ),
    "claim is deleted": (ONE_NODE, "PersistentVolumeClaim", lambda it: it["metadata"].pop("annotations")),
    "password in a manifest": (
        CLUSTER,
        "Pod",
        lambda it: it["spec"]["containers"][0]["env"].append(
            {"name": "DPFA_LEDGER", "value": "postgresql://trainer:secret@db/ledger"}
        ),
    ),
    "network open to everybody": (CLUSTER, "NetworkPolicy", lambda it: it["spec"].update(ingress=[{}])),
    "VPA evicts": (
        CLUSTER,
        "VerticalPodAutoscaler",
        lambda it: it["spec"]["updatePolicy"].update(updateMode="Auto"),
    ),
    "mTLS is optional": ("istio", "PeerAuthentication", lambda it: it["spec"]["mtls"].update(mode="PERMISSIVE")),
    "signing key at large": (
        CLUSTER,
        "Pod",
        lambda it: it["spec"]["containers"][0]["volumeMounts"].append({"name": "signing-key", "mountPath": "/keys"}),
    ),
}


def _container(it: dict[str, Any]) -> dict[str, Any]:
    return it["spec"]["template"]["spec"]["containers"][0]


def test_every_pod_is_confined(rendered: dict[str, list[dict[str, Any]]]) -> None:
    assert {name: unsafe(found) for name, found in rendered.items() if unsafe(found)} == {}


@pytest.mark.parametrize("name", SPOILT)
def test_unsafe_manifests_are_found(name: str, rendered: dict[str, list[dict[str, Any]]]) -> None:
    variant, kind, spoil = SPOILT[name]
    documents = copy.deepcopy(rendered[variant])
    spoil(only(documents, kind))
    assert unsafe(documents) == {name}


def checkov(program: str, framework: str, folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [program, "--framework", framework, "--directory", str(folder), "--config-file", str(DEPLOY / "checkov.yaml")],
        capture_output=True,
        text=True,
        timeout=170,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "LOG_LEVEL": "ERROR"},
    )
    result = json.loads(done.stdout)
    assert result["summary"]["passed"] > 0 and result["summary"]["parsing_errors"] == 0, result["summary"]
    return result["results"]["failed_checks"]


def test_checkov_finds_only_what_was_planted(
    tool: Callable[[str], str], rendered: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    unlike = {}
    for name, found in rendered.items():
        # Of a runtime that is not the chart's only the patches are known; the ServiceAccount has no token there either.
        for it in found if name != "somebody-elses-runtime" else []:
            if it["kind"] == "Pod" and it["spec"].get("restartPolicy") == "Never":
                it = {**it, "apiVersion": "batch/v1", "kind": "Job", "spec": {"template": {"spec": it["spec"]}}}
            if "." not in it["apiVersion"].split("/")[0] or it["kind"] == "NetworkPolicy":
                unlike[json.dumps(it, sort_keys=True)] = it
    (tmp_path / "all.yaml").write_text(yaml.dump_all(unlike.values(), Dumper=yaml.CSafeDumper))
    bad = copy.deepcopy(only(rendered[ONE_NODE], "Job"))
    bad["metadata"]["name"] = "planted"
    _container(bad)["securityContext"]["privileged"] = True
    (tmp_path / "planted.yaml").write_text(yaml.safe_dump(bad))
    failed = checkov(tool("checkov"), "kubernetes", tmp_path)
    assert {(each["check_id"], each["resource"]) for each in failed} == {("CKV_K8S_16", "Job.dpfa.planted")}


# ---- what belongs together ------------------------------------------------------------------------------------------


def test_no_pod_serves_before_its_gate(rendered: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("rolling", "canary", CLUSTER, "values-region-a.yaml"):
        pod = only(rendered[name], "Deployment" if name == "rolling" else "Rollout")["spec"]["template"]["spec"]
        gate, serve = pod["initContainers"][0], pod["containers"][0]
        assert gate["command"][:2] == ["dpfa", "gate"] and "--public-key" in gate["command"]

        def model(container: dict[str, Any]) -> dict[str, Any]:
            return next(mount for mount in container["volumeMounts"] if mount["mountPath"] == "/model")

        assert model(gate) == model(serve) and model(serve)["readOnly"]
    for name in (CLUSTER, "canary"):
        rollout, analysis = only(rendered[name], "Rollout"), only(rendered[name], "AnalysisTemplate")
        strategy = rollout["spec"]["strategy"]
        first = (
            strategy["canary"]["steps"][0]["analysis"]
            if name == "canary"
            else strategy["blueGreen"]["prePromotionAnalysis"]
        )
        assert [each["templateName"] for each in first["templates"]] == [analysis["metadata"]["name"]]
        metric = analysis["spec"]["metrics"][0]
        assert metric["failureLimit"] == 0 and metric["provider"]["job"]["spec"]["backoffLimit"] == 0
        job = metric["provider"]["job"]["spec"]["template"]["spec"]["containers"][0]
        pods = rollout["spec"]["template"]["spec"]["initContainers"][0]["command"]
        assert [each for each in job["command"] if each != "--require-ledger"] == pods != job["command"]
        assert "DPFA_LEDGER" in {each["name"] for each in job["env"]}
    without = only(rendered["gate-without-ledger"], "AnalysisTemplate")["spec"]["metrics"][0]["provider"]["job"]
    assert "DPFA_LEDGER" not in str(without) and "--require-audit" in str(without)


def test_selectors_meet_the_pods_they_mean(rendered: dict[str, list[dict[str, Any]]]) -> None:
    for name, documents in rendered.items():
        labels = [each["metadata"].get("labels", {}) for each in documents if each["kind"] == "Pod"]
        for each in documents:
            if each["kind"] in ("Job", "Deployment"):
                labels.append(each["spec"]["template"]["metadata"]["labels"])
            elif each["kind"] == "CronJob":
                labels.append(each["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"])
        for each in documents:
            spec = each.get("spec", {})
            wanted = {
                "Service": lambda spec: spec["selector"],
                "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
                "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
                "PodMonitor": lambda spec: spec["selector"]["matchLabels"],
                "AuthorizationPolicy": lambda spec: spec["selector"]["matchLabels"],
                "PeerAuthentication": lambda spec: spec["selector"]["matchLabels"],
            }.get(each["kind"], lambda spec: {})(spec)
            if name in ("values.yaml", "values-hub.yaml") or wanted.get("app.kubernetes.io/component") == "training":
                continue  # no pods there; a region's come from the hub
            assert any(wanted.items() <= own.items() for own in labels), f"{name}: {each['kind']} {wanted} meets no pod"
    hub = only(rendered["values-hub.yaml"], "Pod")["metadata"]["labels"]
    monitor = dict(only(rendered["values-region-a.yaml"], "PodMonitor")["spec"]["selector"]["matchLabels"])
    assert monitor.pop("batch.kubernetes.io/job-completion-index") == "0", "the Job's controller sets it"
    assert monitor.items() <= hub.items()


def test_the_hub_and_its_regions_agree(rendered: dict[str, list[dict[str, Any]]]) -> None:
    hub, region = rendered["values-hub.yaml"], rendered["values-region-a.yaml"]
    job = only(hub, "TrainJob")
    assert job["spec"]["managedBy"] == "kueue.x-k8s.io/multikueue"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == only(hub, "LocalQueue")["metadata"]["name"]
    assert job["spec"]["runtimeRef"]["name"] == only(region, "TrainingRuntime")["metadata"]["name"]
    patch = only(hub, "Pod")["spec"]
    assert patch["serviceAccountName"] == only(region, "ServiceAccount")["metadata"]["name"]
    claims = [
        each["persistentVolumeClaim"]["claimName"] for each in patch["volumes"] if "persistentVolumeClaim" in each
    ]
    assert only(region, "PersistentVolumeClaim")["metadata"]["name"] in claims
    for name in ("values-region-a.yaml", "values-region-b.yaml"):
        assert not [each for each in rendered[name] if each["kind"] in ("TrainJob", "Job", "CronJob")]


def test_a_planted_difference_between_hub_and_region_is_found(rendered: dict[str, list[dict[str, Any]]]) -> None:
    for kind in ("TrainingRuntime", "ServiceAccount", "PersistentVolumeClaim"):
        other = {key: copy.deepcopy(each) for key, each in rendered.items()}
        only(other["values-region-a.yaml"], kind)["metadata"]["name"] = "another"
        with pytest.raises(AssertionError):
            test_the_hub_and_its_regions_agree(other)


def test_a_failed_job_goes_on_and_a_hopeless_one_does_not(rendered: dict[str, list[dict[str, Any]]]) -> None:
    job = only(rendered[ONE_NODE], "Job")["spec"]
    assert job["backoffLimit"] == 10 and job["podReplacementPolicy"] == "Failed"
    actions = {rule["action"]: rule for rule in job["podFailurePolicy"]["rules"]}
    assert actions["Ignore"]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert (
        1 not in actions["FailJob"]["onExitCodes"]["values"] and 137 not in actions["FailJob"]["onExitCodes"]["values"]
    )
    gang = only(rendered[CLUSTER], "TrainingRuntime")["spec"]["template"]["spec"]
    assert gang["failurePolicy"]["maxRestarts"] == 10
    inner = gang["replicatedJobs"][0]["template"]["spec"]
    assert inner["backoffLimit"] == 0 and "Ignore" not in {
        each["action"] for each in inner["podFailurePolicy"]["rules"]
    }


def test_alerts_and_dashboard_are_the_projects_own(rendered: dict[str, list[dict[str, Any]]]) -> None:
    rules = only(rendered[CLUSTER], "PrometheusRule")["spec"]
    assert rules == yaml.safe_load((DEPLOY / "monitoring" / "rules.yaml").read_text())
    dashboard = next(each for each in rendered[CLUSTER] if each["metadata"]["name"] == "dpfa-dashboard")["data"][
        "dpfa.json"
    ]
    assert json.loads(dashboard) == json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())


def test_runbooks_follow_the_repository(helm: Callable[..., Any], manifests: ModuleType) -> None:
    done = helm(
        ["template", "dpfa"], CHART / CLUSTER, "monitoring.repositoryUrl=https://git.example.com/ours/blob/main"
    )
    rules = only(manifests.documents(done.stdout), "PrometheusRule")["spec"]
    urls = [
        rule["annotations"]["runbook_url"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule
    ]
    assert urls and all(url.startswith("https://git.example.com/ours/blob/main/docs/runbooks/") for url in urls)
