"""What `import unswag` gives, and what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import unswag


def test_importing_unswag_imports_no_framework():
    code = "import sys, unswag; print(sorted({'torch', 'jax', 'transformers', 'matplotlib', 'rich'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(Path(unswag.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


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
