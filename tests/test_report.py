"""What a report and a model card may and may not say (P20, P22, P25, P26)."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dpfa_hf import report as report_module
from dpfa_hf.accounting import EpsilonCurve, make_plan
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.errors import PrivacyError
from dpfa_hf.plan import PrivacyPlan
from dpfa_hf.report import BEGIN, END, TAGS, build_report, read_report, write_report

PASSWORD = "s3cr3t"
FINGERPRINT = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    arguments = PrivacyArguments(target_epsilon=8.0, noise_multiplier=1.0, accountant="rdp")
    return make_plan(arguments, num_units=5000, expected_batch_size=200, max_steps=40)


def built(plan: PrivacyPlan, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "plan": plan,
        "run": "ab" * 16,
        "steps": 10,
        "dataset": "clinic notes",
        "dataset_spent": (plan.epsilon + 1, 2 * plan.delta),
        "ledger_url": f"postgresql://alice:{PASSWORD}@host:5432/ledger?sslpassword={PASSWORD}",
        "model": {
            "class": "BertForSequenceClassification",
            "base_model": "google/bert-mini",
            "adapter": "LORA",
            "trainable_parameters": 1000,
            "total_parameters": 200000,
        },
        "loss": "task: sequence_classification",
        "sampler": "truncated Poisson",
        "noise": {"generator": plan.noise_generator, "standard_deviation": plan.noise_standard_deviation},
        "log_private_metrics": False,
        "eval_data": None,
    }
    return build_report(**(arguments | changes))


def card_of(directory: Path) -> str:
    return (directory / "README.md").read_text(encoding="utf-8")


def written(directory: Path, report: dict[str, Any]) -> str:
    write_report(directory, report)
    return card_of(directory)


def section_of(card: str) -> str:
    return card[card.index(BEGIN) : card.index(END)]


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"\d+\.?\d*(?:e-?\d+)?", text)]


def states_guarantee_only(text: str, plan: PrivacyPlan, steps: int) -> bool:
    """Whether every figure near epsilon(T_max) or epsilon(stop) in `text` is the former, rounded up."""
    stop = EpsilonCurve(plan).at(steps)
    assert stop < 0.9 * plan.epsilon
    stated = [float(found) for found in re.findall(r"ε = (\d+\.?\d*)", text)]
    return not any(abs(n - stop) < 2e-3 * stop for n in numbers(text)) and min(stated) >= plan.epsilon


def leaks(directory: Path) -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in directory.iterdir()]
    return [secret for secret in (PASSWORD, FINGERPRINT, "alice") if any(secret in text for text in texts)]


def test_epsilon_is_that_of_the_last_planned_step_however_early_the_run_stopped(
    plan: PrivacyPlan, tmp_path: Path
) -> None:
    report = built(plan, steps=10)
    assert report["guarantee"]["epsilon"] == plan.epsilon
    assert report["guarantee"]["at_step"] == plan.max_steps
    assert states_guarantee_only(written(tmp_path, report), plan, 10)
    assert {json.dumps(built(plan, steps=s)["guarantee"]) for s in (0, 10, 40)} == {json.dumps(report["guarantee"])}


def test_mutant_stop_time_epsilon_on_the_card_is_caught(plan: PrivacyPlan, tmp_path: Path) -> None:
    report = built(plan, steps=10)
    report["guarantee"]["epsilon"] = EpsilonCurve(plan).at(10)
    assert not states_guarantee_only(written(tmp_path, report), plan, 10)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://alice:{PASSWORD}@host/db",
        f"postgresql://alice:{PASSWORD}/x@y?z@host/db",
        f"postgresql+psycopg://host/db?user=alice&password={PASSWORD}",
        f"host=db user=alice password={PASSWORD}",
        f"postgresql://alice:p@{PASSWORD}@host/db?options=@",
    ],
)
def test_no_credential_reaches_any_file(plan: PrivacyPlan, tmp_path: Path, url: str) -> None:
    write_report(tmp_path, built(plan, ledger_url=url, dataset=None))
    assert leaks(tmp_path) == []


def test_mutant_ledger_url_passed_on_as_it_is_is_caught(
    plan: PrivacyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "without_credentials", lambda url: url)
    write_report(tmp_path, built(plan))
    assert set(leaks(tmp_path)) == {PASSWORD, "alice"}


def test_ledger_url_keeps_what_finds_the_ledger(plan: PrivacyPlan) -> None:
    assert built(plan)["ledger"] == "postgresql://***@host:5432/ledger"
    assert built(plan, ledger_url="sqlite:////home/a@b/ledger.db")["ledger"] == "sqlite:////home/a@b/ledger.db"
    assert built(plan, ledger_url=None)["ledger"] is None


def test_a_fingerprint_is_refused_as_a_name_and_no_name_is_called_so(plan: PrivacyPlan, tmp_path: Path) -> None:
    for name in (FINGERPRINT, f"unnamed-{FINGERPRINT}"):
        with pytest.raises(PrivacyError, match="fingerprint") as caught:
            built(plan, dataset=name)
        assert FINGERPRINT not in str(caught.value)
    assert "this fingerprint only" in written(tmp_path, built(plan, dataset=None))
    assert leaks(tmp_path) == []


def test_mutant_fingerprint_let_through_is_caught(
    plan: PrivacyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "_FINGERPRINT", re.compile("(?!)"))
    write_report(tmp_path, built(plan, dataset=f"unnamed-{FINGERPRINT}"))
    assert leaks(tmp_path) == [FINGERPRINT]


def test_everything_that_p25_lists_is_there(plan: PrivacyPlan, tmp_path: Path) -> None:
    curve = {1: 0.5, 40: plan.epsilon}
    report = built(plan, curve=curve, resumed=2, eval_data="public")
    stated = report["mechanism"]
    for name in ("sampling_probability", "noise_multiplier", "clipping_norm", "max_steps", "max_batch_size"):
        assert stated[name] == getattr(plan, name)
    for name in ("expected_batch_size", "sensitivity_slack", "num_units"):
        assert stated[name] == getattr(plan, name)
    assert report["accountant"]["curve"] == [[1, 0.5], [40, plan.epsilon]]
    assert report["accountant"]["version"] == plan.accountant_version
    assert report["steps"] == {"charged": 10, "planned": 40, "resumed": 2}
    assert report["dataset"]["epsilon"] == plan.epsilon + 1
    assert report["audit"] is None
    assert PrivacyPlan.from_dict(report["plan"]) == plan and report["plan_sha256"] == plan.sha256()
    text = json.dumps(report).lower()
    for word in ("central", "zero_out", "truncated poisson", "tuning", "snapped to a grid", "real arithmetic"):
        assert word in text
    assert {each["status"] for each in report["assumptions"]} == {
        "enforced",
        "tested",
        "operator's word",
        "not assessed",
    }
    assert not re.search(r"complian|score|gdpr|hipaa", text + written(tmp_path, report).lower())


def test_every_coordinate_that_a_step_releases_is_stated_with_its_share(tmp_path: Path) -> None:
    arguments = PrivacyArguments(target_epsilon=8.0, noise_multiplier=1.0, accountant="rdp", clipping="adaptive")
    plan = make_plan(arguments, num_units=5000, expected_batch_size=200, max_steps=40, loss_scale=1.5)
    noise = {"generator": plan.noise_generator, "standard_deviation": 0.25}
    report = built(plan, clipping_norm=0.25, noise=noise, dataset_spent=None)
    mechanism = report["mechanism"]
    assert [each["longest"] for each in mechanism["coordinates"]] == [1.0, 0.08, 0.08]
    assert "1.5" in mechanism["coordinates"][1]["what"]
    together = math.sqrt(sum(each["longest"] ** 2 for each in mechanism["coordinates"]))
    assert mechanism["joint_sensitivity"] == pytest.approx(together, rel=1e-12)
    assert (mechanism["clipping_norm"], mechanism["clipping_norm_reached"]) == (1.0, 0.25)
    assert sum("private_loss" in line or "clipping norm" in line for line in report["releases"]["covered"]) == 2
    card = written(tmp_path, report)
    assert "norm C = 1 at first" in card and "the loss, clamped to between 0 and 1.5 (at most 0.08 C)" in card
    assert f"{float(re.findall(r'at most ([0-9.]+) C of one unit', card)[0]):.4g}" == "1.007"


def test_a_model_that_is_spread_states_that_a_row_may_end_the_run(plan: PrivacyPlan) -> None:
    for spread in (True, False):
        listed = [
            each for each in built(plan, spread=spread)["assumptions"] if "No row ends the run" in each["assumption"]
        ]
        assert [each["status"] for each in listed] == ["not assessed"] * spread


def test_several_processes_state_that_they_have_the_same_rows(plan: PrivacyPlan) -> None:
    for processes in (1, 2):
        listed = [each["assumption"] for each in built(plan, processes=processes)["assumptions"]]
        assert sum("the same rows in the same order" in each for each in listed) == processes - 1


def test_without_added_coordinates_none_is_stated(plan: PrivacyPlan) -> None:
    report = built(plan)
    assert [each["longest"] for each in report["mechanism"]["coordinates"]] == [1.0]
    assert not any("private_loss" in line or "clipping norm" in line for line in report["releases"]["covered"])


def test_the_floating_point_mode_decides_what_is_claimed_and_what_it_rests_on(
    plan: PrivacyPlan, tmp_path: Path
) -> None:
    snapped, hardened = plan, replace(plan, floating_point="hardened")
    words = {}
    for mode in (snapped, hardened):
        report = built(mode)
        (line,) = (line for line in written(tmp_path, report).splitlines() if line.startswith("| Noise generator"))
        rows = {each["assumption"]: each["status"] for each in report["assumptions"]}
        words[mode.floating_point] = line, rows
    line, rows = words["snapped"]
    assert "real arithmetic" in line and "finite" not in line
    assert rows["Rounding in float32 stays within the sensitivity slack"] == "tested"
    assert [rows[row] for row in rows if "real arithmetic" in row] == ["not assessed"]
    line, rows = words["hardened"]
    assert "finite precision, on the assumptions below" in line and "real arithmetic" not in line
    assert not any("real arithmetic" in row or "float32" in row for row in rows)
    stated = {"numbers in the machine": "enforced", "worst case": "enforced", "same bits": "tested"}
    unproved = ("IEEE 754", "2^-42", "mpmath", "ChaCha20", "logarithms", "Dropout")
    for word, status in (stated | dict.fromkeys(unproved, "not assessed")).items():
        assert [rows[row] for row in rows if word in row] == [status], word
    not_private = built(replace(hardened, epsilon=math.inf, target_epsilon=math.inf), dataset_spent=None)
    claimed = {each["assumption"]: each["status"] for each in not_private["assumptions"]}
    assert [claimed[row] for row in claimed if "numbers in the machine" in row] == ["not assessed"]


@pytest.mark.parametrize(("adjacency", "says"), [("zero_out", "is not covered"), ("replace_one", "is covered too")])
def test_users_are_stated_with_their_column_and_what_adjacency_covers(
    plan: PrivacyPlan, adjacency: str, says: str, tmp_path: Path
) -> None:
    users = replace(
        plan, privacy_unit="user", privacy_unit_column="sender", max_examples_per_user=3, adjacency=adjacency
    )
    unit = built(users)["unit"]
    assert "the column sender" in unit["what"] and "at most 3 of the user's rows" in unit["how_built"]
    assert says in unit["neighbours"] and "number of users" in unit["public"]
    text = " ".join(written(tmp_path, built(users)).split())
    assert "at most 3 of the user's rows" in text and says in text
    assumptions = {each["assumption"]: each["status"] for each in built(users)["assumptions"]}
    assert sum("user whom its column names" in each for each in assumptions) == 1
    assert "users" not in built(plan)["unit"]["public"]


@pytest.mark.parametrize("column", [END, "a | **b**", "<script>", "{plan}"])
def test_a_columns_name_puts_no_markup_into_the_card(plan: PrivacyPlan, column: str, tmp_path: Path) -> None:
    card = written(tmp_path, built(replace(plan, privacy_unit="user", privacy_unit_column=column)))
    assert card.count(END) == 1 and "<script>" not in card and "**b**" not in card
    assert read_report(tmp_path)["plan"]["privacy_unit_column"] == column


def test_documents_are_stated_with_what_the_operator_vouches_for(plan: PrivacyPlan, tmp_path: Path) -> None:
    report = built(replace(plan, privacy_unit="document"))
    assert report["unit"]["privacy_unit"] == "document" and "only then packed, whole" in report["unit"]["how_built"]
    words = {each["assumption"] for each in report["assumptions"] if each["status"] == report_module.WORD}
    only_here = words - {each["assumption"] for each in built(plan)["assumptions"]}
    assert only_here == {"One row of the data set is one whole document, neither packed nor cut before sampling"}
    assert "one document, that is, one row" in written(tmp_path, report)


def test_what_the_operator_switched_on_is_written(plan: PrivacyPlan) -> None:
    quiet, loud = built(plan), built(plan, log_private_metrics=True, eval_data="private")
    assert not any("loss" in release for release in quiet["releases"]["not_covered"])
    assert any("training loss" in release for release in loud["releases"]["not_covered"])
    assert any("evaluation results" in release for release in loud["releases"]["not_covered"])
    status = {each["assumption"]: each["status"] for each in loud["assumptions"]}
    assert not any("stay out of the logs" in assumption for assumption in status)


@pytest.mark.parametrize("reason", ["inf", "seeded", "noise"])
def test_a_run_without_a_guarantee_says_not_private_first_and_carries_no_tag(
    plan: PrivacyPlan, tmp_path: Path, reason: str
) -> None:
    write_report(tmp_path, built(plan))
    endless = replace(plan, epsilon=math.inf, target_epsilon=math.inf)
    report = {
        "inf": lambda: built(endless, dataset_spent=(math.inf, 0.1)),
        "seeded": lambda: built(plan, seeded=True),
        "noise": lambda: built(plan, noise={"generator": "chacha20", "private": False}),
    }[reason]()
    assert report["private"] is False
    assert report["guarantee"]["epsilon"] == report["dataset"]["epsilon"] == "inf"
    card = written(tmp_path, report)
    assert section_of(card).removeprefix(BEGIN).lstrip().startswith("## NOT PRIVATE")
    assert card.index("NOT PRIVATE") < card.index("|")
    assert "ε = " + "inf" not in card.split("|")[0] and not set(TAGS) & set(ModelCard(card).data.tags or [])
    assert "Covered by the guarantee" not in card and f"{plan.epsilon:.3f}" not in card


def test_a_worst_case_attacker_is_stated_no_better_than_the_bound(plan: PrivacyPlan, tmp_path: Path) -> None:
    card = written(tmp_path, built(plan))
    stated = float(re.search(r"at most ([\d.]+) % of the time", card).group(1))  # type: ignore[union-attr]
    odds = math.exp(plan.epsilon)
    bound = 100 * (odds + plan.delta) / (odds + 1)
    assert bound <= stated <= bound + 0.01


def test_json_round_trips_with_infinity_and_no_draft_stays(plan: PrivacyPlan, tmp_path: Path) -> None:
    endless = replace(plan, epsilon=math.inf, target_epsilon=math.inf)
    report = built(endless, dataset_spent=(math.inf, 0.1))
    write_report(tmp_path / "new", report)
    text = (tmp_path / "new" / "privacy.json").read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == read_report(tmp_path / "new") == report
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["README.md", "privacy.json"]


def test_a_failed_write_leaves_the_old_report(
    plan: PrivacyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path, built(plan, steps=1))

    def full(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(report_module.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path, built(plan, steps=2))
    assert read_report(tmp_path)["steps"]["charged"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "privacy.json"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"format": 99}', "\x00"])
def test_a_missing_or_damaged_report_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "privacy.json").write_text(content, encoding="utf-8")
    with pytest.raises(PrivacyError, match="privacy.json") as caught:
        read_report(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 41},
        {"steps": -1},
        {"dataset_spent": (0.1, 1e-3)},
        {"dataset_spent": (100.0, 1e-12)},
        {"noise": {"standard_deviation": 0.5}},
        {"noise": {"generator": "torch"}},
        {"noise": {"floating_point_mode": "hardened"}},
        {"curve": {40: 0.1}},
        {"curve": {41: 0.1}},
        {"curve": {3: 99.0}},
    ],
)
def test_arguments_that_contradict_the_plan_are_refused(plan: PrivacyPlan, changes: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError) as caught:
        built(plan, **changes)
    assert "\n" not in str(caught.value)


def test_a_foreign_mapping_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="damaged"):
        write_report(tmp_path, {"format": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_local_base_model_gives_away_no_path(plan: PrivacyPlan, tmp_path: Path) -> None:
    model = {"class": "M", "adapter": None, "trainable_parameters": 1, "total_parameters": 1}
    for name in ("/home/alice/models/mine", "C:\\alice\\models\\mine", "../alice/mine/"):
        report = built(plan, model={**model, "base_model": name})
        assert report["model"]["base_model"] == "mine" and report["model"]["base_model_origin"] == "local directory"
        data = ModelCard(written(tmp_path, report)).data
        assert data.base_model is None and data.library_name == "transformers"
    assert leaks(tmp_path) == []


# ---- merging into a card that is there ------------------------------------------------------------------------------

CARDS = {
    "peft": "---\nbase_model: google/bert-mini\nlibrary_name: peft\ntags:\n- lora\n- dp-sgd\n---\n\n# Model Card for "
    "Model ID\n\n<!-- Provide a quick summary. -->\n\ntext\n### Framework versions\n\n- PEFT 0.21",
    "trainer": "---\nlibrary_name: transformers\nlicense: mit\nmodel-index:\n- name: out\n  results: []\n---\n\n<!-- "
    "This model card has been\ngenerated automatically. -->\n\n# out\n\ntext\n",
    "no header": "# Mine\n\ntext\n",
    "no title": "text only",
    "empty": "",
    "broken header": "---\ntags: [unclosed\nlicense: {mit\n---\n\n# Mine\n\ntext\n",
    "list as header": "---\n- a\n- b\n---\n# Mine\ntext\n",
    "odd keys": "---\n1: x\n---\n# Mine\ntext\n",
    "unclosed header": "---\nlicense: mit\n# Mine\ntext\n",
    "tag as string": "---\ntags: mine\n---\n# Mine\ntext\n",
    "windows": "---\r\nlicense: mit\r\n---\r\n\r\n# Mine\r\n\r\ntext\r\n",
    "lost end": f"# Mine\n\n{BEGIN}\nold\n\ntext\n",
    "lost begin": f"# Mine\n\nold\n{END}\n\ntext\n",
    "section moved": f"# Mine\n\ntext\n\n{BEGIN}\nstale number 1.23\n{END}\n\nlast words",
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_keeps_its_text_and_metadata_and_writing_again_changes_nothing(
    plan: PrivacyPlan, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(CARDS[name].encode())
    first = (write_report(tmp_path, built(plan)), path.read_bytes())[1]
    again = (write_report(tmp_path, built(plan)), path.read_bytes())[1]
    assert first == again
    text = first.decode()
    assert text.count(BEGIN) == text.count(END) == 1 and "stale" not in text
    outside = text[: text.index(BEGIN)] + text[text.index(END) + len(END) :]
    body = re.sub(rf"(?s){BEGIN}.*?{END}|{BEGIN}|{END}", "", CARDS[name])
    if name in ("peft", "trainer", "windows", "tag as string"):
        body = re.sub(r"(?s)^---\r?\n.*?\n---\r?\n", "", body)
    assert all(line in outside for line in body.splitlines())
    data = ModelCard(text).data
    assert set(TAGS) <= set(data.tags) and len(data.tags) == len(set(data.tags))
    if name == "windows":
        assert "\n" not in text.replace("\r\n", "")


def test_metadata_of_others_survives(plan: PrivacyPlan, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    header = (
        "---\nlicense: mit\nbase_model: someone/else\nlibrary_name: timm\ntags:\n- b\n- a\nmodel-index:\n- name: x\n"
        "  results:\n  - task: {type: t}\n    custom: kept\n---\n# T\n"
    )
    path.write_text(header, encoding="utf-8")
    card = written(tmp_path, built(plan))
    for kept in ("license: mit", "base_model: someone/else", "library_name: timm", "custom: kept"):
        assert kept in card
    assert ModelCard(card, ignore_metadata_errors=True).data.tags == ["b", "a", *TAGS]


def test_bytes_that_are_not_utf8_survive(plan: PrivacyPlan, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"# Mine\n\ncaf\xe9\n")
    write_report(tmp_path, built(plan))
    assert b"caf\xe9" in (tmp_path / "README.md").read_bytes()


def test_mutant_merge_that_appends_without_removing_is_caught(
    plan: PrivacyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "_SECTION", re.compile("(?!)"))
    first = written(tmp_path, built(plan))
    assert written(tmp_path, built(plan)) != first


def test_names_cannot_break_out_of_the_table_or_the_section(plan: PrivacyPlan, tmp_path: Path) -> None:
    card = written(tmp_path, built(plan, dataset=f"a|b {END} <script> `x`"))
    assert card.count(END) == 1 and "<script>" not in card and "a\\|b" in card


def test_a_real_peft_card_is_merged_through_repeated_saves(plan: PrivacyPlan, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    base = BertForSequenceClassification(BertConfig(vocab_size=10, **sizes))
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    cards = []
    for _ in range(3):
        model.save_pretrained(tmp_path)
        cards.append(written(tmp_path, built(plan)))
    assert cards[1] == cards[2]
    data = ModelCard(cards[2]).data
    assert data.library_name == "peft" and {"lora", *TAGS} <= set(data.tags)
    assert "Framework versions" in cards[2] and cards[2].index("# Model Card") < cards[2].index(BEGIN)
