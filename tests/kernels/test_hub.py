"""The kernel's folder as the Hub has it: built as kernel-builder builds a Python-only kernel, loaded by `kernels`."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels._rust import Build
from torch import Tensor

from dpfa_hf import _kernel
from kernels import get_loaded_kernels, get_local_kernel

REPOSITORY = Path(__file__).parents[2] / "kernels" / "dp-flash-attn"
GENERAL = tomllib.loads((REPOSITORY / "build.toml").read_text())["general"]
PACKAGE = REPOSITORY / "torch-ext" / GENERAL["name"].replace("-", "_")


def built(folder: Path, identifier: str) -> Path:
    """A built repository: for each backend the package's files themselves, and what `kernels` must know of them.

    kernel-builder also adds `_ops.py`, and a package for versions of `kernels` before 0.11; nothing here uses them.
    """
    for backend in GENERAL["backends"]:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("__pycache__"))
        metadata = {
            "id": f"_{PACKAGE.name}_{backend}_{identifier}",
            "name": GENERAL["name"],
            "version": GENERAL["version"],
            "license": GENERAL["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata))
    return folder


def objections(package: Path) -> list[str]:
    """What the Hub does not allow: imports of anything else, and operators, whose names can be registered only once."""
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            imported: list[str] = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            for module in imported:
                if module.partition(".")[0] not in {"torch", "triton"} | sys.stdlib_module_names:
                    found.append(f"{path.name} imports {module}")
            attribute = [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            for reference in imported + attribute:
                if re.match(r"torch\.(library|ops|_library)\b", reference):
                    found.append(f"{path.name} uses {reference}")
    return found


def operators() -> set[str]:
    return set(torch._C._dispatch_get_all_op_names())


def check_attention(attention: Callable[..., Tensor]) -> None:
    """Output and gradients on a padded batch, against softmax written out with loops in float64."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 9, 16, generator=generator).requires_grad_().unbind()
    lengths = [9, 4]
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    output = attention(query, key, value, scale=0.25, is_causal=True, key_mask=real)
    expected = torch.zeros(2, 9, 2, 16, dtype=torch.float64)
    for row, length in enumerate(lengths):
        for i in range(length):
            scores = (query[row, :, i, None].double() * key[row, :, : i + 1].double()).sum(-1) * 0.25
            expected[row, i] = (scores.softmax(-1)[..., None] * value[row, :, : i + 1].double()).sum(1)
    weight = torch.randn(expected.shape, generator=generator).double()
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)
    grads = torch.autograd.grad((output.double() * weight).sum(), (query, key, value))
    wanted = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, atol=1e-5, rtol=0)


def test_the_build_file_is_valid_for_the_builder(tmp_path: Path) -> None:
    # The builder's own parser, which refuses what it does not know.
    assert {str(backend).lower() for backend in Build.open(REPOSITORY).general.backends} == set(GENERAL["backends"])
    assert (PACKAGE / "__init__.py").exists()
    # A name that Python would take and the builder does not.
    (tmp_path / "build.toml").write_text((REPOSITORY / "build.toml").read_text().replace("dp-flash", "dp_flash"))
    with pytest.raises(ValueError, match="Invalid kernel name"):
        Build.open(tmp_path)


def test_the_card_names_everything_public_and_holds_no_template() -> None:
    card = (REPOSITORY / "CARD.md").read_text()
    assert all(f"`{name}`" in card for name in _kernel.__all__)
    assert all(f"`{name}`" in card for name in _kernel.dispatch.BACKENDS)
    assert _kernel.dispatch.ENVIRONMENT_VARIABLE in card
    assert f"license: {GENERAL['license']}\n" in card
    # The builder fills these in.
    assert not re.search(r"{[{%#]", card)


def test_the_cards_example_runs_on_a_built_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (REPOSITORY / "CARD.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    built(tmp_path / "path" / "to" / "the" / "built" / "repository", "card")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Tensor] = {}
    exec(code[1], names)
    assert names["output"].shape == (2, 128, 4, 64)


def test_a_kernel_of_the_hub_computes_attention_and_registers_nothing(tmp_path: Path) -> None:
    before = operators()
    kernel = get_local_kernel(built(tmp_path, "once"), backend="cpu")
    assert Path(kernel.__file__).is_relative_to(tmp_path)
    assert kernel.__all__ == _kernel.__all__ and all(hasattr(kernel, name) for name in kernel.__all__)
    check_attention(kernel.attention)
    assert operators() == before
    assert any(loaded.module is kernel and loaded.metadata.version == 1 for loaded in get_loaded_kernels())


def test_two_builds_and_the_installed_package_live_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (
        get_local_kernel(built(tmp_path / name, name), backend="cpu") for name in ("first_build", "second_build")
    )
    kernels = (first, second, _kernel)
    assert len({kernel.__name__ for kernel in kernels}) == len({id(kernel.attention) for kernel in kernels}) == 3
    # What one of them is told, the others do not hear.
    calls: list[str] = []
    query = torch.randn(1, 1, 3, 16)
    with second.observed(lambda call, backend: calls.append(backend)):
        for kernel in kernels:
            kernel.attention(query, query, query, scale=0.25)
    assert calls == ["sdpa"]
    monkeypatch.setattr(first.dispatch, "BACKENDS", ("reference",))
    form = _kernel.Call("cpu", torch.float32, 16, 16, 3, 3)
    assert [kernel.choose(form) for kernel in (second, _kernel)] == ["sdpa", "sdpa"]
    for kernel in kernels:
        check_attention(kernel.attention)
        with torch.no_grad():
            released = kernel.dp_release(query.transpose(1, 2), clipping_norm=1.0, noise_multiplier=1.0)
        assert released.shape == (1, 3, 1, 16)
    assert get_local_kernel(tmp_path / "first_build", backend="cpu") is first


@pytest.mark.interpreter
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by `make test` in a process of its own")
def test_the_triton_kernels_of_a_hub_kernel_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_kernel.dispatch.ENVIRONMENT_VARIABLE, "triton")
    kernel = get_local_kernel(built(tmp_path, "triton"), backend="cpu")
    check_attention(kernel.attention)
    assert sys.modules[f"{kernel.__name__}.flash"].__file__ == str(tmp_path / "build" / "torch-cpu" / "flash.py")


def test_the_check_of_attention_sees_a_row_that_reads_its_padding() -> None:
    def leaking(*tensors: Tensor, key_mask: Tensor, **rest: Any) -> Tensor:
        return _kernel.attention(*tensors, key_mask=torch.ones_like(key_mask), **rest)

    with pytest.raises(AssertionError, match="not close"):
        check_attention(leaking)


def test_the_package_imports_what_the_hub_allows_and_registers_no_operator() -> None:
    assert objections(PACKAGE) == []


@pytest.mark.parametrize(
    "line",
    [
        'double = torch.library.custom_op("dp_flash_attn::double", lambda x: 2 * x, mutates_args=())',
        "from torch import library",
        "from torch.library import triton_op",
        "import torch.library as registry",
        "attend = torch.ops.dpfa_hf.attention_forward",
        "from dp_flash_attn.pattern import Pattern",
        "from dpfa_hf.errors import PrivacyError",
        "import numpy",
    ],
)
def test_a_copy_that_registers_or_imports_more_is_objected_to(tmp_path: Path, line: str) -> None:
    copy = shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "pattern.py").open("a") as file:
        file.write(f"\n\ndef late():\n    {line}\n")
    assert objections(copy)


def test_an_operator_registered_on_import_is_seen(tmp_path: Path) -> None:
    copy = built(tmp_path, "registering")
    with (copy / "build" / "torch-cpu" / "pattern.py").open("a") as file:
        file.write(
            "\n\ndef double(x: Tensor) -> Tensor:\n    return 2 * x\n\n\n"
            'torch.library.custom_op("dp_flash_attn_mutant::double", double, mutates_args=())\n'
        )
    before = operators()
    get_local_kernel(copy, backend="cpu")
    assert operators() - before == {"dp_flash_attn_mutant::double"}
