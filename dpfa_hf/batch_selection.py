"""Truncated Poisson sampling: which privacy units take part in a logical step (P5 to P9)."""

from __future__ import annotations

import itertools
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import packing
from dpfa_hf.per_example.units import ROWS_PER_UNIT
from dpfa_hf.processes import Processes

# Rows' indices, or of users the indices of each one's rows: what `LogicalBatches` makes micro-batches of.
DrawnUnits = np.ndarray | list[np.ndarray]


class TruncatedPoissonSampler(Sampler[np.ndarray]):
    """Yields the unit indices of one logical step after another, the empty draw included.

    An item is a whole logical batch: give the sampler to a `DataLoader` with `batch_size=None`, so that it draws in the
    main process, and cut items with `split_micro_batches`. Every iteration draws afresh; time and memory are
    O(num_units * sampling_probability) per step.

    Args:
        num_units: public number n >= 1 of privacy units.
        sampling_probability: public q, 0 < q <= 1.
        max_batch_size: public ceiling B_max >= 1 on the units of a step; above n it has no effect.
        num_steps: items per iteration, or None for an endless one.

    Raises:
        PrivacyError: for arguments out of range.

    Guarantee:
        Before the ceiling each unit is drawn with probability q, independently of all others and of all other steps:
        the gaps between successes of independent Bernoulli(q) trials are independent geometric variables, and these are
        drawn by inverting their distribution at 64-bit uniforms from the operating system. A draw of more than B_max
        units keeps its first B_max after a uniformly random permutation, hence a uniformly random subset whatever the
        units' positions, so the size is min(Binomial(n, q), B_max) and the set is uniform given its size: exactly the
        mechanism of dp_accounting's `TruncatedSubsampledGaussianDpEvent` (arXiv 2508.15089). Every
        draw is permuted, so the order tells nothing about truncation. In floating point the probability of a gap is off
        by at most 2**-52 / q, relatively. There is no seed: `random`, numpy's and torch's generators are neither read
        nor advanced, and a forked process never repeats a draw (P9).
    """

    def __init__(
        self,
        num_units: int,
        sampling_probability: float,
        max_batch_size: int,
        num_steps: int | None = None,
        *,
        _draws: Iterable[np.ndarray] | None = None,
    ) -> None:
        _require_count("num_units", num_units, 1)
        _require_count("max_batch_size", max_batch_size, 1)
        if num_steps is not None:
            _require_count("num_steps", num_steps, 0)
        if not isinstance(sampling_probability, (int, float, np.floating)) or not 0 < sampling_probability <= 1:
            raise PrivacyError(f"sampling_probability={sampling_probability} must be above 0 and at most 1")
        self.num_units = int(num_units)
        self.sampling_probability = float(sampling_probability)
        self.max_batch_size = int(max_batch_size)
        self.num_steps = num_steps
        self._draws = _draws

    @property
    def injected(self) -> bool:
        """Whether the draws were supplied by the caller: such a run is NOT PRIVATE."""
        return self._draws is not None

    def describe(self, processes: int) -> str:
        """What the report says of the draws, of so many processes (P25)."""
        slices = f", one draw cut into slices for {processes} processes" if processes > 1 else ""
        return "truncated Poisson" + slices + (", draws injected" if self.injected else "")

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("an endless TruncatedPoissonSampler has no length: pass num_steps")
        return self.num_steps

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields int64 arrays [K], 0 <= K <= max_batch_size, of distinct indices below num_units in random order."""
        if self._draws is not None:
            return itertools.islice((np.asarray(draw, dtype=np.int64) for draw in self._draws), self.num_steps)
        return (self._draw() for _ in (itertools.count() if self.num_steps is None else range(self.num_steps)))

    def _draw(self) -> np.ndarray:
        successes = _bernoulli_successes(self.num_units, self.sampling_probability)
        order = np.argsort(_operating_system_words(len(successes)))
        return successes[order[: self.max_batch_size]]


class RankSlices(Sampler[np.ndarray]):
    """One process's share of every draw; all processes iterate together, over the draws of the first (P8).

    Args:
        draws: read in the first process alone.
        processes: who shares them.

    Guarantee:
        Every unit of a draw is in the share of exactly one process, whole.
    """

    def __init__(self, draws: TruncatedPoissonSampler, processes: Processes) -> None:
        self.draws, self.processes = draws, processes

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields int64 arrays, of lengths that differ by at most one between the processes."""
        draws = iter(self.draws)
        while (draw := self.processes.from_first(lambda: next(draws, None))) is not None:
            yield self.processes.own_slice(draw)


class Users:
    """Whose the rows of a data set are, in two arrays, whatever the number of rows and users.

    Args:
        owner: integers [rows], 0 <= owner < n: the user of each row. One without rows adds zero to every step.
    """

    def __init__(self, owner: np.ndarray) -> None:
        self._rows = np.argsort(owner, kind="stable").astype(np.min_scalar_type(len(owner)))
        self._ends = np.cumsum(np.bincount(owner))

    @classmethod
    def of(cls, dataset: Any, column: str) -> Users:
        """The users that a column of a `datasets.Dataset` names; equal values are one user.

        What is read stays here: no value is kept, logged or quoted, and a user's number says nothing outside.

        Raises:
            PrivacyError: the data set declares no columns, or not this one; its values are neither text nor whole
                numbers; or a row has none. That every row names its user is public, as are the columns' names: counted
                as one user, or each as its own, such rows would be other users' rows without their protection.
        """
        import pyarrow

        features = getattr(dataset, "features", None)
        if not isinstance(features, Mapping) or not hasattr(dataset, "with_format"):
            raise PrivacyError(
                f"privacy_unit='user' reads privacy_unit_column from a datasets.Dataset, not from a "
                f"{type(dataset).__name__}; build one, such as with datasets.Dataset.from_list"
            )
        if column not in features:
            raise PrivacyError(
                f"train_dataset has no column {column!r}; let privacy_unit_column be one of {sorted(features)}"
            )
        values = dataset.select_columns(column).with_format("arrow")[:][column]
        text = pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)
        if not text and not pyarrow.types.is_integer(values.type):
            raise PrivacyError(
                f"privacy_unit_column={column!r} holds {values.type}; name a column of text or whole numbers, of "
                "which two are equal or not"
            )
        if values.null_count:
            raise PrivacyError(
                f"privacy_unit_column={column!r} has rows without a value, which belong to nobody; drop them, or give "
                "each the name of its user"
            )
        codes = [part.indices.to_numpy() for part in values.dictionary_encode().unify_dictionaries().chunks]
        return cls(np.concatenate(codes))

    def __len__(self) -> int:
        """n, the public number of users."""
        return len(self._ends)

    def draw(self, user: int, most: int) -> np.ndarray:
        """Positions of min(k, m) of the user's m rows; `most` is k.

        Guarantee:
            Every subset of that size is as likely as any other, independently of all other draws (Floyd's algorithm;
            Bentley and Floyd 1987, CACM 30:9): the integers come from the operating system and are exactly uniform, and
            none is drawn for anybody else (P9). Time does not grow with m.
        """
        rows = self._rows[self._ends[user - 1] if user else 0 : self._ends[user]]
        if len(rows) <= most:
            return rows.astype(np.int64)
        chosen: set[int] = set()
        for last in range(len(rows) - most, len(rows)):
            pick = secrets.randbelow(last + 1)
            chosen.add(last if pick in chosen else pick)
        return rows[sorted(chosen)].astype(np.int64)


class LogicalBatches(Dataset[list[Any]]):
    """Turns the units of a draw into a list of collated micro-batches, in a data loader's worker if there are any.

    A unit is one row, or the rows of one user. Units of like length share a micro-batch, which saves padding; the sum
    over the logical batch does not depend on it. Only rows of one form do: collators take columns and types from the
    first row, so that one without an attention mask would take away its neighbours'.

    Args:
        dataset: map-style; rows are what `collate` takes.
        collate: list of rows -> collated micro-batch.
        micro_batch_size: a micro-batch holds at most so many times `max_examples_per_user` rows, and as many whole
            units as fit in.
        packed: whether `collate` puts all rows into one without padding; what comes out is in the form of
            `per_example.packing` then.
        users: whose the rows are; what comes out is in the form of `per_example.units` then. None if every row is a
            unit.
        max_examples_per_user: public k >= 1, the most rows of one unit in a step.

    Guarantee:
        A row that cannot be read or collated, or that is not collated to one entry, is left out of the sum, by itself:
        it changes neither its neighbours nor whether training goes on (P23). Of a user, all rows are: that they are
        depends on the user's rows alone, and what is averaged is always the mean over all rows drawn. The drawn units
        are packed as they were drawn: each is whole in one micro-batch, and none is cut, dropped or kept for later (P4,
        P6).
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        micro_batch_size: int,
        *,
        packed: bool = False,
        users: Users | None = None,
        max_examples_per_user: int = 1,
    ) -> None:
        _require_count("micro_batch_size", micro_batch_size, 1)
        _require_count("max_examples_per_user", max_examples_per_user, 1)
        self.dataset, self.collate, self.micro_batch_size, self.packed = dataset, collate, micro_batch_size, packed
        self.users, self.max_examples_per_user = users, max_examples_per_user

    def __len__(self) -> int:
        return len(self.dataset if self.users is None else self.users)

    def units(self, indices: np.ndarray) -> DrawnUnits:
        """What stands for the drawn units in `self[...]`, all or some of them: of users, the rows drawn of each.

        Trying a unit again must not draw its rows again. Whether it is tried again may depend on the others, and its
        rows would then too.
        """
        if self.users is None:
            return indices
        return [self.users.draw(int(index), self.max_examples_per_user) for index in indices]

    def __getitem__(self, units: DrawnUnits) -> list[Any]:
        forms: dict[Any, list[list[Any]]] = {}
        for rows in sorted((rows for unit in units for rows in self._read_unit(unit)), key=_unit_length):
            forms.setdefault(_unit_form(rows), []).append(rows)
        return [collated for alike in forms.values() for part in self._parts(alike) for collated in self._collate(part)]

    def _parts(self, units: list[list[Any]]) -> list[list[list[Any]]]:
        """Cuts units into micro-batches of consecutive ones."""
        most = self.micro_batch_size * self.max_examples_per_user
        parts: list[list[list[Any]]] = []
        size = most
        for unit in units:
            size += len(unit)
            if size > most:
                parts.append([])
                size = len(unit)
            parts[-1].append(unit)
        return parts

    def _read_unit(self, unit: Any) -> list[list[Any]]:
        """Its rows, if all of them can be read."""
        indices = np.atleast_1d(unit)
        rows = [row for index in indices for row in self._read(int(index))]
        return [rows] if rows and len(rows) == len(indices) else []

    def _read(self, index: int) -> list[Any]:
        try:
            row = self.dataset[index]
            return [row] if _is_aligned(row) else []
        except Exception:  # any row may raise anything
            return []

    def _collate(self, units: list[list[Any]]) -> list[Any]:
        rows = [row for unit in units for row in unit]
        try:
            collated = self.collate(rows)
            if self.packed:
                batch = packing.normalise(collated, len(rows))
                # A collator that truncates or reorders sees one row at a time, where it can affect no other.
                if len(rows) == 1 or packing.lengths(batch) == [packing.aligned_length(row) for row in rows]:
                    return [batch]
            elif all(len(value) == len(rows) for value in collated.values()):
                return [collated if self.users is None else {**collated, ROWS_PER_UNIT: tuple(map(len, units))}]
        except Exception:  # any row may raise anything
            pass
        if len(units) == 1:
            return []
        return [collated for unit in units for collated in self._collate([unit])]


def _is_aligned(row: Any) -> bool:
    """Whether what goes with the tokens is as long as they are.

    Padding would hide the difference, and then what the row gives would depend on how long its neighbours are.
    """
    if not isinstance(row, Mapping) or not isinstance(row.get("input_ids"), Sized):
        return True
    companions = (row.get(name) for name in ("attention_mask", "token_type_ids", "position_ids"))
    return all(len(companion) == len(row["input_ids"]) for companion in companions if companion is not None)


def _row_form(row: Any) -> Any:
    """Names and types of a row's columns."""
    if not isinstance(row, Mapping):
        return type(row)
    return tuple(
        sorted((str(name), type(value).__name__, str(getattr(value, "dtype", ""))) for name, value in row.items())
    )


def _unit_form(rows: list[Any]) -> Any:
    """The form of a unit's rows; a unit of several forms is like no other."""
    forms = [_row_form(row) for row in rows]
    return forms[0] if all(form == forms[0] for form in forms) else object()


def _unit_length(rows: list[Any]) -> int:
    return max(map(_row_length, rows))


def _row_length(row: Any) -> int:
    """Length of a row's tokens, 0 where it has none."""
    tokens = row.get("input_ids") if isinstance(row, Mapping) else None
    return len(tokens) if isinstance(tokens, Sized) else 0


def split_micro_batches(indices: np.ndarray, micro_batch_size: int) -> list[np.ndarray]:
    """Cuts a logical batch into consecutive slices of at most `micro_batch_size`, in order.

    Args:
        indices: int64 [K].
        micro_batch_size: >= 1; a memory and speed knob without effect on the result.

    Returns:
        ceil(K / micro_batch_size) arrays; none for an empty batch, which is a step all the same (P7).

    Raises:
        PrivacyError: for a micro-batch size below 1.
    """
    _require_count("micro_batch_size", micro_batch_size, 1)
    return [indices[start : start + micro_batch_size] for start in range(0, len(indices), micro_batch_size)]


def _bernoulli_successes(trials: int, probability: float) -> np.ndarray:
    """Returns the increasing int64 indices of the successes among `trials` Bernoulli trials."""
    log_failure = math.log1p(-probability) if probability < 1 else -math.inf
    mean = trials * probability
    count = int(mean + 6 * math.sqrt(mean)) + 16  # nearly always enough for one round; correct if not
    rounds: list[np.ndarray] = []
    last = -1
    while last < trials:
        uniforms = (_operating_system_words(count).astype(np.float64) + 1.0) * 2.0**-64
        # A gap beyond the end is as good as the end, and clipping it keeps the int64 sum from overflowing.
        gaps = np.minimum(np.floor(np.log(uniforms) / log_failure), trials).astype(np.int64) + 1
        positions = last + np.cumsum(gaps)
        rounds.append(positions)
        last = int(positions[-1])
    successes = np.concatenate(rounds)
    return successes[: np.searchsorted(successes, trials)]


def _operating_system_words(count: int) -> np.ndarray:
    return np.frombuffer(os.urandom(8 * count), dtype="<u8")


def _require_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise PrivacyError(f"{name}={value!r} must be an integer of at least {least}")
