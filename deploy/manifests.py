"""What is wrong with a rendered manifest? Core kinds against Kubernetes' own schemas, others against their CRDs.

Strict: a field that is not in the schema is a mistake (an API server drops it in silence), and the CRDs'
x-kubernetes-validations are evaluated. Kinds whose CRD is not at hand are named, so that nobody takes them for checked.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cel
import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.37"
# Installed by their projects; a kind that is neither here nor in Kubernetes is a spelling mistake.
CRD_KINDS = {
    "argoproj.io": {"AnalysisTemplate", "Rollout"},
    "autoscaling.k8s.io": {"VerticalPodAutoscaler"},
    "kueue.x-k8s.io": {
        "AdmissionCheck",
        "ClusterQueue",
        "LocalQueue",
        "MultiKueueCluster",
        "MultiKueueConfig",
        "ResourceFlavor",
    },
    "monitoring.coreos.com": {"PodMonitor", "PrometheusRule"},
    "networking.istio.io": {"DestinationRule", "Gateway", "VirtualService"},
    "security.istio.io": {"AuthorizationPolicy", "PeerAuthentication"},
    "trainer.kubeflow.org": {"TrainJob", "TrainingRuntime"},
}


def documents(text: str) -> list[dict[str, Any]]:
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]


class Schemas:
    """The CRDs in a folder, by (apiVersion, kind)."""

    def __init__(self, folder: Path) -> None:
        self._raw: dict[tuple[str, str], dict[str, Any]] = {}
        for file in sorted(folder.glob("*.yaml")) if folder.is_dir() else []:
            for crd in documents(file.read_text()):
                for version in crd["spec"]["versions"]:
                    key = (f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"])
                    self._raw[key] = version["schema"]["openAPIV3Schema"]
        self._strict = {key: jsonschema.Draft7Validator(_strict(raw)) for key, raw in self._raw.items()}

    def kinds(self) -> set[str]:
        return {kind for _, kind in self._raw}

    def problems(self, manifest: dict[str, Any]) -> list[str]:
        """One line for each mistake in a manifest of any kind.

        A kind of CRD_KINDS whose CRD is absent has none: ask `kinds` first.
        """
        api, kind = manifest["apiVersion"], manifest["kind"]
        name = f"{kind}/{manifest['metadata']['name']}"
        if (api, kind) in self._raw:
            found = [
                f"{name}: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
                for error in self._strict[api, kind].iter_errors(manifest)
            ]
            return found or [f"{name}: {broken}" for broken in _broken_rules(self._raw[api, kind], manifest, "")]
        group = api.rpartition("/")[0]
        if kind in CRD_KINDS.get(group, ()):
            wrong_version = any(known == kind and other.startswith(f"{group}/") for other, known in self._raw)
            return [f"{name}: {api} is not a version that the CRD has"] if wrong_version else []
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            return [f"{name}: Kubernetes {KUBERNETES} has no {api} {kind}"]
        except kubernetes_validate.ValidationError as error:
            return [f"{name}: {error.message[:200]}"]
        return []


def pods(manifests: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pods that custom kinds will start, as Pods, for tools that know core kinds only.

    A TrainJob's is its runtime's with its trainer and patches, as Kubeflow's Trainer merges them.
    """
    manifests = list(manifests)
    found = []
    for each in manifests:
        name, spec = each["metadata"]["name"], each.get("spec", {})
        if each["kind"] == "Rollout":
            found.append(_pod(each, name, spec["template"]))
        elif each["kind"] == "AnalysisTemplate":
            for metric in spec["metrics"]:
                found.append(_pod(each, name, metric["provider"]["job"]["spec"]["template"]))
        elif each["kind"] == "TrainJob":
            runtime = next(
                (
                    other
                    for other in manifests
                    if other["kind"] == "TrainingRuntime" and other["metadata"]["name"] == spec["runtimeRef"]["name"]
                ),
                None,
            )
            base = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"] if runtime else {}
            template = copy.deepcopy(base.get("template", {"spec": {"containers": [{"name": "node"}]}}))
            trainer = {key: spec["trainer"][key] for key in ("image", "command", "args", "env")}
            trainer["resources"] = spec["trainer"]["resourcesPerNode"]
            patches = [{"spec": {"containers": [{"name": "node", **trainer}]}}]
            patches += [
                job["template"]["spec"]["template"]
                for patch in spec["runtimePatches"]
                for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
            ]
            for patch in patches:
                template = _merged(template, patch)
            found.append(_pod(each, name, template))
    return found


def _pod(owner: dict[str, Any], name: str, template: dict[str, Any]) -> dict[str, Any]:
    metadata = {**template.get("metadata", {}), "name": f"{name}-pod", "namespace": owner["metadata"]["namespace"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def _merged(base: Any, patch: Any) -> Any:
    """`base` with `patch` over it; lists of named things by name."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {
            key: _merged(base[key], patch[key]) if key in base and key in patch else patch.get(key, base.get(key))
            for key in {**base, **patch}
        }
    if isinstance(base, list) and isinstance(patch, list) and all("name" in each for each in [*base, *patch]):
        by_name = {each["name"]: each for each in base}
        for each in patch:
            by_name[each["name"]] = _merged(by_name.get(each["name"], {}), each)
        return list(by_name.values())
    return patch


def _strict(schema: Any, *, root: bool = True) -> Any:
    """A CRD's schema as JSON schema, in which every field must be known."""
    if isinstance(schema, list):
        return [_strict(each, root=False) for each in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes") and key != "default"}
    for key in ("items", "additionalProperties", "not"):
        if isinstance(out.get(key), dict):
            out[key] = _strict(out[key], root=False)
    for key in ("allOf", "anyOf", "oneOf"):
        if key in out:
            out[key] = [_alternative(each) for each in out[key]]
    if "properties" in out:
        out["properties"] = {name: _strict(each, root=False) for name, each in out["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in out:
            out["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if out.pop("nullable", False) and "type" in out:
        out["type"] = [out["type"], "null"]
    if root:
        # The API server knows them; CRDs say only that they are objects.
        out["properties"]["metadata"] = {"type": "object"}
    return out


def _alternative(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if not key.startswith("x-kubernetes")}


def _broken_rules(schema: dict[str, Any], value: Any, path: str) -> Iterator[str]:
    """The x-kubernetes-validations that `value` breaks. Rules about a change (oldSelf) say nothing of a new object."""
    for rule in schema.get("x-kubernetes-validations", []):
        if not re.search(r"\boldSelf\b", rule["rule"]) and cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield f"{path or 'object'}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for name, each in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if isinstance(inner, dict):
                yield from _broken_rules(inner, each, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, each in enumerate(value):
            yield from _broken_rules(schema["items"], each, f"{path}[{index}]")
