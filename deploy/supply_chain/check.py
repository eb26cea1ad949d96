"""What dpfa-hf is made of: a bill of materials (SBOM), the licences of its packages, and no secret in the repository.

    python deploy/supply_chain/check.py              all three; the SBOM goes to dist/sbom.cdx.json
    python deploy/supply_chain/check.py sbom         CycloneDX JSON of the packages that dpfa-hf runs with, validated,
                                                     each in the version that constraints.txt pins
    python deploy/supply_chain/check.py licences     every one of them under a licence that licences.toml allows
    python deploy/supply_chain/check.py secrets      nothing like a password or key beyond secrets.baseline
    python deploy/supply_chain/check.py secrets --accept    after looking at each: what is there now is no secret

Packages are those that dpfa-hf and its extras ask for, and theirs in turn, as they are installed beside this Python;
tools for tests and development are not among them. Exit code 1 and a line for each thing that is wrong.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SBOM = REPOSITORY / "dist" / "sbom.cdx.json"
BASELINE = HERE / "secrets.baseline"
PACKAGE = "dpfa-hf"
# Extras for people who work on dpfa-hf; all others are for people who run it.
DEVELOPMENT_EXTRAS = {"dev", "examples", "ops", "test"}
# Not looked at for secrets: hundreds of kernels' names, which look like base64; and the baseline itself.
NOT_SCANNED = {"benchmarks/results/kernels.json", "deploy/supply_chain/secrets.baseline"}
# No secrets by what they are called: ids of runs and hashes, which files of saved models and ledgers are full of.
HASHES = r'"(run|run_id|head|hash|[a-z0-9_]*sha256)": "[0-9a-f]{32}([0-9a-f]{32})?",?$'
_UNKNOWN = "UNKNOWN"


@functools.cache
def runtime_packages(package: str = PACKAGE) -> dict[str, str]:
    """Canonical name -> installed version of everything that `package` runs with, itself left out.

    Raises:
        PackageNotFoundError: something that is asked for is not installed.
    """
    extras = set(importlib.metadata.metadata(package).get_all("Provides-Extra") or ()) - DEVELOPMENT_EXTRAS
    wanted: dict[str, set[str]] = {}

    def walk(name: str, extras: Iterable[str]) -> None:
        name, asked = canonicalize_name(name), {"", *extras}
        if asked <= wanted.get(name, set()):
            return
        wanted.setdefault(name, set()).update(asked)
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted[name]):
                walk(requirement.name, requirement.extras)

    walk(package, extras)
    del wanted[canonicalize_name(package)]
    return {name: importlib.metadata.version(name) for name in sorted(wanted)}


def pins(constraints: Path) -> dict[str, str]:
    """Canonical name -> version that a constraints file pins."""
    lines = [line.partition("#")[0].strip() for line in constraints.read_text().splitlines()]
    return {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines if "==" in line)}


def write_sbom(path: Path) -> None:
    """CycloneDX JSON of the runtime packages, by cyclonedx-py, the rest of the environment left out."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "environment.json"
        command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", "--of", "JSON"]
        command += ["--sv", "1.6", "--mc-type", "library", "--pyproject", str(REPOSITORY / "pyproject.toml")]
        subprocess.run([*command, "-o", str(whole), sys.executable], check=True, capture_output=True)
        bom = json.loads(whole.read_text())
    kept = set(runtime_packages())
    bom["components"] = [each for each in bom["components"] if canonicalize_name(each["name"]) in kept]
    known = {each["bom-ref"] for each in bom["components"]} | {bom["metadata"]["component"]["bom-ref"]}
    bom["dependencies"] = [
        {**each, "dependsOn": [ref for ref in each.get("dependsOn", ()) if ref in known]}
        for each in bom["dependencies"]
        if each["ref"] in known
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(bom, indent=1, sort_keys=True) + "\n")


def sbom_faults(bom: Mapping[str, Any], packages: Mapping[str, str], pinned: Mapping[str, str]) -> list[str]:
    """What is wrong with a bill of materials: its form, what it leaves out or adds, and versions nobody tested."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    faults = []
    if (error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom))) is not None:
        faults.append(f"not CycloneDX 1.6: {str(error.data).splitlines()[0][:200]}")
    listed = {canonicalize_name(each["name"]): str(each.get("version")) for each in bom["components"]}
    faults += [f"{name} is installed and not listed" for name in sorted(packages.keys() - listed.keys())]
    faults += [f"{name} is listed and not among the packages" for name in sorted(listed.keys() - packages.keys())]
    for name in sorted(packages.keys() & listed.keys()):
        if listed[name] != packages[name]:
            faults.append(f"{name} is listed as {listed[name]}, and {packages[name]} is installed")
        if name not in pinned:
            faults.append(f"{name} {packages[name]} is not pinned in constraints.txt")
        elif Version(packages[name]).public != Version(pinned[name]).public:
            faults.append(f"{name} {packages[name]} is installed, and constraints.txt pins {pinned[name]}")
    return faults


def licences_of(packages: Iterable[str]) -> dict[str, dict[str, str]]:
    """Canonical name -> what pip-licenses finds in the package's metadata, by where it stands."""
    command = [
        sys.executable,
        "-m",
        "piplicenses",
        "--format=json",
        "--from=all",
        "--with-system",
        "--packages",
        *packages,
    ]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {canonicalize_name(each["Name"]): each for each in found}


def declared_licence(found: Mapping[str, str]) -> str:
    """The most exact of the three places; a whole licence text in place of a name is passed over."""
    for place in ("License-Expression", "License-Metadata", "License-Classifier"):
        value = found[place].strip()
        if value != _UNKNOWN and value and "\n" not in value:
            return value
    return _UNKNOWN


def licence_faults(licences: Mapping[str, str], policy: Mapping[str, Any]) -> list[str]:
    """Packages whose licence is neither allowed nor excepted, and exceptions that no longer fit."""
    exceptions = policy["exceptions"]
    faults = []
    for name, licence in sorted(licences.items()):
        if name in exceptions:
            if licence != exceptions[name]["licence"]:
                faults.append(f"{name} is now {licence}; the exception is for {exceptions[name]['licence']}")
        elif not _is_allowed(licence, policy):
            faults.append(f"{name} is under {licence}, which licences.toml does not allow")
    return faults + [f"{name} has an exception and is not used" for name in sorted(exceptions.keys() - licences.keys())]


def _is_allowed(licence: str, policy: Mapping[str, Any]) -> bool:
    """Whether an SPDX expression can be kept with allowed licences: all of an AND, one of an OR."""
    from boolean.boolean import AND, OR, ParseError
    from license_expression import ExpressionError, get_spdx_licensing

    allowed = set(policy["allowed"])

    def holds(node: Any) -> bool:
        if isinstance(node, AND):
            return all(map(holds, node.args))
        if isinstance(node, OR):
            return any(map(holds, node.args))
        return str(node) in allowed

    try:
        tree = get_spdx_licensing().parse(policy["written_as"].get(licence, licence), validate=True)
    except (ExpressionError, ParseError):
        return False
    return tree is not None and holds(tree)


def repository_files(root: Path) -> list[str]:
    """Everything that is or could be committed."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return sorted(name for name in set(names) - NOT_SCANNED if name and (root / name).is_file())


def scan(root: Path, files: Iterable[str]) -> Any:
    """detect-secrets' findings, with all its plugins, in files of `root`; nothing is sent anywhere to verify them."""
    from detect_secrets import SecretsCollection
    from detect_secrets.settings import default_settings

    with default_settings() as settings:
        settings.disable_filters("detect_secrets.filters.common.is_ignored_due_to_verification_policies")
        settings.filters["detect_secrets.filters.regex.should_exclude_line"] = {"pattern": [HASHES]}
        found = SecretsCollection(root=str(root))
        for name in files:
            found.scan_file(name)
        return found


def secret_faults(found: Any, baseline: Mapping[str, Any]) -> list[str]:
    """Findings that nobody has looked at: by file, kind and hash, since lines move."""
    accepted = {
        (file, each["type"], each["hashed_secret"])
        for file, findings in baseline["results"].items()
        for each in findings
        if each.get("is_secret") is False
    }
    return [
        f"{file}:{each.line_number}: {each.type}"
        for file, each in sorted(found, key=lambda pair: (pair[0], pair[1].line_number))
        if (file, each.type, each.secret_hash) not in accepted
    ]


def accept(found: Any, path: Path) -> None:
    """Writes all findings as looked at, in detect-secrets' own form."""
    from detect_secrets.core import baseline
    from detect_secrets.settings import default_settings

    for _, each in found:
        each.is_secret = False
    with default_settings():
        written = baseline.format_for_output(found)
    # A date would make every acceptance a change; names of files are to hold in every checkout.
    del written["generated_at"]
    for file, findings in written["results"].items():
        for finding in findings:
            finding["filename"] = file
    path.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")


def check_sbom() -> list[str]:
    write_sbom(SBOM)
    bom = json.loads(SBOM.read_text())
    print(f"sbom: {len(bom['components'])} packages in {SBOM.relative_to(REPOSITORY)}")
    return sbom_faults(bom, runtime_packages(), pins(REPOSITORY / "constraints.txt"))


def check_licences(package: str = PACKAGE) -> list[str]:
    policy = tomllib.loads((HERE / "licences.toml").read_text())
    licences = {name: declared_licence(found) for name, found in licences_of(runtime_packages(package)).items()}
    print(f"licences: {len(licences)} packages, {len(policy['exceptions'])} of them excepted with a reason")
    missing = [f"{name} was not found by pip-licenses" for name in runtime_packages(package).keys() - licences.keys()]
    return missing + licence_faults(licences, policy)


def check_secrets(accepting: bool = False) -> list[str]:
    files = repository_files(REPOSITORY)
    found = scan(REPOSITORY, files)
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"results": {}}
    faults = secret_faults(found, baseline)
    print(f"secrets: {len(files)} files, {len(list(found))} findings, {len(faults)} of them not in the baseline")
    if not accepting:
        return faults
    print("\n".join(["accepted as no secrets:", *faults]))
    accept(found, BASELINE)
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "sbom", "licences", "secrets"), default="all")
    parser.add_argument("--accept", action="store_true", help="with secrets: write the baseline anew")
    parser.add_argument("--package", default=PACKAGE, help="with licences: another installed package than dpfa-hf")
    asked = parser.parse_args()
    if asked.accept and asked.what != "secrets":
        parser.error("--accept is for secrets")
    if asked.package != PACKAGE and asked.what != "licences":
        parser.error("--package is for licences")
    checks: dict[str, Callable[[], list[str]]] = {
        "sbom": check_sbom,
        "licences": lambda: check_licences(asked.package),
        "secrets": lambda: check_secrets(asked.accept),
    }
    failed = False
    for name, check in checks.items():
        if asked.what in ("all", name):
            for fault in check():
                failed = True
                print(f"FAILED {name}: {fault}")
    print("failed" if failed else "passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
