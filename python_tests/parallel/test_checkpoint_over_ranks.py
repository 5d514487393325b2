"""Checkpoints: of four ranks on two and on one, refusals, and saves that are killed at any time."""

import os

import pytest
from ranks import run

RUNS = [
    ("checkpoint_checks.save", 4),
    ("checkpoint_checks.resume", 2),
    ("checkpoint_checks.resume", 1),
    ("checkpoint_checks.save_stages", 4),
    ("checkpoint_checks.resume_stages", 1),
    ("checkpoint_checks.refused", 2),
    ("checkpoint_checks.kept", 1),
    ("checkpoint_checks.kept", 2),
    ("checkpoint_checks.kill_saves", 1),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    os.environ["K2K_TEST_CHECKPOINTS"] = str(tmp_path_factory.mktemp("checkpoints"))
    try:
        return run(RUNS)
    finally:
        del os.environ["K2K_TEST_CHECKPOINTS"]


@pytest.mark.parametrize(
    ("scenario", "result"),
    [
        ("save/4", "saved"),
        ("resume/2", "the same"),
        ("resume/1", "the same"),
        ("save_stages/4", "saved"),
        ("resume_stages/1", "the same"),
        ("refused/2", "refused"),
        ("kept/1", "kept"),
        ("kept/2", "kept"),
        ("kill_saves/1", "whole"),
    ],
)
def test_checkpoint(found, scenario, result):
    assert found[f"checkpoint_checks.{scenario}"] == [result] * int(scenario[-1])
