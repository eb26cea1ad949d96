"""The Grafana dashboard as code; `build.py` writes it to dashboard.json.

It shows what `dpfa_hf.PrometheusCallback` exports, which is public or covered by the noise, and nothing else. Epsilon
on the way says at every place that the guarantee is the one at the last planned step (P20). No panel shows a rate of
steps: step times follow private batch sizes (P23).
"""

from __future__ import annotations

import json
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, text, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    LegendDisplayMode,
    LegendPlacement,
    LineInterpolation,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    DataTransformerConfig,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

UID = "dpfa-privacy"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RUN, DATASET = '{dataset=~"$dataset", run=~"$run"}', '{dataset=~"$dataset"}'
PROGRESS = (
    "A progress figure, not a guarantee: the guarantee is epsilon at the last planned step, whether or not the run "
    "gets that far. Ending early does not make it smaller."
)
GREEN, ORANGE, RED = "green", "orange", "red"
ABOVE_PLAN = 1.000001
# Names of the queries of a panel.
LETTERS = "ABCDEFGH"


def by_run(metric: str) -> str:
    """One value a run, over all exporters that have shown it."""
    return f"max by (dataset, run) ({metric}{RUN})"


def query(expression: str, legend: str = "{{run}}") -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expression).legend_format(legend).range()


def latest(expression: str, legend: str = "{{run}}") -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expression).legend_format(legend).instant()


def thresholds(*steps: tuple[float, str]) -> dashboard.ThresholdsConfig:
    """Green, and from each value on the color beside it."""
    first = Threshold(value=None, color=GREEN)
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(
        [first, *(Threshold(value=value, color=color) for value, color in steps)]
    )  # fmt: skip


def figure(title: str, description: str, *queries: prometheus.Dataquery, width: int = 4) -> stat.Panel:
    panel = stat.Panel().title(title).description(description).datasource(SOURCE).height(4).span(width)
    panel = panel.graph_mode(BigValueGraphMode.NONE).color_mode(BigValueColorMode.VALUE).thresholds(thresholds())
    panel = panel.text_mode(BigValueTextMode.VALUE_AND_NAME)
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    for letter, each in zip(LETTERS, queries, strict=False):
        panel = panel.with_target(each.ref_id(letter))
    return panel


def curve(title: str, description: str, *queries: prometheus.Dataquery, width: int = 12) -> timeseries.Panel:
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = timeseries.Panel().title(title).description(description).datasource(SOURCE).height(8).span(width)
    panel = panel.legend(legend.show_legend(True)).fill_opacity(0).line_interpolation(LineInterpolation.STEP_AFTER)
    for letter, each in zip(LETTERS, queries, strict=False):
        panel = panel.with_target(each.ref_id(letter))
    return panel


def columns(title: str, description: str, values: dict[str, str], hidden: tuple[str, ...] = ()) -> table.Panel:
    """A row for each set of labels, and a column for each of `values`: its title -> expression."""
    panel = table.Panel().title(title).description(description).datasource(SOURCE).height(6).span(24).show_header(True)
    names, hide = {}, {"Time": True, **dict.fromkeys(hidden, True)}
    for letter, (name, expression) in zip(LETTERS, values.items(), strict=False):
        panel = panel.with_target(latest(expression, "").format(PromQueryFormat.TABLE).ref_id(letter))
        names[f"Value #{letter}"] = name
    if len(values) == 1:
        names, hide = {}, hide | {"Value": True, "Value #A": True}
    organize = {"renameByName": names, "excludeByName": hide, "indexByName": {}}
    panel = panel.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    return panel.with_transformation(DataTransformerConfig(id_val="organize", options=organize))


def variables(board: dashboard.Dashboard) -> dashboard.Dashboard:
    source = dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    board = board.with_variable(source)
    for name, label, values in (
        ("dataset", "Data set", "label_values(dpfa_epsilon_guarantee, dataset)"),
        ("run", "Run", 'label_values(dpfa_epsilon_guarantee{dataset=~"$dataset"}, run)'),
    ):
        variable = dashboard.QueryVariable(name).label(label).query(values).datasource(SOURCE)
        variable = variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
        board = board.with_variable(variable.multi(True).include_all(True).all_value(".*"))
    return board


def guarantee(board: dashboard.Dashboard) -> dashboard.Dashboard:
    board = board.with_row(dashboard.Row("Guarantee"))
    none = ValueMap({"0": ValueMappingResult(text="none", color=GREEN)})
    panels: list[Any] = [
        figure(
            "ε, the guarantee",
            "Epsilon at the last planned step: what the weights are good for, from the first step on.",
            latest(by_run("dpfa_epsilon_guarantee")),
        ).decimals(3),
        figure("δ", "Delta of the guarantee; below 1/n.", latest(by_run("dpfa_delta"))).unit("sci"),
        figure("Target ε", "What the operator asked for.", latest(by_run("dpfa_epsilon_target"))).decimals(3),
        figure(
            "Runs that are NOT PRIVATE",
            "Runs whose epsilon is infinite: target_epsilon=inf, or no noise.",
            latest(f"count({by_run('dpfa_epsilon_guarantee')} == +Inf) or vector(0)", "NOT PRIVATE"),
        )
        .mappings([none])
        .thresholds(thresholds((1, RED))),
        figure(
            "Steps charged of planned",
            "Steps in the ledger; all of the plan's epsilon is reserved, however many they are.",
            latest(f"{by_run('dpfa_steps_charged')} / ({by_run('dpfa_steps_planned')} > 0)"),
        )
        .unit("percentunit")
        .thresholds(thresholds((ABOVE_PLAN, RED))),
        figure("Processes", "Processes that train the run together.", latest(by_run("dpfa_processes"))),
        columns(
            "The plan",
            "Fixed before the first step and never changed; all of it public. Adaptive clipping moves C.",
            {
                "σ": by_run("dpfa_noise_multiplier"),
                "q": by_run("dpfa_sampling_probability"),
                "C": by_run("dpfa_clipping_norm"),
                "expected batch": by_run("dpfa_expected_batch_size"),
                "batch ceiling": by_run("dpfa_max_batch_size"),
                "n, privacy units": by_run("dpfa_num_units"),
                "steps": by_run("dpfa_steps_planned"),
            },
        ),
        columns(
            "What the guarantee is of",
            "The unit that is protected, what counts as a neighbouring data set, and how it was accounted.",
            {"": f"dpfa_info{RUN}"},
            ("__name__", "instance", "job"),
        ),
    ]
    for panel in panels:
        board = board.with_panel(panel)
    return board


def progress(board: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        board.with_row(dashboard.Row("Progress"))
        .with_panel(text.Panel().title("").content(PROGRESS).height(2).span(24))
        .with_panel(
            curve(
                "Progress ε (the guarantee is the one at the last planned step)",
                PROGRESS + " 'planned' is the accountant's curve of the ledger's plan at the ledger's step.",
                query(by_run("dpfa_epsilon_spent"), "so far {{run}}"),
                query(by_run("dpfa_epsilon_planned"), "planned {{run}}"),
                query(by_run("dpfa_epsilon_guarantee"), "guarantee {{run}}"),
                query(by_run("dpfa_epsilon_target"), "target {{run}}"),
            ).min(0)
        )
        .with_panel(
            curve(
                "Drift of progress ε from the plan",
                PROGRESS + " The drift is 0 when process and ledger agree; DpfaEpsilonOffPlan fires above 1 %.",
                query(f"run:dpfa_epsilon_drift:ratio{RUN}"),
            )
            .unit("percentunit")
            .min(0)
        )
        .with_panel(
            curve(
                "Steps",
                "Charged in the ledger, taken by the optimiser, left, and planned.",
                query(by_run("dpfa_steps_charged"), "charged {{run}}"),
                query(by_run("dpfa_steps_taken"), "taken {{run}}"),
                query(by_run("dpfa_steps_remaining"), "left {{run}}"),
                query(by_run("dpfa_steps_planned"), "planned {{run}}"),
            ).min(0)
        )
        .with_panel(
            curve(
                "Training, and stalled",
                "1 while a process trains the run; stalled is 1 where no step was charged for ten minutes.",
                query(f"run:dpfa_training:max{RUN}", "training {{run}}"),
                query(f"run:dpfa_training:stalled{RUN}", "stalled {{run}}"),
            )
            .min(0)
            .max(1)
        )
    )


def training(board: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        board.with_row(dashboard.Row("Training"))
        .with_panel(
            curve(
                "Norm of the noised gradient",
                "After the noise, so covered by the guarantee. It is mostly noise.",
                query(by_run("dpfa_noised_gradient_norm")),
            )
        )
        .with_panel(
            curve(
                "Its z-score over six hours",
                "How many standard deviations from the average of six hours; DpfaGradientNormAnomaly fires beyond 4.",
                query(f"run:dpfa_noised_gradient_norm:zscore6h{RUN}"),
            )
        )
        .with_panel(
            curve(
                "Private loss",
                "A noised estimate of the training loss; its price is part of epsilon. The raw loss is withheld.",
                query(by_run("dpfa_private_loss")),
                width=8,
            )
        )
        .with_panel(curve("Learning rate", "Of the schedule.", query(by_run("dpfa_learning_rate")), width=8))
        .with_panel(
            curve(
                "Clipping norm C",
                "Constant, but for adaptive clipping, whose norm follows from noised counts.",
                query(by_run("dpfa_clipping_norm")),
                width=8,
            )
        )
    )


def ledger(board: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        board.with_row(dashboard.Row("Ledger"))
        .with_panel(
            curve(
                "Head of the ledger",
                "Number of its last entry: it never falls.",
                query(by_run("dpfa_ledger_head_sequence")),
                width=8,
            )
        )
        .with_panel(
            curve(
                "Entries that the ledger lacks",
                "Of those that the run has seen within a day; above 0 an older copy of the ledger is in use, which "
                "gives spent budget back.",
                query(f"run:dpfa_ledger_head_sequence:behind1d{RUN}"),
                width=8,
            )
        )
        .with_panel(
            curve(
                "Steps charged and not taken",
                "What crashes have cost, and by how much that grew within an hour.",
                query(by_run("dpfa_ledger_lag_steps"), "all {{run}}"),
                query(f"run:dpfa_ledger_lag_steps:growth1h{RUN}", "within 1 h {{run}}"),
                width=8,
            )
        )
    )


def budget(board: dashboard.Dashboard) -> dashboard.Dashboard:
    board = board.with_row(dashboard.Row("Budget of the data set"))
    used = figure(
        "Budget used",
        "Reserved by all runs on the data set, for good. Empty for data sets without a budget.",
        latest(f"dataset:dpfa_budget:used_ratio{DATASET}", "{{part}} {{dataset}}"),
        width=6,
    )
    board = board.with_panel(
        used.height(8).unit("percentunit").decimals(1).thresholds(thresholds((0.8, ORANGE), (0.99, RED)))
    )
    for part, symbol in (("epsilon", "ε"), ("delta", "δ")):
        panel = curve(
            f"{symbol} reserved, and the budget",
            "Reserved epsilons and deltas of runs add up.",
            query(f"max by (dataset) (dpfa_dataset_reserved_{part}{RUN})", "reserved {{dataset}}"),
            query(f"max by (dataset) (dpfa_dataset_budget_{part}{RUN})", "budget {{dataset}}"),
            width=6,
        )
        board = board.with_panel(panel.min(0) if part == "epsilon" else panel.min(0).unit("sci"))
    forecast = curve(
        "Budget used a week from now",
        "The line through the last seven days, a week further.",
        query(f"dataset:dpfa_budget:used_ratio_forecast7d{DATASET}", "{{part}} {{dataset}}"),
        width=6,
    )
    return board.with_panel(forecast.unit("percentunit").min(0))


def events(board: dashboard.Dashboard) -> dashboard.Dashboard:
    board = board.with_row(dashboard.Row("Alerts and events"))
    board = board.with_panel(
        columns(
            "Alerts that fire",
            "Those of the chosen data sets, and of all their runs.",
            {"": f'ALERTS{{alertname=~"Dpfa.+", alertstate="firing", {DATASET[1:]}'},
            ("__name__", "instance", "job", "alertstate"),
        )
    )
    for title, description, metric in (
        ("Halts", "Ends of training by the budget: the plan's last step was taken.", "dpfa_halts_total"),
        ("Refusals", "What the library refused to do, to keep the guarantee true.", "dpfa_refusals_total"),
        ("Resumes", "Times that the run was resumed from a checkpoint.", "dpfa_resumes_total"),
    ):
        board = board.with_panel(figure(title, description, latest(by_run(metric)), width=8))
    return board


def build() -> str:
    """The dashboard as JSON."""
    board = dashboard.Dashboard("Privacy of training runs (dpfa_hf)").uid(UID).tags(["dpfa", "privacy"])
    board = board.description("Public numbers of differentially private training runs: guarantee, ledger and budgets.")
    board = board.refresh("1m").time("now-6h", "now").timezone("utc").editable()
    for part in (variables, guarantee, progress, training, ledger, budget, events):
        board = part(board)
    built = board.build()
    # Fixed, so that links to a panel survive the next build.
    for number, panel in enumerate(built.panels or [], 1):
        panel.id_val = number
    return json.dumps(built, cls=JSONEncoder, indent=2, ensure_ascii=False) + "\n"
