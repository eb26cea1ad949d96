from __future__ import annotations

import itertools
import math
import multiprocessing
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import default_data_collator

from dpfa_hf import batch_selection
from dpfa_hf.batch_selection import LogicalBatches, TruncatedPoissonSampler, Users, split_micro_batches
from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example.units import ROWS_PER_UNIT

Make = Callable[[int, float, int, int], Iterable[np.ndarray]]

N, STEPS = 40, 10_000


def inclusion_matrix(batches: list[np.ndarray]) -> np.ndarray:
    included = np.zeros((len(batches), N))
    for step, batch in enumerate(batches):
        np.add.at(included[step], batch, 1)
    return included


def z_of_mean(x: np.ndarray, mean: float) -> float:
    """Largest distance of column means from `mean` in standard errors."""
    error = x.std(axis=0) / math.sqrt(len(x)) + 1e-12
    return float(np.max(np.abs(x.mean(axis=0) - mean) / error))


def violations(make: Make, q: float, max_batch_size: int, steps: int = STEPS) -> set[str]:
    """Returns the properties that the sampler breaks, at five standard errors, and more for maxima over units."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    batches = list(make(N, q, max_batch_size, steps))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    again = list(make(N, q, max_batch_size, 100))

    found = set()
    if all(np.array_equal(a, b) for a, b in zip(batches, again, strict=False)):
        found.add("repeats after seeding")
    if len(batches) != steps:
        found.add("steps skipped")
    included = inclusion_matrix(batches)
    sizes = included.sum(axis=1)
    if included.max() > 1 or min(batch.min(initial=0) for batch in batches) < 0:
        found.add("distinct")
    if sizes.max() > max_batch_size:
        found.add("ceiling")

    # The size is min(Binomial(n, q), B_max).
    law = stats.binom.pmf(np.arange(N + 1), N, q)
    law[min(max_batch_size, N)] += law[max_batch_size + 1 :].sum()
    law[max_batch_size + 1 :] = 0
    support = np.arange(N + 1)
    mean = float(law @ support)
    variance = float(law @ (support - mean) ** 2)
    fourth = float(law @ (support - mean) ** 4)
    if abs(sizes.mean() - mean) > 5 * math.sqrt(variance / len(sizes)):
        found.add("mean size")
    if abs(sizes.var() - variance) > 5 * math.sqrt((fourth - variance**2) / len(sizes)) + 1e-9:
        found.add("variance of the size")
    if abs((sizes == 0).mean() - law[0]) > 5 * math.sqrt(law[0] * (1 - law[0]) / len(sizes)):
        found.add("empty")

    # Every unit alike, also among the truncated draws, and pairs as the law of the size says.
    if z_of_mean(included, mean / N) > 6:
        found.add("inclusion")
    truncated = included[sizes == max_batch_size]
    if len(truncated) > 500 and max_batch_size < N and z_of_mean(truncated, max_batch_size / N) > 6:
        found.add("truncation")
    together = float(law @ (support * (support - 1))) / (N * (N - 1))
    observed = included.T @ included / len(included)
    pairs = observed[np.triu_indices(N, 1)]
    if np.max(np.abs(pairs - together)) > 8 * math.sqrt(together * (1 - together) / len(included)) + 1e-9:
        found.add("pairs")

    centred = included - mean / N
    scale = centred.var() * math.sqrt(len(included) - 1)
    returning = (centred[1:] * centred[:-1]).sum(axis=0)
    if np.max(np.abs(returning)) > 6 * scale + 1e-9 or abs(returning.sum()) > 5 * math.sqrt(N) * scale + 1e-9:
        found.add("steps")
    deviations = sizes - mean
    if abs(float(deviations[1:] @ deviations[:-1])) > 5 * variance * math.sqrt(len(sizes)) + 1e-9:
        found.add("steps")

    for chosen in (lambda size: size == max_batch_size, lambda size: 1 < size < max_batch_size):
        ends = np.array([(batch[0], batch[-1]) for batch in batches if len(batch) > 1 and chosen(len(batch))])
        if len(ends) > 500 and z_of_mean(ends.astype(float), (N - 1) / 2) > 5:
            found.add("order")
    return found


REGIMES = [(0.05, N), (0.05, 2), (0.5, 20), (0.97, N), (0.97, 38), (0.3, 1)]


@pytest.mark.parametrize(("q", "max_batch_size"), REGIMES)
def test_sampler_is_truncated_poisson(q: float, max_batch_size: int) -> None:
    assert violations(TruncatedPoissonSampler, q, max_batch_size) == set()


def test_probability_one_takes_everybody_and_the_ceiling_still_holds() -> None:
    everybody = next(iter(TruncatedPoissonSampler(N, 1.0, N)))
    assert sorted(everybody.tolist()) == list(range(N))
    assert violations(TruncatedPoissonSampler, 1.0, 7, 3000) == set()


# Planted bugs: each must be caught by the same function, under the property named.


def honest(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    return TruncatedPoissonSampler(n, q, max_batch_size, steps)


def shuffled_epochs(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    generator = np.random.default_rng()
    size = round(n * q)
    epochs = (np.split(generator.permutation(n), n // size) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)


def fixed_size(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    generator = np.random.default_rng()
    return (generator.choice(n, round(n * q), replace=False) for _ in range(steps))


def with_replacement(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    generator = np.random.default_rng()
    return (generator.integers(0, n, min(generator.binomial(n, q), max_batch_size)) for _ in range(steps))


def first_ones_kept(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    return (np.random.permutation(np.sort(batch)[:max_batch_size]) for batch in honest(n, q, n, steps))


def no_ceiling(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    return honest(n, q, n, steps)


def redrawn_until_it_fits(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    fitting = (batch for batch in TruncatedPoissonSampler(n, q, n) if len(batch) <= max_batch_size)
    return itertools.islice(fitting, steps)


def empty_batches_redrawn(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    return itertools.islice((batch for batch in TruncatedPoissonSampler(n, q, max_batch_size) if len(batch)), steps)


def empty_batches_skipped(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    return (batch for batch in honest(n, q, max_batch_size, steps) if len(batch))


def seeded(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    return (np.flatnonzero(torch.rand(n).numpy() < q)[:max_batch_size] for _ in range(steps))


def whole_blocks(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    pairs = TruncatedPoissonSampler(n // 2, q, n // 2, steps)
    return (np.random.permutation(np.concatenate([2 * batch, 2 * batch + 1])) for batch in pairs)


def each_draw_used_twice(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    return (batch for batch in honest(n, q, max_batch_size, steps // 2) for _ in range(2))


def sorted_batches(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    return (np.sort(batch) for batch in honest(n, q, max_batch_size, steps))


def last_unit_forgotten(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    return honest(n - 1, q, max_batch_size, steps)


def doubled_probability(n: int, q: float, max_batch_size: int, steps: int) -> Iterable[np.ndarray]:
    return honest(n, 2 * q, max_batch_size, steps)


@pytest.mark.parametrize(
    ("mutant", "max_batch_size", "caught_by"),
    [
        (shuffled_epochs, N, "variance of the size"),
        (shuffled_epochs, N, "steps"),
        (fixed_size, N, "variance of the size"),
        (fixed_size, N, "empty"),
        (with_replacement, N, "distinct"),
        (first_ones_kept, 2, "truncation"),
        (no_ceiling, 2, "ceiling"),
        (redrawn_until_it_fits, 2, "mean size"),
        (empty_batches_redrawn, N, "empty"),
        (empty_batches_skipped, N, "steps skipped"),
        (seeded, N, "repeats after seeding"),
        (whole_blocks, N, "pairs"),
        (each_draw_used_twice, N, "steps"),
        (sorted_batches, 2, "order"),
        (last_unit_forgotten, N, "inclusion"),
        (doubled_probability, N, "mean size"),
    ],
)
def test_planted_sampling_bugs_are_caught(mutant: Make, max_batch_size: int, caught_by: str) -> None:
    assert caught_by in violations(mutant, 0.05, max_batch_size)


def test_inclusion_agrees_with_the_mean_over_a_large_population() -> None:
    n, q = 10**7, 1e-4
    batches = list(TruncatedPoissonSampler(n, q, 2000, 30))
    for batch in batches:
        assert batch.dtype == np.int64
        assert len(np.unique(batch)) == len(batch)
        assert batch.min() >= 0 and batch.max() < n
    assert abs(sum(map(len, batches)) - 30 * n * q) < 5 * math.sqrt(30 * n * q)
    assert stats.kstest(np.concatenate(batches) / n, "uniform").pvalue > 1e-6


@pytest.mark.parametrize("q", [1e-300, 1e-24, 1e-18])
def test_tiny_probability_draws_empty_batches_without_overflow(q: float) -> None:
    assert [len(batch) for batch in TruncatedPoissonSampler(2**40, q / 2**10, 5, 20)] == [0] * 20


@pytest.mark.parametrize(("word", "expected"), [(2**64 - 1, 1000), (0, 0)])
def test_extreme_uniforms_are_handled(word: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The largest uniform makes every gap 1, so one round of gaps does not reach the end: more must follow.
    monkeypatch.setattr(batch_selection, "_operating_system_words", lambda count: np.full(count, word, dtype=np.uint64))
    batch = next(iter(TruncatedPoissonSampler(1000, 0.04, 1000)))
    assert sorted(batch.tolist()) == list(range(expected))


# Entropy


class FreshDraws(IterableDataset[torch.Tensor]):
    def __iter__(self):  # type: ignore[no-untyped-def]
        return (torch.from_numpy(batch) for batch in TruncatedPoissonSampler(10**6, 1e-4, 200, 3))


def draw_in_a_child(sampler: TruncatedPoissonSampler) -> tuple[int, ...]:
    return tuple(next(iter(sampler)).tolist())


def global_draw_in_a_child(_: object) -> tuple[int, ...]:
    return tuple(np.random.randint(0, 10**6, 100).tolist())


def test_forked_processes_never_repeat_a_draw() -> None:
    sampler = TruncatedPoissonSampler(10**6, 1e-4, 200)
    context = multiprocessing.get_context("fork")
    np.random.seed(0)
    draws, global_draws = set(), set()
    for _ in range(3):
        with context.Pool(1) as pool:
            draws.add(pool.apply(draw_in_a_child, (sampler,)))
            global_draws.add(pool.apply(global_draw_in_a_child, (None,)))
    assert len(draws) == 3
    assert len(global_draws) == 1, "the check would not notice a generator that is copied by fork"


def test_data_loader_workers_never_repeat_a_draw() -> None:
    draws = {tuple(batch.tolist()) for batch in DataLoader(FreshDraws(), batch_size=None, num_workers=2)}
    assert len(draws) == 6


def test_global_generators_are_left_alone() -> None:
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy(), random.getstate()
    list(TruncatedPoissonSampler(N, 0.5, N, 10))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state(legacy=False)["state"]["key"])
    assert states[2] == random.getstate()


# The interface


class Rows(Dataset[list[int]]):
    def __getitem__(self, indices: np.ndarray) -> list[int]:
        return [int(index) for index in indices]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader_hands_over_whole_logical_batches_and_the_empty_one(workers: int) -> None:
    draws = [np.array([3, 1, 2]), np.array([], dtype=np.int64), np.array([7])]
    sampler = TruncatedPoissonSampler(10, 0.2, 4, 3, _draws=draws)
    loader = DataLoader(Rows(), sampler=sampler, batch_size=None, num_workers=workers)
    assert len(loader) == 3
    assert list(loader) == [[3, 1, 2], [], [7]]


def test_injected_draws_are_declared() -> None:
    assert TruncatedPoissonSampler(10, 0.2, 4, _draws=[np.arange(3)]).injected
    assert not TruncatedPoissonSampler(10, 0.2, 4).injected


def test_length_is_the_number_of_steps_and_an_endless_sampler_has_none() -> None:
    assert len(TruncatedPoissonSampler(10, 0.2, 4, 12)) == 12
    assert list(TruncatedPoissonSampler(10, 0.2, 4, 0)) == []
    endless = TruncatedPoissonSampler(10, 0.2, 4)
    assert len(list(itertools.islice(endless, 50))) == 50
    with pytest.raises(TypeError, match="num_steps"):
        len(endless)


def test_every_iteration_draws_afresh() -> None:
    sampler = TruncatedPoissonSampler(1000, 0.5, 1000, 1)
    assert not np.array_equal(next(iter(sampler)), next(iter(sampler)))


@pytest.mark.parametrize("micro_batch_size", [1, 3, 10, 64])
@pytest.mark.parametrize("size", [0, 1, 9, 10])
def test_micro_batches_partition_the_batch_in_order(size: int, micro_batch_size: int) -> None:
    indices = np.random.permutation(100)[:size]
    parts = split_micro_batches(indices, micro_batch_size)
    assert len(parts) == math.ceil(size / micro_batch_size)
    assert all(0 < len(part) <= micro_batch_size for part in parts)
    assert [index for part in parts for index in part] == indices.tolist()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 0.1, 5), "num_units"),
        ((-3, 0.1, 5), "num_units"),
        ((10.0, 0.1, 5), "num_units"),
        ((True, 0.1, 5), "num_units"),
        ((10, 0.0, 5), "sampling_probability"),
        ((10, -0.1, 5), "sampling_probability"),
        ((10, 1.0001, 5), "sampling_probability"),
        ((10, math.nan, 5), "sampling_probability"),
        ((10, "0.1", 5), "sampling_probability"),
        ((10, 0.1, 0), "max_batch_size"),
        ((10, 0.1, None), "max_batch_size"),
        ((10, 0.1, 2.5), "max_batch_size"),
        ((10, 0.1, 5, -1), "num_steps"),
        ((10, 0.1, 5, 1.5), "num_steps"),
    ],
)
def test_bad_arguments_are_refused_by_name_in_one_line(arguments: tuple[object, ...], named: str) -> None:
    with pytest.raises(PrivacyError, match=named) as raised:
        TruncatedPoissonSampler(*arguments)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_ceiling_above_the_population_changes_nothing() -> None:
    assert violations(lambda n, q, _, steps: TruncatedPoissonSampler(n, q, 10 * n, steps), 0.05, N, 5000) == set()


def test_micro_batch_size_below_one_is_refused() -> None:
    with pytest.raises(PrivacyError, match="micro_batch_size"):
        split_micro_batches(np.arange(3), 0)


def test_sampler_takes_no_seed() -> None:
    with pytest.raises(TypeError):
        TruncatedPoissonSampler(10, 0.1, 5, seed=0)  # type: ignore[call-arg]


def cost_of_a_draw(num_units: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """(64-bit words from the operating system, bytes allocated at most), for an expected batch of 100."""
    source, taken = batch_selection._operating_system_words, []

    def counting(count: int) -> np.ndarray:
        taken.append(count)
        return source(count)

    tracemalloc.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(batch_selection, "_operating_system_words", counting)
            for _ in TruncatedPoissonSampler(num_units, 100 / num_units, 200, num_steps=3):
                pass
        return sum(taken) // 3, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def grows_with_the_data_set(monkeypatch: pytest.MonkeyPatch, largest: int) -> bool:
    costs = [cost_of_a_draw(num_units, monkeypatch) for num_units in (10**3, 10**5, largest)]
    return any(words > 500 or peak > 100_000 for words, peak in costs)


def test_words_and_memory_of_a_draw_do_not_grow_with_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not grows_with_the_data_set(monkeypatch, 10**11)


def test_mutant_that_asks_every_unit_grows_with_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def every_unit(trials: int, probability: float) -> np.ndarray:
        return np.flatnonzero(batch_selection._operating_system_words(trials) < probability * 2.0**64)

    monkeypatch.setattr(batch_selection, "_bernoulli_successes", every_unit)
    assert grows_with_the_data_set(monkeypatch, 10**6)


# ---- logical batches ------------------------------------------------------------------------------------------------


def good_row(i: int) -> dict[str, object]:
    return {"input_ids": [i + 1] * 4, "attention_mask": [1] * 4, "labels": i % 2}


class Unreadable(dict):
    """Stands for a row of which the data set itself raises."""


class ListOfRows(Dataset):
    def __init__(self, rows: list[dict[str, object]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, object]:
        if isinstance(self.rows[index], Unreadable):
            raise OSError("a damaged row")
        return self.rows[index]


HOSTILE_ROWS = {
    "cannot be read": Unreadable(),
    "cannot be collated": {"input_ids": ["a", "b"], "attention_mask": [1, 1], "labels": 0},
    "mask shorter than the tokens": {"input_ids": [9] * 4, "attention_mask": [1] * 3, "labels": 0},
    "no mask": {"input_ids": [9] * 4, "labels": 0},
    "no label": {"input_ids": [9] * 4, "attention_mask": [1] * 4},
    "a label that is no class": {"input_ids": [9] * 4, "attention_mask": [1] * 4, "labels": 0.5},
    "longer than the others": {"input_ids": [9] * 6, "attention_mask": [1] * 6, "labels": 0},
}


def collated_rows(batches: LogicalBatches, draw: list[int]) -> dict[int, dict[str, list]]:
    """First token -> what the model would be given of that row."""
    found: dict[int, dict[str, list]] = {}
    for batch in batches[batches.units(np.array(draw))]:
        columns = {name: value for name, value in batch.items() if name != ROWS_PER_UNIT}
        for i, tokens in enumerate(batch["input_ids"]):
            assert int(tokens[0]) not in found
            found[int(tokens[0])] = {name: (str(v.dtype), v[i].tolist()) for name, v in columns.items()}
    return found


@pytest.mark.parametrize("micro_batch_size", [1, 3, 100])
def test_every_row_of_a_draw_is_collated_once(micro_batch_size: int) -> None:
    batches = LogicalBatches(ListOfRows([good_row(i) for i in range(10)]), default_data_collator, micro_batch_size)
    assert sorted(collated_rows(batches, [7, 0, 3, 9])) == [1, 4, 8, 10]
    assert max(len(batch["input_ids"]) for batch in batches[np.arange(10)]) == min(micro_batch_size, 10)
    assert batches[np.array([], dtype=np.int64)] == []


def changed_by(row: dict[str, object], kind: type[LogicalBatches]) -> bool:
    rows = [row, *(good_row(i) for i in range(6))]
    draw = list(range(1, 7))
    batches = kind(ListOfRows(rows), default_data_collator, 100)
    before, after = collated_rows(batches, draw), collated_rows(batches, [0, *draw])
    return any(after.get(token) != columns for token, columns in before.items())


@pytest.mark.parametrize("name", HOSTILE_ROWS)
def test_no_row_changes_what_the_model_is_given_of_another(name: str) -> None:
    assert not changed_by(HOSTILE_ROWS[name], LogicalBatches)


def test_mutant_columns_of_the_first_row_for_all_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_selection, "_row_form", lambda row: None)
    assert changed_by(HOSTILE_ROWS["no mask"], LogicalBatches)
    assert changed_by(HOSTILE_ROWS["a label that is no class"], LogicalBatches)


def test_a_collator_that_packs_rows_together_is_not_taken_for_one_that_does_not() -> None:
    def flatten(rows: list[dict[str, list]]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]])}

    batches = LogicalBatches(ListOfRows([good_row(i) for i in range(4)]), flatten, 4)
    assert [tuple(batch["input_ids"].shape) for batch in batches[np.arange(4)]] == [(1, 4)] * 4


# ---- users ----------------------------------------------------------------------------------------------------------

# The rows of three users, of 1, 3 and 6 rows, in disorder.
OWNER = np.array([2, 1, 2, 2, 0, 1, 2, 2, 1, 2])
ROWS_OF = [[4], [1, 5, 8], [0, 2, 3, 6, 7, 9]]
Draw = Callable[[Users, int, int], np.ndarray]


def draw_violations(draw: Draw, times: int = 4000) -> set[str]:
    """What is wrong with drawing at most two rows of each user, at five standard deviations."""
    users, found = Users(OWNER), set()
    draws = [[np.sort(draw(users, user, 2)) for user in range(3)] for _ in range(times)]
    for user, rows in enumerate(ROWS_OF):
        mine = [each[user].tolist() for each in draws]
        if any(len(set(each)) != min(2, len(rows)) or not set(each) <= set(rows) for each in mine):
            found.add("number")
        subsets = Counter(map(tuple, mine))
        expected = times / math.comb(len(rows), min(2, len(rows)))
        possible = [tuple(each) for each in itertools.combinations(rows, min(2, len(rows)))]
        if any(abs(subsets[each] - expected) > 5 * math.sqrt(expected) for each in possible):
            found.add("subsets")
        inclusion = times * min(2, len(rows)) / len(rows)
        if any(abs(sum(row in each for each in mine) - inclusion) > 5 * math.sqrt(inclusion) for row in rows):
            found.add("inclusion")
        if len(rows) > 2 and sum(a == b for a, b in itertools.pairwise(mine)) > times / len(possible) * 1.5 + 1:
            found.add("steps")
    # The first subset of one user beside each of another's.
    table = np.zeros((2, 2))
    for each in draws:
        table[int(each[1].tolist() == [1, 5]), int(0 in each[2])] += 1
    if table.sum(0).all() and table.sum(1).all() and stats.chi2_contingency(table).pvalue < 1e-6:
        found.add("independence")
    return found


def test_each_subset_of_a_users_rows_is_equally_likely_and_users_are_independent() -> None:
    assert draw_violations(Users.draw) == set()


def first_rows(users: Users, user: int, most: int) -> np.ndarray:
    return np.array(ROWS_OF[user][:most])


def rows_with_replacement(users: Users, user: int, most: int) -> np.ndarray:
    return np.random.choice(ROWS_OF[user], min(most, len(ROWS_OF[user])))


def consecutive_rows(users: Users, user: int, most: int) -> np.ndarray:
    size = len(ROWS_OF[user])
    start = np.random.randint(size)
    return np.array([ROWS_OF[user][(start + i) % size] for i in range(min(most, size))])


def rows_chosen_once(users: Users, user: int, most: int) -> np.ndarray:
    return np.random.default_rng(user).permutation(ROWS_OF[user])[:most]


class OneChoiceForAll:
    """Users share the random numbers of a step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, users: Users, user: int, most: int) -> np.ndarray:
        generator = np.random.default_rng(self.calls // 3)
        self.calls += 1
        return np.array(ROWS_OF[user])[np.argsort(generator.random(6)[: len(ROWS_OF[user])])][:most]


@pytest.mark.parametrize(
    ("mutant", "caught_by"),
    [
        (first_rows, "inclusion"),
        (rows_with_replacement, "number"),
        (consecutive_rows, "subsets"),
        (rows_chosen_once, "steps"),
        (OneChoiceForAll(), "independence"),
    ],
)
def test_planted_bugs_of_drawing_rows_are_caught(mutant: Draw, caught_by: str) -> None:
    assert caught_by in draw_violations(mutant)


def test_drawing_rows_reads_no_seeded_generator_and_never_repeats_in_a_forked_process() -> None:
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy(), random.getstate()
    users = Users(np.zeros(10**5, dtype=int))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        draws = {tuple(rows) for rows in pool.starmap(users.draw, [(0, 20)] * 6, chunksize=1)}
    assert len(draws) == 6
    assert torch.equal(states[0], torch.get_rng_state()) and random.getstate() == states[2]
    assert np.array_equal(states[1], np.random.get_state(legacy=False)["state"]["key"])


def test_an_index_of_users_holds_a_few_bytes_a_row_and_time_does_not_grow_with_a_users_rows() -> None:
    users = Users(np.repeat([0, 1], [10**6 - 1, 1]))
    assert users._rows.nbytes + users._ends.nbytes < 5 * 10**6
    assert len(users) == 2 and users.draw(1, 8).tolist() == [10**6 - 1]
    assert len(set(users.draw(0, 8).tolist())) == 8


@pytest.mark.parametrize("values", [["b", "a", "b", "ä", "a"], [7, -1, 7, 10**12, -1]])
def test_equal_values_of_a_column_are_one_user_in_every_form_of_a_data_set(values: list) -> None:
    rows = datasets.Dataset.from_dict({"x": range(5), "who": values})

    def grouped(dataset: datasets.Dataset) -> set[frozenset[int]]:
        users = Users.of(dataset, "who")
        return {frozenset(int(dataset[int(i)]["x"]) for i in users.draw(user, 9)) for user in range(len(users))}

    expected = {frozenset({0, 2}), frozenset({1, 4}), frozenset({3})}
    two_chunks = datasets.concatenate_datasets([rows.select([0, 1]), rows.select([2, 3, 4])])
    for dataset in (rows, rows.shuffle(seed=0), rows.with_format("torch"), two_chunks, rows.class_encode_column("who")):
        assert grouped(dataset) == expected
    assert grouped(rows.select([4, 0, 1])) == {frozenset({0}), frozenset({1, 4})}


def users_of(rows: dict[str, list], column: str = "who") -> Users:
    return Users.of(datasets.Dataset.from_dict({"x": [1, 2], **rows}), column)


SECRET = "alice@example.org"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Users.of(ListOfRows([{"who": SECRET}]), "who"), "datasets.Dataset.from_list"),
        (lambda: Users.of([{"who": SECRET}], "who"), "datasets.Dataset.from_list"),
        (lambda: users_of({"author": [SECRET, "b"]}), "'author'"),
        (lambda: users_of({"who": [SECRET, None]}), "drop them"),
        (lambda: users_of({"who": [1.0, math.nan]}), "text or whole numbers"),
        (lambda: users_of({"who": [[SECRET], ["b"]]}), "text or whole numbers"),
        (lambda: users_of({"who": [True, False]}), "text or whole numbers"),
        (lambda: users_of({"who": [None, None]}), "text or whole numbers"),
    ],
)
def test_columns_that_name_no_user_are_refused_in_one_line_that_quotes_no_value(
    make: Callable[[], Users], named: str
) -> None:
    with pytest.raises(PrivacyError, match=named) as raised:
        make()
    assert "\n" not in str(raised.value) and SECRET not in str(raised.value)


def user_batches(rows: list[dict[str, object]], owner: list[int], size: int, most: int, **options: Any) -> Any:
    options = {"users": Users(np.array(owner)), "max_examples_per_user": most, **options}
    return LogicalBatches(ListOfRows(rows), default_data_collator, size, **options)


def rows_by_user(batches: list[Any]) -> list[list[int]]:
    """First tokens of each user's rows."""
    found = []
    for batch in batches:
        ends = np.cumsum([0, *batch[ROWS_PER_UNIT]])
        tokens = batch["input_ids"][:, 0].tolist()
        assert ends[-1] == len(tokens)
        found += [sorted(tokens[a:b]) for a, b in itertools.pairwise(ends)]
    return found


@pytest.mark.parametrize(("size", "most"), [(1, 6), (2, 3), (1, 2), (100, 6)])
def test_a_user_is_whole_in_one_micro_batch_of_at_most_so_many_rows(size: int, most: int) -> None:
    batches = user_batches([good_row(i) for i in range(10)], OWNER.tolist(), size, most)
    units = batches.units(np.array([2, 0, 1]))
    made = batches[units]
    assert sorted(rows_by_user(made)) == sorted(sorted(int(row) + 1 for row in rows) for rows in units)
    assert sorted(map(len, rows_by_user(made))) == sorted(min(most, len(rows)) for rows in ROWS_OF)
    assert all(sum(batch[ROWS_PER_UNIT]) <= size * most for batch in made)
    if size == 2:
        assert len(made) == 2, "users of few rows do not share a micro-batch"
    assert batches[batches.units(np.array([], dtype=np.int64))] == []


@pytest.mark.parametrize("name", [name for name in HOSTILE_ROWS if name != "longer than the others"])
def test_a_user_with_a_bad_row_changes_nothing_that_the_model_is_given_of_others(name: str) -> None:
    rows = [HOSTILE_ROWS[name], *(good_row(i) for i in range(6))]
    owner = [0, 0, 1, 1, 2, 2, 2]
    batches = user_batches(rows, owner, 100, 3)
    before, after = (collated_rows(batches, draw) for draw in ([1, 2], [0, 1, 2]))
    assert sorted(before) == [2, 3, 4, 5, 6] and {token: after[token] for token in before} == before
    units = rows_by_user(batches[batches.units(np.arange(3))])
    assert [2, 3] in units and [4, 5, 6] in units
    if name in ("cannot be read", "cannot be collated", "mask shorter than the tokens"):
        assert len(units) == 2, "a user of whom a row is left out would be averaged over fewer rows than were drawn"


def test_mutant_the_rows_that_are_left_of_a_user_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def what_is_left(self: LogicalBatches, unit: np.ndarray) -> list[list[Any]]:
        return [[row for index in unit for row in self._read(int(index))]]

    monkeypatch.setattr(LogicalBatches, "_read_unit", what_is_left)
    with pytest.raises(AssertionError):
        test_a_user_with_a_bad_row_changes_nothing_that_the_model_is_given_of_others("cannot be read")


def test_a_user_without_rows_adds_nothing() -> None:
    batches = user_batches([good_row(i) for i in range(3)], [0, 2, 2], 4, 2)
    assert rows_by_user(batches[batches.units(np.arange(3))]) == [[1], [2, 3]]


def test_most_examples_below_one_are_refused() -> None:
    with pytest.raises(PrivacyError, match="max_examples_per_user"):
        user_batches([good_row(0)], [0], 1, 0)
