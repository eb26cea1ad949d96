"""Prometheus metrics of a private run: none follows private data beyond what the noise covers (P23).

Values are those of the last log, all of one moment. A scrape in between finds nothing new, so that whoever scrapes
every second learns no single step's time, which would follow the size of a private batch; `logging_steps` says how many
step times are added up. What each metric reveals is in docs/metrics.md.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from transformers import TrainerControl, TrainerState, TrainingArguments, logging

import dpfa_hf
from dpfa_hf.accounting import EpsilonCurve
from dpfa_hf.callbacks import PrivacyCallback, PrivateRun
from dpfa_hf.errors import PrivacyError
from dpfa_hf.plan import PrivacyPlan

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

    from dpfa_hf.ledger import DatasetRecord

logger = logging.get_logger(__name__)

# Of everything that a Pushgateway is waited for; the end of training waits for it once.
_PUSH_TIMEOUT_S = 5.0
# Of a data set's sums over all of its runs: reading them takes 0.3 ms for every run that the ledger has.
_SUMS_EVERY_S = 60.0
# The label `run` of what was refused before the ledger gave the run an id.
_NO_RUN = "none"
_LABELS = ("run", "dataset")
_INFO_LABELS = (
    "privacy_unit",
    "adjacency",
    "accountant",
    "clipping",
    "noise_generator",
    "floating_point",
    "version",
)
# Key of a log -> metric. The noise covers the first three (P1); the learning rate follows a fixed schedule.
_LOGGED = {
    "grad_norm": "dpfa_noised_gradient_norm",
    "private_loss": "dpfa_private_loss",
    "clipping_norm": "dpfa_clipping_norm",
    "learning_rate": "dpfa_learning_rate",
}

METRICS = {
    "dpfa_info": "What kind of guarantee the run has; always 1.",
    "dpfa_training": "1 while the run is training in this process, 0 afterwards.",
    "dpfa_epsilon_spent": "Epsilon so far as this process counts it: a progress figure, not the guarantee.",
    "dpfa_epsilon_planned": "Epsilon so far of the plan and the steps that the ledger holds, computed apart.",
    "dpfa_epsilon_guarantee": "Epsilon at the plan's last step: the guarantee, however early the run ends.",
    "dpfa_epsilon_target": "Epsilon that the run was allowed.",
    "dpfa_delta": "Delta of the guarantee.",
    "dpfa_steps_charged": "Steps that the ledger has charged to the run.",
    "dpfa_steps_taken": "Steps that the optimizer has taken.",
    "dpfa_steps_planned": "The plan's last step.",
    "dpfa_steps_remaining": "Steps that may still be charged.",
    "dpfa_noise_multiplier": "Sigma: standard deviation of the noise over the clipping norm.",
    "dpfa_sampling_probability": "q: probability with which each privacy unit is in each step.",
    "dpfa_clipping_norm": "C: bound on a privacy unit's gradient; under adaptive clipping the one reached.",
    "dpfa_expected_batch_size": "The constant that divides the noised sum, in privacy units.",
    "dpfa_max_batch_size": "Ceiling on the privacy units of a step.",
    "dpfa_num_units": "n: privacy units in the data set, a public number.",
    "dpfa_processes": "Processes that train the model together.",
    "dpfa_ledger_head_sequence": "Number of the ledger's last entry, of all runs.",
    "dpfa_ledger_lag_steps": "Steps charged and not taken: what crashes have cost.",
    "dpfa_noised_gradient_norm": "Norm of the noised mean gradient of the last logged step.",
    "dpfa_private_loss": "Noised estimate of the mean training loss since the log before.",
    "dpfa_learning_rate": "Learning rate.",
    "dpfa_dataset_budget_epsilon": "Epsilon that all runs on the data set may reserve together.",
    "dpfa_dataset_reserved_epsilon": "Epsilon that all runs on the data set have reserved.",
    "dpfa_dataset_budget_delta": "Delta that all runs on the data set may reserve together.",
    "dpfa_dataset_reserved_delta": "Delta that all runs on the data set have reserved.",
    "dpfa_halts_total": "Planned ends: the plan's last step was taken, and training stopped.",
    "dpfa_refusals_total": "Trainings that a PrivacyError has ended, or kept from beginning.",
    "dpfa_resumes_total": "How often this process has resumed the run.",
}
"""Name -> help. Names that end in _total are counters, all others gauges."""


@dataclass(frozen=True)
class _Snapshot:
    """What a run exports, all of one moment."""

    labels: dict[str, str]
    info: dict[str, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)


class _Collector:
    """What prometheus_client asks when it is scraped. Its own counters would export their times of creation beside
    them, and values of several moments."""

    def __init__(self, *snapshots: _Snapshot) -> None:
        self.by_run = {snapshot.labels["run"]: snapshot for snapshot in snapshots}

    def show(self, snapshot: _Snapshot) -> None:
        # A new dict, since a scrape may be reading the old one in its thread.
        self.by_run = {**self.by_run, snapshot.labels["run"]: snapshot}

    def describe(self) -> Iterable[Metric]:
        return list(self._families().values())

    def collect(self) -> Iterator[Metric]:
        families = self._families()
        for snapshot in self.by_run.values():
            if snapshot.info:
                families["dpfa_info"].add_metric([*snapshot.labels.values(), *snapshot.info.values()], 1.0)
            for name, value in snapshot.values.items():
                families[name].add_metric(list(snapshot.labels.values()), value)
        yield from (family for family in families.values() if family.samples)

    @staticmethod
    def _families() -> dict[str, Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        return {
            name: (CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily)(
                name, text, labels=_LABELS + _INFO_LABELS if name == "dpfa_info" else _LABELS
            )
            for name, text in METRICS.items()
        }


class PrometheusCallback(PrivacyCallback):
    """Exports a private run's budget, plan and progress to Prometheus; pass it in a private Trainer's `callbacks`.

    Only the first of several processes exports. Values change when Trainer logs (`logging_steps`), and the last ones
    stay readable until the process ends or `close`. One callback may watch several trainers after one another: the
    label `run` keeps them apart.

    What happens to the metrics never changes the training: a ledger that the exporter cannot read or a Pushgateway that
    does not answer in 5 s is logged once a run, and training goes on. Its budget does not rest on them.

    Args:
        port: serve the metrics over HTTP on this port, from the call of `train` on; by default they are not served.
        address: the address to serve on. Whoever reaches it can read the metrics; there is no password.
        pushgateway: URL of a Pushgateway that gets the last values when training ends, also by an error.
        job: label `job` of what is pushed.
        registry: where to register; by default a registry of its own, which has nothing else. prometheus_client's
            common one also exports this process's CPU time and memory, which follow private batch sizes.

    Attributes:
        registry: where the metrics are registered.

    Guarantee:
        What is exported is a public number of the plan or of the ledger, or a noised value that Trainer logs; nothing
        else is read, with `log_private_metrics` neither (P23). A data set without a name is "unnamed" (P22).

    Raises:
        PrivacyError: an argument cannot be meant, prometheus_client is not installed, or `registry` has such metrics;
            on `train`: `port` cannot be served, before anything is reserved, or the Trainer is not private.
    """

    def __init__(
        self,
        port: int | None = None,
        address: str = "127.0.0.1",
        pushgateway: str | None = None,
        job: str = "dpfa",
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._port, self._address = _port(port), _text("address", address)
        self._gateway, self._job = _gateway(pushgateway), _text("job", job)
        try:
            from prometheus_client import CollectorRegistry
        except ImportError:
            raise PrivacyError(
                'PrometheusCallback needs prometheus_client, which is not installed: pip install "dpfa-hf[metrics]"'
            ) from None
        self._collector = _Collector()
        self.registry = CollectorRegistry() if registry is None else registry
        try:
            self.registry.register(self._collector)
        except ValueError:
            raise PrivacyError(
                "registry has the metrics of a PrometheusCallback already: share that one between your trainers, or "
                "leave registry out"
            ) from None
        self._server: Any = None
        self._counts: dict[str, Counter[str]] = {}
        self._failed: set[tuple[str, str]] = set()
        self._is_first, self._dataset = False, "unnamed"
        self._curve: EpsilonCurve | None = None
        self._sums: DatasetRecord | None = None
        self._sums_read = 0.0
        self._state: TrainerState | None = None
        self._logged: dict[str, float] = {}
        self._training = False

    def close(self) -> None:
        """Stops serving; the port is free again."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    # ---- what a private trainer tells -------------------------------------------------------------------------------

    def prepare(self, dataset: str | None) -> None:
        self._is_first, self._dataset = True, dataset or "unnamed"
        if self._port is not None and self._server is None:
            self._server = _serve(self._port, self._address, self.registry)

    def bind(self, run: PrivateRun) -> None:
        super().bind(run)
        self._curve, self._sums, self._state, self._logged = None, None, None, {}
        if self._is_first:
            self._counter["dpfa_resumes_total"] += run.resumed

    def release(self, error: BaseException | None) -> None:
        if self._is_first:
            self._training, self._sums = False, None
            if isinstance(error, PrivacyError):
                self._counter["dpfa_refusals_total"] += 1
            elif error is None and self._run is not None and self._run.budget.exhausted:
                self._counter["dpfa_halts_total"] += 1
            self._show()
            self._push()
        super().release(error)
        self._is_first = False

    # ---- what Trainer tells -----------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._state, self._training = state, True
        self._show()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._logged |= {_LOGGED[key]: value for key, value in (logs or {}).items() if key in _LOGGED}
        self._show()

    # ---- what is exported -------------------------------------------------------------------------------------------

    @property
    def _labels(self) -> dict[str, str]:
        return {"run": _NO_RUN if self._run is None else self._run.budget.run, "dataset": self._dataset}

    @property
    def _counter(self) -> Counter[str]:
        return self._counts.setdefault(self._labels["run"], Counter())

    def _show(self) -> None:
        """From here to the next call, scrapes find what is true now."""
        if not self._is_first:
            return
        with self._harmless("values"):
            if self._run is not None:
                self._collector.show(self._snapshot(self._run))
            elif self._counter:
                self._collector.show(_Snapshot(self._labels, values=dict(self._counter)))

    def _snapshot(self, run: PrivateRun) -> _Snapshot:
        budget, plan, ledger = run.budget, run.budget.plan, run.budget.ledger
        assert ledger is not None
        record = ledger.run(budget.run)
        if self._sums is None or time.monotonic() - self._sums_read > _SUMS_EVERY_S:
            self._sums = next(each for each in ledger.datasets() if each.dataset == record.dataset)
            self._sums_read = time.monotonic()
        if self._curve is None:
            self._curve = EpsilonCurve(PrivacyPlan.from_dict(record.plan))
        taken = 0 if self._state is None else self._state.global_step
        values = {
            "dpfa_training": float(self._training),
            "dpfa_epsilon_spent": budget.epsilon,
            "dpfa_epsilon_planned": self._curve.at(record.steps),
            "dpfa_epsilon_guarantee": plan.epsilon,
            "dpfa_epsilon_target": plan.target_epsilon,
            "dpfa_delta": plan.delta,
            "dpfa_steps_charged": record.steps,
            "dpfa_steps_taken": taken,
            "dpfa_steps_planned": plan.max_steps,
            "dpfa_steps_remaining": plan.max_steps - record.steps,
            "dpfa_noise_multiplier": plan.noise_multiplier,
            "dpfa_sampling_probability": plan.sampling_probability,
            "dpfa_clipping_norm": plan.clipping_norm,
            "dpfa_expected_batch_size": plan.expected_batch_size,
            "dpfa_max_batch_size": plan.max_batch_size,
            "dpfa_num_units": plan.num_units,
            "dpfa_processes": run.processes,
            "dpfa_ledger_head_sequence": ledger.head()[0],
            "dpfa_ledger_lag_steps": record.steps - taken,
            "dpfa_dataset_reserved_epsilon": self._sums.epsilon,
            "dpfa_dataset_reserved_delta": self._sums.delta,
        }
        if self._sums.budget is not None:
            values["dpfa_dataset_budget_epsilon"], values["dpfa_dataset_budget_delta"] = self._sums.budget
        values |= {name: self._counter[name] for name in METRICS if name.endswith("_total")}
        info = {name: str(getattr(plan, name)) for name in _INFO_LABELS if name != "version"}
        return _Snapshot(self._labels, info | {"version": dpfa_hf.__version__}, values | self._logged)

    def _push(self) -> None:
        snapshot = self._collector.by_run.get(self._labels["run"])
        if self._gateway is None or snapshot is None:
            return
        from prometheus_client import CollectorRegistry, push_to_gateway

        # This run alone: the Pushgateway writes the group's labels over those of whatever it gets.
        registry, group = CollectorRegistry(), {"run": snapshot.labels["run"]}
        registry.register(_Collector(snapshot))
        with self._harmless(f"Pushgateway {self._gateway}"):
            push_to_gateway(self._gateway, self._job, registry, group, timeout=_PUSH_TIMEOUT_S)

    @contextlib.contextmanager
    def _harmless(self, what: str) -> Iterator[None]:
        """A run that stops is paid for all the same, so it does not stop for its metrics; once, the log says why."""
        try:
            yield
        except Exception as error:
            failure = (self._labels["run"], what)
            if failure not in self._failed:
                self._failed.add(failure)
                cause = " ".join(f"{type(error).__name__}: {error}".split())
                logger.warning(f"PrometheusCallback: no new {what} ({cause}); training and its budget go on without")


def _serve(port: int, address: str, registry: CollectorRegistry) -> Any:
    from prometheus_client import start_http_server

    way_out = "give a free port and an address of this machine, such as 127.0.0.1"
    try:
        return start_http_server(port, address, registry)[0]
    except OSError as error:
        cause = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            way_out = "choose another, or share one PrometheusCallback between the trainers of a process"
        raise PrivacyError(
            f"port={port} at address={address!r} cannot serve metrics ({cause}): {way_out}; nothing was reserved"
        ) from None


def _port(port: object) -> int | None:
    if port is None:
        return None
    if isinstance(port, int) and not isinstance(port, bool) and 0 < port < 65536:
        return port
    raise PrivacyError(
        f"port={port!r} is no port that a Prometheus could be told of: give a number from 1 to 65535, such as 9464"
    )


def _text(name: str, value: object) -> str:
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value
    raise PrivacyError(f"{name}={value!r} must be text without line breaks: leave it out for the default")


def _gateway(url: object) -> str | None:
    """With its scheme; what is wrong with it is said without repeating it, since it may hold a password."""
    if url is None:
        return None
    way_out = "write for example pushgateway='http://127.0.0.1:9091'"
    if not isinstance(url, str) or not url.isprintable() or any(map(str.isspace, url)):
        raise PrivacyError(f"pushgateway must be the URL of a Pushgateway as text: {way_out}")
    whole = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(whole)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or parts.query or parts.fragment:
        raise PrivacyError(f"pushgateway is not the http or https URL of a Pushgateway: {way_out}")
    if "@" in parts.netloc:
        raise PrivacyError(f"pushgateway has a user or password, which could not be sent on: {way_out}")
    return whole
