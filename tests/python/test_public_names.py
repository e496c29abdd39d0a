"""What `import unswag` gives, and what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import unswag


def printed(code: str) -> str:
    """What `code` prints in a fresh interpreter that finds this unswag."""
    environment = os.environ | {"PYTHONPATH": str(Path(unswag.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_importing_unswag_imports_no_framework():
    heavy = {"torch", "jax", "transformers", "matplotlib", "rich", "typer"}
    code = f"import sys, unswag; print(sorted({heavy} & set(sys.modules)))"
    assert printed(code) == "[]"


def test_every_public_name_exists_and_is_listed():
    import importlib.util

    for name in unswag.__all__:
        home = unswag._HOME.get(name)
        if home is None or importlib.util.find_spec(home):  # unswag.data comes last
            assert getattr(unswag, name) is not None
        assert name in dir(unswag)
    with pytest.raises(AttributeError, match="no attribute 'unwag'"):
        unswag.unwag  # noqa: B018


def test_audit_is_the_function_even_after_its_module_was_imported():
    import unswag.torch
    import unswag.torch.audit as module

    assert callable(unswag.torch.audit) and callable(unswag.audit)
    assert callable(module) or module.audit is unswag.torch.audit


def test_audit_asks_the_framework_of_what_it_is_given(monkeypatch):
    torch = pytest.importorskip("torch")
    import unswag.torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    assert unswag.audit(model, input=torch.ones(3, 4)).total == unswag.torch.audit(model, input=torch.ones(3, 4)).total == 96
    with pytest.raises(TypeError, match="takes its batch by name"):
        unswag.audit(model, torch.ones(3, 4))


def test_audit_imports_only_the_framework_that_is_used():
    pytest.importorskip("jax")
    code = (
        "import sys, jax, unswag; unswag.audit(unswag.unswag_relu, jax.ShapeDtypeStruct((8, 64), 'float32')); "
        "print('torch' in sys.modules)"
    )
    assert printed(code) == "False"
    pytest.importorskip("torch")
    code = (
        "import sys, torch, unswag; unswag.audit(torch.nn.Linear(4, 8), input=torch.ones(3, 4)); "
        "print([name for name in sys.modules if name.startswith('unswag.jax')])"
    )
    assert printed(code) == "[]"


def test_version_is_that_of_the_build():
    from unswag import _core

    assert _core.version() == unswag.__version__


INSTALL = "which is not installed. In the folder of UnSwag's sources, run: pip install"


def missing(framework: str, statement: str) -> str:
    """What the error says when `framework` is not installed."""
    return printed(
        f"import sys; sys.modules[{framework!r}] = None\nimport unswag\n"
        f"try: {statement}\nexcept ModuleNotFoundError as e: print(e)"
    )


@pytest.mark.parametrize("name", ["apply_unswag_surgery", "SurgeryReport"])
def test_without_torch_the_error_says_what_to_install(name):
    words = f"unswag.{name} needs the module 'torch', {INSTALL} '.[torch]'"
    assert missing("torch", f"unswag.{name}") == words


def test_without_jax_the_error_says_what_to_install():
    words = f"needs the module 'jax', {INSTALL} '.[jax]'"
    assert missing("jax", "unswag.unswag_relu") == f"unswag.unswag_relu {words}"
    assert missing("jax", "unswag.audit(len, 3)") == f"unswag.audit of a function {words}"


@pytest.mark.parametrize("statement", ["import unswag.torch", "import unswag.torch.nn", "from unswag.torch import surgery"])
def test_importing_the_torch_front_end_without_torch_says_what_to_install(statement):
    words = f"unswag.torch needs the module 'torch', {INSTALL} '.[torch]'"
    assert missing("torch", statement) == words


@pytest.mark.parametrize("statement", ["import unswag.jax", "from unswag.jax import relu"])
def test_importing_the_jax_front_end_without_jax_says_what_to_install(statement):
    words = f"unswag.jax needs the module 'jax', {INSTALL} '.[jax]'"
    assert missing("jax", statement) == words


def test_without_orjson_the_error_says_what_to_install():
    words = f"needs the module 'orjson', {INSTALL} '.[torch]'"
    assert missing("orjson", "import unswag.data") == missing("orjson", "from unswag import data") == f"unswag.data {words}"
    assert missing("orjson", "unswag.prepare_data") == f"unswag.prepare_data {words}"


def test_a_module_of_ours_that_is_missing_is_not_to_be_installed():
    assert "pip" not in missing("unswag.torch.surgery", "unswag.apply_unswag_surgery")
