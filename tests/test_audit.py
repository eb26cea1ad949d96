"""The audit: its statistics against independent calculations, its checks on sound and broken trainers, its ledger."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from dpfa_hf import database, ledger
from dpfa_hf.audit import AUDIT_NAME, canaries, draws, isolation, mutants, noise_law, read_audit, replay, write_audit
from dpfa_hf.audit.results import Check, Mutant, audit_record
from dpfa_hf.audit.subject import Subject, scaled
from dpfa_hf.cli import app
from dpfa_hf.errors import PrivacyError
from dpfa_hf.ledger import Ledger

# ---------------------------------------------------------------------------------------------------------------------
# The bound that guesses prove


def exact_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 of arXiv:2305.08846 written out with 50 digits, sum by sum."""
    with mpmath.workdps(50):
        q = mpmath.exp(epsilon) / (1 + mpmath.exp(epsilon))

        def mass(low: int, high: int) -> Any:
            return mpmath.fsum(mpmath.binomial(r, k) * q**k * (1 - q) ** (r - k) for k in range(max(low, 0), high + 1))

        alpha = max((mass(v - i, v - 1) / i for i in range(1, v + 1)), default=mpmath.mpf(0))
        return float(min(1, mass(v, r) + 2 * m * delta * alpha))


@pytest.mark.parametrize(
    ("m", "r", "v", "epsilon", "delta"),
    [
        (100, 40, 31, 0.3, 0.0),
        (100, 40, 31, 0.3, 1e-3),
        (60, 60, 60, 2.5, 1e-5),
        (30, 12, 0, 1.0, 0.1),
        (9, 7, 6, 0, 0.01),
    ],
)
def test_p_value_equals_a_sum_of_fifty_digits(m: int, r: int, v: int, epsilon: float, delta: float) -> None:
    found = canaries.p_values(m, r, v, np.array([0.1, epsilon]), delta)
    assert found[1] == pytest.approx(exact_p_value(m, r, v, epsilon, delta), rel=1e-9)


@pytest.mark.parametrize(("r", "v"), [(100, 90), (50, 50), (200, 120), (40, 20)])
def test_without_delta_the_bound_is_the_logit_of_clopper_and_pearson(r: int, v: int) -> None:
    accuracy = stats.beta.ppf(0.05, v, r - v + 1)
    exact = max(math.log(accuracy / (1 - accuracy)), 0.0)
    found = canaries.epsilon_lower_bound(400, r, v, 0.0)
    assert exact - 0.011 <= found <= exact  # rounded down to its grid


def test_delta_only_lowers_the_bound() -> None:
    bounds = [canaries.epsilon_lower_bound(500, 200, 190, delta) for delta in (0.0, 1e-6, 1e-4, 1e-3)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > bounds[-1] > 0


def test_the_bound_is_below_the_truth_of_randomised_response_as_often_as_is_claimed() -> None:
    generator, epsilon, runs = np.random.default_rng(5), 1.0, 200
    tells_truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    above = 0
    for _ in range(runs):
        right = int(generator.binomial(200, tells_truth))
        above += canaries.epsilon_lower_bound(200, 200, right, 0.0) > epsilon
    assert above <= stats.binom.isf(1e-6, runs, 0.05)


def test_choosing_the_best_of_several_bounds_after_seeing_is_paid_for() -> None:
    """Scores that say nothing, many attacks at once: the best bound is above 0 no oftener than in 1 of 20 runs."""
    generator, runs, above = np.random.default_rng(6), 200, 0
    for _ in range(runs):
        included = generator.random(60) < 0.5
        above += canaries.best_bound([generator.random(60) for _ in range(2)], included, 0.0).epsilon > 0
    assert above <= stats.binom.isf(1e-6, runs, 0.05)


@pytest.mark.parametrize(("m", "r", "v"), [(5, 6, 1), (5, 3, 4), (5, 3, -1)])
def test_impossible_counts_are_refused(m: int, r: int, v: int) -> None:
    with pytest.raises(PrivacyError, match="impossible"):
        canaries.p_values(m, r, v, np.array([1.0]), 0.0)


@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan])
def test_impossible_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(PrivacyError, match="confidence"):
        canaries.epsilon_lower_bound(5, 3, 2, 0.0, confidence)


def simulated(deviation: float, *, believed: float, seed: int = 0) -> canaries.Bound:
    """The mechanism in numpy: unit vectors that overlap a little, Poisson draws, Gaussian noise."""
    generator, steps, m, q = np.random.default_rng(seed), 8, 150, 0.5
    directions = generator.normal(size=(m, 400)) + 0.3
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    included = generator.random(m) < 0.5
    drawn = (generator.random((steps, m)) < q) * included
    releases = drawn @ directions + deviation * generator.normal(size=(steps, 400))
    scores = canaries.attack(torch.tensor(directions), torch.tensor(releases), q, believed)
    return canaries.best_bound([scores], included, 1e-5)


def test_the_attack_reads_what_is_not_noised_and_little_of_what_is() -> None:
    assert simulated(1e-3, believed=0.02).epsilon > 2.0
    found = [simulated(1.0, believed=1.0, seed=seed) for seed in range(3)]
    assert max(bound.epsilon for bound in found) < 2.0
    assert max(bound.right / bound.guesses for bound in found) > 0.6, "the attack tried nothing"


# ---------------------------------------------------------------------------------------------------------------------
# The checks, on the sound trainer and on every planted bug


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Path]:
    with isolation.ledgers_only_in(tmp_path.resolve()):
        yield tmp_path.resolve()


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return mutants.tiny_subject(tmp_path_factory.mktemp("subject"))


def test_a_sound_trainer_passes_every_check(subject: Subject, workshop: Path) -> None:
    found = [*replay.replay(subject, workshop / "sound"), *noise_law.noise_law(subject), *draws.draws(subject)]
    assert [check.name for check in found if not check.passed] == []
    planted = {each.check for each in mutants.MUTANTS.values()}
    assert {check.name for check in found} == planted - {canaries.CANARIES} | {replay.BEFORE_STEP_1}
    by_name = {check.name: check.figures for check in found}
    assert 0.9 < by_name[replay.CLIPPED_SUM]["largest_move"] <= 1 + 2**-10
    assert by_name[noise_law.NOISE_LAW]["numbers"] > 300_000


def test_bugs_of_three_kinds_at_once_fail_the_three_checks_of_the_replay(subject: Subject, workshop: Path) -> None:
    """The others, one by one: `dpfa audit --self-test`, in deploy/tests."""
    names = ("tied term dropped", "callback scales the gradient by the loss", "ledger written late")

    def mutate(trainer: Any) -> None:
        for name in names:
            mutants.MUTANTS[name].mutate(trainer)

    failed = [check.name for check in replay.replay(subject, workshop / "broken", mutate) if not check.passed]
    assert failed == [mutants.MUTANTS[name].check for name in names]


@pytest.mark.parametrize(
    "name",
    [
        "one tensor without noise",
        "key from the arguments' seed",
        "batches of a fixed size",
        "shuffled epochs",
        "the first units kept at the ceiling",
    ],
)
def test_planted_bug_is_caught(name: str, subject: Subject, workshop: Path) -> None:
    failed = [check.name for check in mutants.tried(name, workshop, subject) if not check.passed]
    assert mutants.MUTANTS[name].check in failed


def test_the_attack_refutes_a_claim_without_noise_alone(subject: Subject, workshop: Path) -> None:
    sound = canaries.canaries(subject, seconds=4.0)
    assert sound.check.passed and sound.canaries >= 64
    assert sound.epsilon_lower_bound <= sound.epsilon_claimed == sound.epsilon_of_plan == subject.plan_epsilon()
    broken = canaries.canaries(subject, seconds=4.0, mutate=mutants.no_noise)
    assert not broken.check.passed and broken.epsilon_lower_bound > 1.2 * broken.epsilon_claimed


def test_a_bug_that_is_not_caught_fails_the_audit(subject: Subject, workshop: Path, monkeypatch: Any) -> None:
    harmless = mutants.Planted(lambda trainer: None, draws.DRAWS, quick=True)
    monkeypatch.setattr(mutants, "MUTANTS", {"nothing at all": harmless})
    planted = mutants.plant(workshop, quick=True, tick=lambda name: None)
    assert planted == [Mutant("nothing at all", False, "")]
    assert record(mutants=planted)["passed"] is False


def test_the_claim_of_fewer_steps_is_that_of_those_steps(subject: Subject, workshop: Path) -> None:
    plan = subject.build(False).privacy_plan
    assert scaled(plan, plan.max_steps) is plan
    shorter = scaled(plan, 2)
    assert shorter.max_steps == 2 and 0 < shorter.epsilon < plan.epsilon


# ---------------------------------------------------------------------------------------------------------------------
# Nobody else's ledger


def test_an_audit_opens_no_ledger_but_its_own(tmp_path: Path, monkeypatch: Any) -> None:
    theirs, witness, own = tmp_path / "theirs.db", tmp_path / "witness.db", tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv("DPFA_LEDGER", f"sqlite:///{theirs}")
    monkeypatch.setenv("DPFA_LEDGER_WITNESS", f"sqlite:///{witness}")
    monkeypatch.setattr(ledger, "Ledger", Ledger)
    with isolation.ledgers_only_in(own):
        for url in (None, f"sqlite:///{theirs}", "postgresql://nobody@192.0.2.1/db"):
            with ledger.Ledger(url) as opened:
                assert str(own) in opened.display_url
        with pytest.raises(PrivacyError, match="not its own"):
            Ledger(f"sqlite:///{theirs}")  # the class from before
        with pytest.raises(PrivacyError, match="not its own"):
            database.Database(database.parse_url(f"sqlite:///{theirs}", "ledger"), create=True)
    assert not theirs.exists() and not witness.exists() and len(list(own.glob("*.db"))) == 3
    assert ledger.Ledger is Ledger
    with Ledger(f"sqlite:///{theirs}"):
        assert theirs.exists() and witness.exists()


# ---------------------------------------------------------------------------------------------------------------------
# audit.json


def record(**changed: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "subject": {"kind": "model", "name": "Bert", "run": None, "plan_sha256": None},
        "scaled_down": [],
        "checks": [Check("draws", True, "what", {"draws": 600})],
        "mutants": [Mutant("no noise", True, "noise law")],
        "epsilon_lower_bound": 0.5,
        "confidence": 0.95,
        "epsilon_claimed": math.inf,
        "epsilon_of_plan": 3.0,
        "canaries": 100,
    }
    return audit_record(**{**values, **changed})


def test_an_audit_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_audit(tmp_path) is None
    assert write_audit(tmp_path, record()) == tmp_path / AUDIT_NAME
    assert read_audit(tmp_path) == record() | {"created": read_audit(tmp_path)["created"]}
    assert [path.name for path in tmp_path.iterdir()] == [AUDIT_NAME]


def test_no_checks_at_all_is_no_pass() -> None:
    assert record()["passed"] and not record(checks=[])["passed"]
    assert not record(checks=[Check("draws", False, "what")])["passed"]


DAMAGES = {
    "no JSON": lambda text: text[:-20],
    "a list": lambda text: "[]",
    "a failed check called passed": lambda text: text.replace('"passed": true', '"passed": false', 1),
    "a mutant's verdict in words": lambda text: text.replace('"caught": true', '"caught": "yes"'),
    "another format": lambda text: text.replace('"format": 1', '"format": 2'),
    "a field less": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "canaries"}),
    "a flag for a number": lambda text: text.replace('"canaries": 100', '"canaries": true'),
    "epsilon in words": lambda text: text.replace('"epsilon_claimed": "inf"', '"epsilon_claimed": "small"'),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_audit_is_refused(name: str, tmp_path: Path) -> None:
    path = write_audit(tmp_path, record())
    damaged = DAMAGES[name](path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
    with pytest.raises(PrivacyError, match="damaged"):
        read_audit(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The command, before it takes minutes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "MODEL_OR_SCRIPT"),
        (["model", "--self-test"], "not both"),
        (["no-such-folder"], "is no folder to write audit.json into"),
        (["script.py", "--out", "nowhere/audit.json"], "is in a folder that is not there"),
        (["missing.py"], "is not there"),
        (["empty.py"], "defines no make_trainer"),
        (["broken.py"], "cannot be run (ZeroDivisionError"),
        (["plain.py"], "returned a object, not a DPTrainer"),
        (["few.py"], "NUM_UNITS=3"),
        (["text.py"], "make_trainer raised KeyError: 'text'; it must take the rows of example_row"),
        ([".", "--task", "poetry"], "poetry"),
    ],
)
def test_the_command_says_in_one_line_what_it_cannot_audit(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.py").write_text("")
    Path("broken.py").write_text("1 / 0\n")
    Path("plain.py").write_text("def make_trainer(train_dataset, output_dir):\n    return object()\n")
    Path("few.py").write_text("NUM_UNITS = 3\ndef make_trainer(train_dataset, output_dir):\n    pass\n")
    Path("text.py").write_text("def make_trainer(train_dataset, output_dir):\n    train_dataset[0]['text']\n")
    result = CliRunner().invoke(app, ["audit", *arguments])
    assert result.exit_code in (1, 2) and said in result.output and "Traceback" not in result.output
    assert result.exit_code == 2 or result.output.count("\n") == 1
    assert not list(tmp_path.glob("*.json"))


def test_the_bugs_that_every_audit_plants_try_every_kind_of_check() -> None:
    kinds = {planted.check for planted in mutants.MUTANTS.values()} - {noise_law.NOISE_SUPPORT}
    assert {planted.check for planted in mutants.MUTANTS.values() if planted.quick} == kinds
