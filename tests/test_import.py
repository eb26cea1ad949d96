from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import dpfa_hf

ROOT = Path(__file__).parents[1]
HAVE_TRITON = importlib.util.find_spec("triton") is not None


def python(code: str, *, folder: Path = ROOT, path: Path = ROOT) -> str:
    """Output of `code` in a fresh interpreter that finds packages in `path`."""
    environment = {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_light_and_every_public_name_resolves() -> None:
    heavy = ("dp_accounting", "sqlalchemy", "transformers.trainer")
    loaded = f"[name for name in {heavy} if name in sys.modules]"
    code = f"""if True:
        import sys
        import dpfa_hf
        print({loaded})
        from transformers import AttentionInterface
        assert "dp_flash" in AttentionInterface() and "dpfa" in AttentionInterface()
        for name in dpfa_hf.__all__:
            assert getattr(dpfa_hf, name) is not None
        print({loaded})
    """
    light, full = python(code).splitlines()
    assert light == "[]"
    # The check sees modules that are loaded.
    assert "sqlalchemy" in full


def test_public_names_are_those_promised() -> None:
    promised = {"DPTrainer", "DPTrainerMixin", "privatize", "PrivacyArguments", "PrivacyBudgetCallback", "PrivacyError"}
    assert promised | {"PrivacyPlan", "PrivacySpent", "register_rule"} <= set(dpfa_hf.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dpfa_hf.no_such_name


def test_attention_works_where_triton_does_not_exist() -> None:
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        import transformers as tf
        import dpfa_hf
        sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=11)
        model = tf.AutoModel.from_config(tf.BertConfig(**sizes), attn_implementation="dp_flash")
        print(model(torch.ones(1, 3, dtype=torch.long)).last_hidden_state.shape)
    """
    assert "[1, 3, 8]" in python(code)


def test_kernels_is_not_a_package() -> None:
    # It would shadow the package `kernels` from PyPI and break transformers.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_list_of_packages_is_that_of_the_folders() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    moved = setuptools["package-dir"]
    folders = {str(path.parent.relative_to(ROOT)).replace(os.sep, ".") for path in ROOT.glob("dpfa_hf/**/__init__.py")}
    assert set(setuptools["packages"]) == folders | set(moved)
    assert all((ROOT / folder / "__init__.py").exists() for folder in moved.values())


def test_a_wheel_holds_the_kernel_and_imports_outside_the_repository(tmp_path: Path) -> None:
    # A copy, because setuptools builds in the source tree.
    for name in ("dpfa_hf", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "./source"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("dpfa_hf-*.whl"))
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    kernel_files = {f"dpfa_hf/_kernel/{path.name}" for path in ROOT.glob("kernels/*/torch-ext/*/*.py")}
    assert len(kernel_files) > 5
    assert {"dpfa_hf/py.typed", "dpfa_hf/per_example/gradients.py"} | kernel_files <= set(names)
    assert not any(name.startswith(("tests", "kernels")) for name in names)
    kernel = "import dpfa_hf._kernel" if HAVE_TRITON else "pass"
    code = f"import dpfa_hf; print(dpfa_hf.__file__); {kernel}"
    assert python(code, folder=tmp_path, path=site).strip().startswith(str(site))
