"""The message where torchtitan is missing; `torchtitan_checks.py` has the tests with it."""

import importlib
import sys

import pytest


def test_without_torchtitan(monkeypatch):
    for name in ("torchtitan", "torchtitan.components"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "k2kernels.integrations.torchtitan", raising=False)
    with pytest.raises(ImportError, match=r"torchtitan must be installed, got .*; pip install torchtitan==0\.3\.0"):
        importlib.import_module("k2kernels.integrations.torchtitan")
