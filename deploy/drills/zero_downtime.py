"""Drill: models change behind a proxy under load, and no request fails. One that the gate refuses gets no traffic.

    python deploy/drills/zero_downtime.py

docs/runbooks/upgrade-without-downtime.md is the page. Real jobs train two versions; `transformers serve` serves them;
nginx is the proxy, `hey` the load. A version whose evidence was spoilt is refused by `dpfa gate`; another is let in by
10, then 50, then 100 % (canary), and once taken back at 10 %; everything goes back at once (blue-green), and the
version that is out of use is stopped. In the end a server is stopped before its successor has the traffic: that must
show.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from drill import PATIENCE_S, Drill, DrillFailed, at_least, free_port, main

REQUEST = {"prompt": "note 7: patient", "max_tokens": 4}
# What a client may call. `transformers serve` also answers /load_model, which loads any model for anybody, even on a
# server that was started with one, and /reset: these would go round the gate.
CONFIGURATION = """
daemon off; user {user}; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  log_format version '$status $upstream_addr';
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  split_clients $request_id $version {{ {shares} }}
  server {{
    listen 127.0.0.1:{port};
    proxy_next_upstream off;  # a failure must show in the drill
    location /v1/ {{ proxy_pass http://$version; access_log {folder}/access.log version; }}
    location = /health {{ proxy_pass http://$version; }}
    location / {{ return 404; }}
  }}
}}
"""


@dataclass
class Version:
    """A model and the server that has it in memory."""

    name: str
    model: Path
    port: int
    server: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


def ask(address: str, path: str, body: Mapping[str, object] | None = None) -> tuple[int, str]:
    """(status, text) of the answer; status 0 where nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{address}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError:
        return 0, ""


def serve(drill: Drill, version: Version) -> None:
    """Starts a server. It listens only once its model is loaded, so that /health tells when it can serve."""
    command = ["transformers", "serve", str(version.model), "--host", "127.0.0.1", "--port", str(version.port)]
    version.server = drill.start(
        *command, "--device", "cpu", "--log-level", "error", log=drill.folder / f"{version.name}.log"
    )


def ready(drill: Drill, version: Version) -> None:
    drill.wait(lambda: ask(version.address, "/health")[0] == 200, f"{version.name} to be ready", version.server)
    status, text = ask(version.address, "/v1/completions", REQUEST)
    drill.check(status == 200 and str(version.model) in text, f"{version.name} is ready, and serves its model", text)


class Proxy:
    """nginx, which hands requests to versions by their shares."""

    def __init__(self, drill: Drill, shares: Mapping[str, int]) -> None:
        self.drill, self.folder, self.port = drill, drill.folder / "nginx", free_port()
        self.folder.mkdir()
        self._write(shares)
        self._master = drill.start(*self._nginx(), log=self.folder / "log")
        drill.wait(lambda: ask(self.address, "/health")[0] == 200, "nginx to answer", self._master)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def route(self, shares: Mapping[str, int]) -> None:
        """Changes the shares (address -> percent). On return the old worker has answered all that it had begun."""
        self.drill.say(f"    nginx: {', '.join(f'{share} % to {address}' for address, share in shares.items())}")
        self._write(shares)
        self.drill.run(*self._nginx(), "-t")
        before = self._workers()
        self._master.send_signal(signal.SIGHUP)
        self.drill.wait(lambda: not before & self._workers() and bool(self._workers()), "nginx to drain", self._master)

    def answered(self) -> Counter[str]:
        """Requests by the server that they were handed to, since the proxy began."""
        log = self.folder / "access.log"
        return Counter(line.split()[1] for line in log.read_text().splitlines()) if log.exists() else Counter()

    def _nginx(self) -> list[str]:
        return ["nginx", "-p", str(self.folder), "-e", str(self.folder / "error.log"), "-c", str(self.folder / "conf")]

    def _workers(self) -> set[int]:
        return {child.pid for child in psutil.Process(self._master.pid).children()}

    def _write(self, shares: Mapping[str, int]) -> None:
        *some, last = [(address, share) for address, share in shares.items() if share]
        parts = [f"{share}% {address};" for address, share in some] + [f"* {last[0]};"]
        settings = {"folder": self.folder, "port": self.port, "shares": " ".join(parts)}
        user = psutil.Process().username()
        (self.folder / "conf").write_text(CONFIGURATION.format(user=user, **settings))


class Load:
    """`hey`, which asks four times at once until it is stopped, and never again for the same.

    Each request has a connection of its own, unless they are kept. nginx ends kept connections when it is reloaded: a
    request that is on its way in that moment fails, where a client does not try again.
    """

    def __init__(self, drill: Drill, proxy: Proxy, *, keep_alive: bool = False) -> None:
        self.drill, self.proxy = drill, proxy
        body = drill.folder / "request.json"
        body.write_text(json.dumps(REQUEST))
        options = ["-z", "30m", "-c", "4", "-q", "12", "-t", "60", "-m", "POST"]
        options += [] if keep_alive else ["-disable-keepalive"]
        options += ["-T", "application/json", "-D", str(body), f"http://{proxy.address}/v1/completions"]
        self._hey = drill.start("hey", *options)

    def go_on(self, requests: int) -> Counter[str]:
        """Waits until so many more requests were answered; returns by whom."""
        before = self.proxy.answered()

        def since() -> Counter[str]:
            return self.proxy.answered() - before

        self.drill.wait(lambda: since().total() >= requests, f"{requests} answers", self._hey)
        return since()

    def stop(self) -> tuple[int, list[str]]:
        """As `judged`."""
        self._hey.send_signal(signal.SIGINT)
        return judged(self._hey.communicate(timeout=PATIENCE_S)[0])


def judged(summary: str) -> tuple[int, list[str]]:
    """Of hey's summary: (requests answered with 200, lines about all others)."""
    _, found, distribution = summary.partition("Status code distribution:")
    if not found:
        raise DrillFailed(f"hey has counted nothing:\n{summary}")
    statuses, _, errors = distribution.partition("Error distribution:")
    codes = dict(re.findall(r"\[(\d+)\]\s+(\d+) responses", statuses))
    good = int(codes.pop("200", 0))
    bad = [f"{count} with status {code}" for code, count in codes.items()]
    return good, bad + [" ".join(line.split()) for line in errors.splitlines() if line.strip()]


def gate(drill: Drill, version: Version, public_key: Path) -> bool:
    """Whether the version may have traffic: the command that a rollout runs as a job."""
    command = ["dpfa", "gate", "--model", str(version.model), "--max-epsilon", "3", "--max-delta", "0.001"]
    command += ["--ledger", os.environ["DPFA_LEDGER"], "--public-key", str(public_key)]
    drill.say("$ " + " ".join(command))
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    if not done.stdout:
        raise DrillFailed(f"the gate has said nothing:\n{done.stderr}")
    answer = json.loads(done.stdout)
    failed = [f"{check['check']}: {check['detail']}" for check in answer["checks"] if check["passed"] is False]
    drill.say(f"    passed: {answer['passed']}" + "".join(f"\n    {line}" for line in failed))
    drill.check((done.returncode == 0) == answer["passed"], "exit code and JSON agree", done.returncode)
    return done.returncode == 0


def key_pair(folder: Path) -> tuple[Path, Path]:
    private = ec.generate_private_key(ec.SECP256R1())
    paths = folder / "private.pem", folder / "public.pem"
    paths[0].write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    paths[1].write_bytes(public)
    return paths


def trained(drill: Drill, private_key: Path) -> list[Path]:
    """Two models with evidence, signed, from one ledger; and the second once more, with a better epsilon written in."""
    models = [drill.folder / name for name in ("v1", "v2", "spoilt")]
    jobs = [drill.job(f"--output_dir={model}", "--ledger_dataset=notes") for model in models[:2]]
    for job in jobs:
        drill.ended(job)
    for model in models[:2]:
        for checkpoint in model.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        drill.dpfa("report", str(model), "--ledger", os.environ["DPFA_LEDGER"], "--sign-key", str(private_key))
    shutil.copytree(models[1], models[2])
    report = json.loads((models[2] / "privacy.json").read_text())
    report["guarantee"]["epsilon"] = 0.5
    (models[2] / "privacy.json").write_text(json.dumps(report))
    return models


def within(count: int, requests: int, share: float) -> bool:
    """Whether a count fits its share, to five standard deviations."""
    return abs(count - share * requests) <= 5 * math.sqrt(requests * share * (1 - share)) and count > 0


def zero_downtime(drill: Drill, options: argparse.Namespace) -> None:
    os.environ |= {"DPFA_LEDGER": f"sqlite:///{drill.folder}/ledger.db", "HF_HOME": str(drill.folder / "hf")}
    drill.say("1. Two versions are trained; `dpfa report` writes their evidence and signs them.")
    private_key, public_key = key_pair(drill.folder)
    blue, green, spoilt = (
        Version(name, model, free_port())
        for name, model in zip(("blue", "green", "spoilt"), trained(drill, private_key), strict=True)
    )
    versions = (blue, green, spoilt)
    for version in versions:
        serve(drill, version)
    ready(drill, blue)
    proxy = Proxy(drill, {blue.address: 100})
    for path in ("/load_model", "/reset"):
        drill.check(ask(proxy.address, path, {"model": "any"})[0] == 404, f"{path} is not to be had from outside")
    load = Load(drill, proxy, keep_alive=options.keep_alive)

    drill.say("2. A version whose evidence was changed is up and healthy, and the gate refuses it: nothing switches.")
    ready(drill, spoilt)
    drill.check(not gate(drill, spoilt, public_key), "the gate refuses it")
    load.go_on(options.requests)
    drill.check(set(proxy.answered()) == {blue.address}, "the old version has answered everything", proxy.answered())
    assert spoilt.server is not None
    drill.stop(spoilt.server)

    drill.say("3. Canary: the next version passes, gets a tenth, and is taken back.")
    ready(drill, green)
    drill.check(gate(drill, green, public_key), "the gate lets it in")
    proxy.route({green.address: 10, blue.address: 90})
    some = load.go_on(options.requests)
    drill.check(within(some[green.address], some.total(), 0.1), f"it has {some[green.address]} of {some.total()}", some)
    proxy.route({blue.address: 100})
    some = load.go_on(options.requests)
    drill.check(set(some) == {blue.address}, "after the abort it has none", some)

    drill.say("4. Canary again: 10, 50, 100 %.")
    for share in (10, 50, 100):
        proxy.route({green.address: share, blue.address: 100 - share})
        some = load.go_on(options.requests)
        count = some[green.address]
        drill.check(within(count, some.total(), share / 100), f"it has {count} of {some.total()}", some)

    drill.say("5. Blue-green: all at once, here back to the old version; then the other is stopped.")
    drill.check(gate(drill, blue, public_key), "the gate lets it in")
    ready(drill, blue)
    proxy.route({blue.address: 100})
    assert green.server is not None and blue.server is not None
    drill.stop(green.server)
    some = load.go_on(options.requests)
    drill.check(set(some) == {blue.address}, "it has answered everything since", some)
    answer = json.loads(ask(proxy.address, "/v1/completions", REQUEST)[1])
    drill.check(str(blue.model) in answer["model"], f"the answer names its model, {answer['model']}")

    good, bad = load.stop()
    drill.check(not bad and good >= 7 * options.requests, f"all {good} requests were answered with 200", bad)
    drill.check(
        spoilt.address not in proxy.answered(), "the version that was refused has not answered one", proxy.answered()
    )

    drill.say("6. How not to do it: the server is stopped before another has its traffic.")
    load = Load(drill, proxy)
    load.go_on(20)
    drill.stop(blue.server)
    load.go_on(20)
    good, bad = load.stop()
    drill.check(bool(bad), f"the drill sees that requests failed: {'; '.join(bad)}", good)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # With fewer, a canary of a tenth may have none by chance.
    parser.add_argument("--requests", type=at_least(150), default=200, help="answers to wait for in each part")
    parser.add_argument("--keep-alive", action="store_true", help="keep connections, on which a reload is noticed")
    main(zero_downtime, parser)
