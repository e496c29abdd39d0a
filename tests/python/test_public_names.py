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
    code = "import sys, unswag; print(sorted({'torch', 'jax', 'transformers', 'matplotlib', 'rich'} & set(sys.modules)))"
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

    assert callable(unswag.torch.audit) and unswag.torch.audit is unswag.audit
    assert callable(module) or module.audit is unswag.audit


def test_version_is_that_of_the_build():
    from unswag import _core

    assert _core.version() == unswag.__version__


@pytest.mark.parametrize("name", ["apply_unswag_surgery", "audit"])
def test_without_torch_the_error_says_what_to_install(name):
    code = (
        f"import sys; sys.modules['torch'] = None\nimport unswag\ntry: unswag.{name}\nexcept ModuleNotFoundError as e: print(e)"
    )
    assert printed(code) == f"unswag.{name} needs the module 'torch', which is not installed: pip install 'unswag[torch]'"
