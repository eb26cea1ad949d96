"""Recording rules and alerts for Prometheus 2.42 and later, as code; `build.py` writes them to rules.yaml.

Every expression reads metrics of `dpfa_hf.PrometheusCallback` alone. Four things shape all of them:

- A run outlives its processes: a resumed one has another `instance`, and a Pushgateway keeps what the last one pushed.
  So series are first brought together by (dataset, run), and what must be of a living process asks for
  `dpfa_training == 1` of the same exporter.
- Values change when Trainer logs, not at every step or scrape: what must not be older than a log is compared with what
  was seen before it.
- What is divided by may be 0, absent or infinite. Each rule says what then happens, and `DpfaMetricsIncomplete` fires
  where a missing metric would keep another alert silent.
- Step times follow private batch sizes (P23), so no rule computes how fast steps, epsilon or the head of the ledger
  move: the only question asked of them is whether they moved at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Where the repository of the operator is; a placeholder, which `build.py --base-url` and the chart replace.
BASE_URL = "https://example.org/dpfa_hf"

RUN = "dataset, run"
EXPORTER = "job, instance, dataset, run"
# The process's epsilon and the ledger's, both from one table of epsilons: they differ by nothing when all is well.
DRIFT = 0.01
# Of the z-score: one log in 16,000 of a normal variable.
ANOMALY = 4
LOGS = 20
NEARLY_USED, EXHAUSTED = 0.8, 0.99
# Above what rounding of sums may add.
ABOVE = 1.000001
# A resume may cost this share of a run's steps before somebody should look.
LOST_STEPS = 0.02
RESUMES = 3
REQUIRED = (
    "dpfa_epsilon_spent",
    "dpfa_epsilon_planned",
    "dpfa_epsilon_guarantee",
    "dpfa_epsilon_target",
    "dpfa_delta",
    "dpfa_steps_charged",
    "dpfa_steps_planned",
    "dpfa_noise_multiplier",
    "dpfa_ledger_head_sequence",
    "dpfa_ledger_lag_steps",
)
# What a run may never change, however often it is resumed. The clipping norm has an alert of its own.
FIXED = (
    "noise_multiplier",
    "sampling_probability",
    "expected_batch_size",
    "max_batch_size",
    "num_units",
    "steps_planned",
    "delta",
    "epsilon_target",
    "epsilon_guarantee",
)
FIXED_LABELS = "privacy_unit, adjacency, accountant, clipping, noise_generator, floating_point"


@dataclass(frozen=True)
class Record:
    """A recording rule: `level:metric:operation`, where the level is what it is told apart by (run or dataset)."""

    name: str
    expression: str

    def to_dict(self) -> dict[str, Any]:
        """As Prometheus reads it."""
        return {"record": self.name, "expr": self.expression}


@dataclass(frozen=True)
class Alert:
    """An alert.

    Attributes:
        name: in CamelCase; its page is docs/runbooks/<the same in kebab-case>.md.
        severity: "critical" (the guarantee or the record of it is in doubt), "warning" (a run or a budget needs
            somebody) or "info".
        expression: what fires.
        summary, description: one line each, as Prometheus's templates.
        wait: how long the expression must hold (`for`); none for what is true at the first sight of it.
        hold: how long the alert stays after the expression has ceased to hold, where it passes by itself.
    """

    name: str
    severity: str
    expression: str
    summary: str
    description: str
    wait: str | None = None
    hold: str | None = None

    @property
    def page(self) -> str:
        """Name of the runbook page: DpfaNotPrivate -> dpfa-not-private.md."""
        return "".join(f"-{each.lower()}" if each.isupper() else each for each in self.name).lstrip("-") + ".md"

    def to_dict(self, base_url: str) -> dict[str, Any]:
        """As Prometheus reads it."""
        times = {"for": self.wait, "keep_firing_for": self.hold}
        return {
            "alert": self.name,
            "expr": self.expression,
            **{name: value for name, value in times.items() if value is not None},
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{base_url}/docs/runbooks/{self.page}",
            },
        }


def by_run(metric: str) -> str:
    """One value a run, over all exporters that have shown it."""
    return f"max by ({RUN}) ({metric})"


def living(metric: str) -> str:
    """Of processes that train now; not what a Pushgateway keeps of those that did."""
    return f"max by ({RUN}) ({metric} and on ({EXPORTER}) dpfa_training == 1)"


def changed(metric: str, field: str) -> str:
    """Whether a run has shown two values within a day, at any of its exporters."""
    most = f"max by ({RUN}) (max_over_time({metric}[1d]))"
    least = f"min by ({RUN}) (min_over_time({metric}[1d]))"
    return f'label_replace({most} != {least}, "field", "{field}", "", "")'


def any_of(*expressions: str) -> str:
    return "\nor ".join(expressions)


NORM = "run:dpfa_noised_gradient_norm:live"
Z_SCORE = "run:dpfa_noised_gradient_norm:zscore6h"
HEAD, LIVE_HEAD = "run:dpfa_ledger_head_sequence:max", "run:dpfa_ledger_head_sequence:live"
TRAINING, CHARGED, LAG = "run:dpfa_training:max", "run:dpfa_steps_charged:max", "run:dpfa_ledger_lag_steps:max"
GROWTH = "run:dpfa_ledger_lag_steps:growth1h"
USED, FORECAST = "dataset:dpfa_budget:used_ratio", "dataset:dpfa_budget:used_ratio_forecast7d"
# Data sets without a name share one label, so what is compared over the runs of a data set leaves them out.
NAMED = 'dataset!="unnamed"'


def fresh(recorded: str, within: str) -> str:
    """A recorded series where a process has looked anew: it has changed, or was not there before."""
    return f"(({recorded} and changes({recorded}[{within}]) > 0) or ({recorded} unless {recorded} offset {within}))"


def used(part: str) -> str:
    reserved, budget = by_run(f"dpfa_dataset_reserved_{part}"), by_run(f"dpfa_dataset_budget_{part}")
    return f'label_replace(max by (dataset) ({reserved} / ({budget} > 0)), "part", "{part}", "", "")'


RECORDS = (
    Record(TRAINING, by_run("dpfa_training")),
    Record(CHARGED, by_run("dpfa_steps_charged")),
    # At step 0 both are 0, and the drift is 0: the divisor is never below 1e-9. Without a guarantee both are infinite,
    # their difference is not a number, and `>= 0` drops it: DpfaNotPrivate speaks of such a run.
    Record(
        "run:dpfa_epsilon_drift:ratio",
        f"abs({by_run('dpfa_epsilon_spent')} - {by_run('dpfa_epsilon_planned')})"
        f"\n  / clamp_min({by_run('dpfa_epsilon_planned')}, 1e-9) >= 0",
    ),
    # Without values that are no finite number, which would spoil the averages of hours; the alert looks at them.
    Record(NORM, f"{living('dpfa_noised_gradient_norm')} < +Inf"),
    # Of a constant norm there is no z-score, nor of fewer logs than can tell: however many scrapes repeat a value, it
    # is one.
    Record(
        Z_SCORE,
        f"({NORM} - avg_over_time({NORM}[6h]))"
        f"\n  / (stddev_over_time({NORM}[6h]) > 1e-9 * avg_over_time({NORM}[6h]))"
        f"\nand changes({NORM}[6h]) >= {LOGS}",
    ),
    # 1 where no step was charged for ten minutes, 0 where one was; nothing where nobody trains or all steps are done.
    Record(
        "run:dpfa_training:stalled",
        f"(changes({CHARGED}[10m]) == bool 0)"
        f"\nand on ({RUN}) {TRAINING} == 1"
        f"\nand on ({RUN}) {by_run('dpfa_steps_remaining')} > 0",
    ),
    Record(LAG, by_run("dpfa_ledger_lag_steps")),
    Record(GROWTH, f"{LAG} - min_over_time({LAG}[1h])"),
    Record(HEAD, by_run("dpfa_ledger_head_sequence")),
    Record(LIVE_HEAD, living("dpfa_ledger_head_sequence")),
    # Entries that the ledger of a living process lacks of those that its run has seen within a day: 0 when all is well.
    Record("run:dpfa_ledger_head_sequence:behind1d", f"max_over_time({HEAD}[1d]) - {LIVE_HEAD}"),
    # Nothing for data sets without a budget; a budget is above 0, and one that is shown as 0 is no number to divide by.
    Record(USED, any_of(used("epsilon"), used("delta"))),
    Record(FORECAST, f"predict_linear({USED}[7d], 7 * 86400)"),
)

ALERTS = (
    Alert(
        "DpfaNotPrivate",
        "critical",
        any_of(f"{by_run('dpfa_epsilon_guarantee')} == +Inf", f"{by_run('dpfa_noise_multiplier')} == 0"),
        "NOT PRIVATE: run {{ $labels.run }} on {{ $labels.dataset }} has no guarantee",
        "Its epsilon is infinite: it was started with target_epsilon=inf or with a noise multiplier of 0. Whatever it "
        "trains may contain its data.",
    ),
    Alert(
        "DpfaEpsilonOffPlan",
        "critical",
        f"run:dpfa_epsilon_drift:ratio > {DRIFT}",
        "Run {{ $labels.run }} on {{ $labels.dataset }}: its epsilon is off the accountant's plan",
        "The epsilon that the process shows and the one at the ledger's step of the plan that the ledger keeps differ "
        "by {{ $value | humanizePercentage }}. Process and ledger do not speak of the same steps or the same plan.",
        wait="5m",
    ),
    Alert(
        "DpfaEpsilonAboveGuarantee",
        "critical",
        any_of(
            f"{by_run('dpfa_epsilon_spent')} > {ABOVE} * {by_run('dpfa_epsilon_guarantee')}",
            f"{by_run('dpfa_epsilon_guarantee')} > {ABOVE} * {by_run('dpfa_epsilon_target')}",
        ),
        "Run {{ $labels.run }} on {{ $labels.dataset }}: epsilon is above what was guaranteed",
        "Epsilon {{ $value | humanize }} is above the guarantee, or the guarantee above the target. Neither can happen "
        "to a run that looks ahead.",
    ),
    Alert(
        "DpfaDeltaTooLarge",
        "critical",
        f"{by_run('dpfa_delta')} * {by_run('dpfa_num_units')} >= 1",
        "Run {{ $labels.run }} on {{ $labels.dataset }}: delta is not below 1/n",
        "Delta times the number of privacy units is {{ $value | humanize }}: such a guarantee allows a unit to be "
        "published whole.",
    ),
    Alert(
        "DpfaStepsBeyondPlan",
        "critical",
        f"{CHARGED} > {by_run('dpfa_steps_planned')}",
        "Run {{ $labels.run }} on {{ $labels.dataset }}: more steps are charged than were planned",
        "{{ $value | humanize }} steps are charged, and the guarantee is for fewer.",
    ),
    Alert(
        "DpfaStepsNotCharged",
        "critical",
        f"min by ({RUN}) (dpfa_ledger_lag_steps) < 0",
        "Run {{ $labels.run }} on {{ $labels.dataset }}: it took steps that the ledger has not charged",
        "Charged minus taken is {{ $value | humanize }}. Every step must be in the ledger before its noise is drawn.",
        wait="1m",
    ),
    Alert(
        "DpfaPlanChanged",
        "critical",
        any_of(
            *(changed(f"dpfa_{field}", field) for field in FIXED),
            f"label_replace(count by ({RUN}) (count by ({RUN}, {FIXED_LABELS}) (last_over_time(dpfa_info[1d]))) > 1, "
            '"field", "info", "", "")',
        ),
        "Run {{ $labels.run }} on {{ $labels.dataset }}: {{ $labels.field }} changed within the run",
        "A plan is fixed before the first step; this run has shown two values of {{ $labels.field }} within a day.",
    ),
    Alert(
        "DpfaClippingNormChanged",
        "critical",
        changed("dpfa_clipping_norm", "clipping_norm")
        + f'\nunless on ({RUN}) last_over_time(dpfa_info{{clipping="adaptive"}}[1d])',
        "Run {{ $labels.run }} on {{ $labels.dataset }}: the clipping norm changed within the run",
        "Only adaptive clipping moves the norm, and this run does not say that it is adaptive.",
    ),
    Alert(
        "DpfaDatasetBudgetExceeded",
        "critical",
        f"{USED} > {ABOVE}",
        "Data set {{ $labels.dataset }}: more {{ $labels.part }} is reserved than its budget has",
        "{{ $value | humanizePercentage }} of the budget is reserved. The ledger refuses the run that would do this.",
    ),
    Alert(
        "DpfaLedgerHeadWentBackwards",
        "critical",
        "run:dpfa_ledger_head_sequence:behind1d > 0",
        "Run {{ $labels.run }} on {{ $labels.dataset }}: its ledger is older than it was",
        "The ledger lacks {{ $value | humanize }} entries that it had within the last day. An older copy gives spent "
        "budget back.",
        hold="1h",
    ),
    # A head that was read within the last five minutes is at least any that was seen before them, in one ledger.
    Alert(
        "DpfaLedgerOlderCopy",
        "critical",
        f"max by (dataset) (max_over_time({HEAD}{{{NAMED}}}[1d] offset 5m))"
        f"\n  - on (dataset) group_right () {fresh(f'{LIVE_HEAD}{{{NAMED}}}', '5m')} > 0",
        "Run {{ $labels.run }} on {{ $labels.dataset }}: its ledger lacks what other runs have written",
        "The ledger lacks {{ $value | humanize }} entries that were seen within the last day, or the data set has two "
        "ledgers. Either spends the budget twice.",
        hold="1h",
    ),
    Alert(
        "DpfaDatasetBudgetExhausted",
        "warning",
        f"{USED} >= {EXHAUSTED}",
        "Data set {{ $labels.dataset }}: its {{ $labels.part }} budget is used up",
        "{{ $value | humanizePercentage }} of the budget is reserved, for good. Further runs will be refused.",
    ),
    Alert(
        "DpfaDatasetBudgetForecast",
        "warning",
        f"{FORECAST} >= 1 and {USED} < {EXHAUSTED} and {USED} offset 1d",
        "Data set {{ $labels.dataset }}: its {{ $labels.part }} budget will be used up within a week",
        "If runs reserve as they did in the last seven days, {{ $value | humanizePercentage }} of the budget will be "
        "reserved in a week.",
        wait="1h",
    ),
    Alert(
        "DpfaGradientNormAnomaly",
        "warning",
        any_of(
            f"abs({Z_SCORE}) > {ANOMALY}",
            f"{NORM} == 0 and on ({RUN}) {by_run('dpfa_steps_taken')} > 1",
            f"{living('dpfa_noised_gradient_norm')} unless ({living('dpfa_noised_gradient_norm')} < +Inf)",
        ),
        "Run {{ $labels.run }} on {{ $labels.dataset }}: the noised gradient is not as it was",
        "The norm of the noised gradient is far from its average of six hours, 0, or no number at all "
        "({{ $value | humanize }}). It is mostly noise, whose size is planned.",
        wait="1m",
        hold="15m",
    ),
    Alert(
        "DpfaTrainingStalled",
        "warning",
        "run:dpfa_training:stalled == 1",
        "Run {{ $labels.run }} on {{ $labels.dataset }} trains, and charges no step",
        "No log has shown a new step for half an hour. Nothing is lost: what is charged stays charged.",
        wait="20m",
    ),
    Alert(
        "DpfaExporterDown",
        "warning",
        # What a Pushgateway keeps counts as the run's last word if it knows of all steps, so was pushed at the end.
        f"max by ({RUN}) (last_over_time(dpfa_training[1h])) == 1"
        f"\nunless on ({RUN}) {TRAINING} == 1"
        f"\nunless on ({RUN}) {CHARGED} >= max_over_time({CHARGED}[1h])",
        "Run {{ $labels.run }} on {{ $labels.dataset }} was training, and shows no metrics any more",
        "Its process ended without saying so, or cannot be reached. None of its other alerts can fire meanwhile.",
        wait="5m",
    ),
    Alert(
        "DpfaMetricsIncomplete",
        "warning",
        f"{TRAINING} == 1"
        + f" unless on ({RUN}) (\n  "
        + f"\n  and on ({RUN}) ".join(by_run(metric) for metric in REQUIRED)
        + "\n)",
        "Run {{ $labels.run }} on {{ $labels.dataset }}: metrics that alerts need are missing",
        "It trains and does not show all of epsilon, steps, noise and ledger: alerts about what is missing are silent.",
        wait="10m",
    ),
    Alert(
        "DpfaRunTrainedTwice",
        "warning",
        f"count by ({RUN}) (dpfa_training == 1) > 1",
        "Run {{ $labels.run }} on {{ $labels.dataset }} is trained by {{ $value | humanize }} processes at once",
        "The ledger stops all but the last that resumed it; or one exporter is scraped twice.",
        wait="5m",
    ),
    Alert(
        "DpfaLedgerLagGrowing",
        "warning",
        f"{GROWTH} > 1 and {GROWTH} / ({by_run('dpfa_steps_planned')} > 0) > {LOST_STEPS}",
        "Run {{ $labels.run }} on {{ $labels.dataset }}: steps are charged and not taken",
        "Within an hour {{ $value | humanizePercentage }} of the plan was charged for steps that the model does not "
        "have: it was resumed from a checkpoint that was far behind.",
    ),
    Alert(
        "DpfaRefusals",
        "warning",
        any_of(
            f"max by ({RUN}) (increase(dpfa_refusals_total[1h])) > 0",
            # A process counts from 0, and the first that is seen of it may be the 1 of its end.
            f"{by_run('dpfa_refusals_total')} > 0 unless on ({RUN}) {by_run('dpfa_refusals_total offset 1h')}",
            # One that was refused before its run had an id pushes the same 1 every time.
            f"max by ({RUN}) (dpfa_refusals_total > 0 and on (job, run) changes(push_time_seconds[1h]) > 0)",
        ),
        "A training on {{ $labels.dataset }} was refused (run {{ $labels.run }})",
        "The library refused to begin or to go on, to keep the guarantee true. The job's log says what, and the way "
        "out. The run is 'none' where it had not begun.",
    ),
    Alert(
        "DpfaResumesTooOften",
        "warning",
        # Processes count their own resumes. Those at one address look alike; what each has lost tells them apart.
        any_of(
            f"sum by ({RUN}) (max_over_time(dpfa_resumes_total[6h])) > {RESUMES}",
            f"changes({LAG}[6h]) > {RESUMES}",
        ),
        "Run {{ $labels.run }} on {{ $labels.dataset }} was resumed {{ $value | humanize }} times",
        "Every crash wastes the steps since the last checkpoint, which stay charged.",
    ),
    Alert(
        "DpfaDatasetBudgetNearlyUsed",
        "info",
        f"{USED} >= {NEARLY_USED}",
        "Data set {{ $labels.dataset }}: {{ $value | humanizePercentage }} of its {{ $labels.part }} budget is used",
        "What is reserved is never given back.",
    ),
    Alert(
        "DpfaDatasetHasNoBudget",
        "info",
        f"{TRAINING} == 1 unless on ({RUN}) {by_run('dpfa_dataset_budget_epsilon')}",
        "Run {{ $labels.run }} on {{ $labels.dataset }}: no budget limits its data set",
        "Its own epsilon is kept; nothing limits the sum over further runs on the same data.",
        wait="5m",
    ),
)


def rules(base_url: str = BASE_URL) -> dict[str, Any]:
    """The whole file: one group, whose rules see what those before them have recorded at the same instant."""
    every = [*(record.to_dict() for record in RECORDS), *(alert.to_dict(base_url) for alert in ALERTS)]
    return {"groups": [{"name": "dpfa", "rules": every}]}
