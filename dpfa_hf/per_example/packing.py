"""Documents packed into one row without padding: where each begins and ends, and how to get from one form to the other.

A *packed batch* is a mapping in one normal form, whatever the data collator returned:

- tensors [1, T, ...] over the T tokens of all documents, one document after another, "position_ids" among them;
- "cu_seq_lens_q" and "cu_seq_lens_k", int32 [n + 1]: the documents' boundaries;
- "max_length_q" and "max_length_k": the longest document's length, as a number.

There is no "attention_mask": Transformers looks for packing in `position_ids` only where none is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from dpfa_hf.errors import PrivacyError

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = ("max_length_q", "max_length_k")
# Columns by which TRL, Transformers and others say that a row holds several texts already.
_SIGNS_OF_PACKED_ROWS = (*BOUNDARIES, *_LONGEST, "seq_lengths", "seq_idx")
# Architectures that let packed documents attend to each other whatever announces them, in Transformers itself.
LEAKING_MODEL_TYPES = ("gpt_oss", "modernbert", "opt")


@dataclass(frozen=True)
class Segments:
    """Where the n documents of a packed row of T tokens lie; built once for a micro-batch, without reading the device.

    Attributes:
        boundaries: int [n + 1], from 0 to T.
        total: T.
        longest: tokens of the longest document.
    """

    boundaries: torch.Tensor
    total: int
    longest: int

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Segments | None:
        """The segments of a packed batch, or None for any other batch."""
        if not is_packed(batch):
            return None
        return cls(batch[BOUNDARIES[0]].long(), batch["position_ids"].shape[1], batch[_LONGEST[0]])

    @property
    def count(self) -> int:
        """n, the number of documents."""
        return len(self.boundaries) - 1

    @cached_property
    def inside(self) -> torch.Tensor:
        """bool [n, longest]: False beyond a document's end."""
        return self._offsets < self.boundaries.diff()[:, None]

    @cached_property
    def index(self) -> torch.Tensor:
        """int64 [n, longest]: a document's tokens in the row, and beyond its end its own last one over again."""
        last = self.boundaries.diff()[:, None] - 1
        return self.boundaries[:-1, None] + torch.minimum(self._offsets, last)

    @cached_property
    def owner(self) -> torch.Tensor:
        """int64 [T]: the document of each token."""
        positions = torch.arange(self.total, device=self.boundaries.device)
        return torch.searchsorted(self.boundaries[1:], positions, right=True)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document; the one place where the device is read, once for a micro-batch."""
        return self.boundaries.diff().tolist()

    def slices(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[T, ...] -> n views [length, ...], one for each document."""
        return tokens.split(self.lengths)

    @property
    def _offsets(self) -> torch.Tensor:
        return torch.arange(self.longest, device=self.boundaries.device)[None]

    def unpack(self, tokens: torch.Tensor, fill: float | None = None) -> torch.Tensor:
        """[T, ...] -> [n, longest, ...]; beyond a document's end stands `fill`, or its own last token where None.

        Guarantee:
            Entry i is read from document i alone, so that what is not finite in a document stays in its entry.
        """
        documents = tokens[self.index]
        if fill is None:
            return documents
        inside = self.inside.view(*self.inside.shape, *[1] * (documents.dim() - 2))
        return documents.masked_fill(~inside, fill)

    def pack(self, documents: torch.Tensor) -> torch.Tensor:
        """[n, longest, ...] -> [T, ...], without what is beyond the documents' ends."""
        offset = torch.arange(self.total, device=self.boundaries.device) - self.boundaries[self.owner]
        return documents[self.owner, offset]


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is in the normal form that the head of this module describes."""
    return BOUNDARIES[0] in batch


def looks_packed(collated: Mapping[str, Any], rows: int) -> bool:
    """Whether a data collator has put `rows` > 1 rows into one."""
    tokens = collated.get("input_ids")
    return is_packed(collated) or (rows > 1 and isinstance(tokens, torch.Tensor) and len(tokens) == 1)


def normalise(collated: Mapping[str, Any], documents: int) -> dict[str, Any]:
    """What a padding-free collator returned for `documents` rows, as a packed batch.

    The documents are told apart by `cu_seq_lens_q` and `cu_seq_lens_k`, by `position_ids` that restart, or by both.

    Args:
        collated: tensors [1, T, ...] of which "input_ids" is one, and what says where the documents begin.
        documents: number of rows that were collated.

    Raises:
        PrivacyError: the boundaries are missing, contradict each other, or are not those of one whole document a row.
    """
    row = {k: v for k, v in collated.items() if k not in (*BOUNDARIES, *_LONGEST) and v is not None}
    mask = row.pop("attention_mask", None)
    if mask is not None and not bool((mask == 1).all()):
        raise PrivacyError("data_collator packs rows and masks some of their tokens; use one that adds no padding")
    tensors = "input_ids" in row and all(isinstance(v, torch.Tensor) for v in row.values())
    if not tensors or any(v.shape[:2] != (1, row["input_ids"].shape[-1]) for v in row.values()):
        raise PrivacyError("data_collator packs rows into tensors of unequal form; return [1, tokens] for every column")
    total = row["input_ids"].shape[1]
    found = [_checked_boundaries(collated[name], total) for name in BOUNDARIES if collated.get(name) is not None]
    if "position_ids" in row:
        found.append(_restarts(row["position_ids"][0]))
    if not found:
        raise PrivacyError(
            "data_collator packs rows and does not say where each begins; return position_ids that restart, or "
            "cu_seq_lens_q and cu_seq_lens_k (return_flash_attn_kwargs=True)"
        )
    if any(other != found[0] for other in found[1:]):
        raise PrivacyError("data_collator gives position_ids and cu_seq_lens that contradict each other; give one")
    if len(found[0]) != documents + 1:
        raise PrivacyError(
            f"data_collator made {len(found[0]) - 1} documents of {documents} rows: a row must be one whole document, "
            "neither packed before it was sampled nor cut"
        )
    return _with_boundaries(row, [end - start for start, end in zip(found[0], found[0][1:], strict=False)])


def _checked_boundaries(given: Any, total: int) -> list[int]:
    ends = torch.as_tensor(given).flatten().tolist()
    if ends[:1] != [0] or ends[-1] != total or any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
        raise PrivacyError(
            "cu_seq_lens must rise from 0 to the number of tokens, without empty documents; mend the data collator"
        )
    return ends


def _restarts(positions: torch.Tensor) -> list[int]:
    starts = (positions.diff() != 1).nonzero().flatten() + 1
    return [0, *starts.tolist(), len(positions)] if len(positions) else [0]


def _with_boundaries(row: Mapping[str, torch.Tensor], lengths: Sequence[int]) -> dict[str, Any]:
    device = next(iter(row.values())).device
    sizes = torch.tensor(lengths, dtype=torch.int32, device=device)
    boundaries = F.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    batch: dict[str, Any] = {"position_ids": positions, **row}
    if "seq_idx" in batch:
        batch["seq_idx"] = torch.repeat_interleave(sizes)[None].to(torch.int32)
    return {**batch, **dict.fromkeys(BOUNDARIES, boundaries), **dict.fromkeys(_LONGEST, max(lengths))}


def lengths(batch: Mapping[str, Any]) -> list[int]:
    """Tokens of each document of a packed batch."""
    return batch[BOUNDARIES[0]].diff().tolist()


def split(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A packed batch as packed batches of one document each."""
    row = {k: v for k, v in batch.items() if k not in (*BOUNDARIES, *_LONGEST)}
    sizes = lengths(batch)
    pieces = {name: value.split(sizes, 1) for name, value in row.items()}
    return [_with_boundaries({k: v[i] for k, v in pieces.items()}, [size]) for i, size in enumerate(sizes)]


def join(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The inverse of `split`."""
    names = [name for name in documents[0] if name not in (*BOUNDARIES, *_LONGEST)]
    row = {name: torch.cat([document[name] for document in documents], 1) for name in names}
    return _with_boundaries(row, [size for document in documents for size in lengths(document)])


def alone(batch: Mapping[str, Any], i: int) -> dict[str, torch.Tensor]:
    """Document i of a packed batch as a plain row [1, length] that says nothing about packing or positions."""
    made = (*BOUNDARIES, *_LONGEST, "position_ids", "seq_idx")
    return {name: value for name, value in split(batch)[i].items() if name not in made}


def aligned_length(row: Mapping[str, Any]) -> int:
    """Tokens of an uncollated row, all of whose columns must be as long.

    Packing puts columns one after another, so that a label too many in one row would be its neighbour's.

    Raises:
        PrivacyError: a column is longer or shorter than the tokens.
    """
    length = len(row["input_ids"])
    if any(isinstance(v, Sized) and not isinstance(v, str) and len(v) != length for v in row.values()):
        raise PrivacyError("a row's columns differ in length; packed, they would be displaced")
    return length


def refuse_packed_columns(columns: Mapping[str, Any], *, documents: bool) -> None:
    """Raise for a data set whose declared columns say that its rows hold several texts each (P4).

    Args:
        columns: the declared columns by name.
        documents: whether the privacy unit is the document; then `position_ids`, which otherwise may stand in a row for
            other reasons, are refused too.

    Raises:
        PrivacyError: naming the column.
    """
    signs = (*_SIGNS_OF_PACKED_ROWS, "position_ids") if documents else _SIGNS_OF_PACKED_ROWS
    for name in signs:
        if name in columns:
            raise PrivacyError(
                f"train_dataset has a column {name!r}, as data sets have that were packed before sampling: whoever is "
                "in a packed row would share its protection; pass one text a row, and a padding-free data_collator "
                "with privacy_unit='document' packs them after the draw"
            )


def refuse_leaking_model(config: object) -> None:
    """Raise for the architectures that let packed documents attend to each other in Transformers itself.

    Raises:
        PrivacyError: naming the model type.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in LEAKING_MODEL_TYPES:
        raise PrivacyError(
            f"{model_type} lets documents of a packed row attend to each other in Transformers; use a padding "
            "data_collator, such as DataCollatorForLanguageModeling"
        )
