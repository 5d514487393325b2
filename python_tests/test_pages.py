"""The code of README.md and docs/numerics.md, and whether the commands of every page exist.

Other pages' code is run by the tests of what they describe.
"""

import re
import shlex
from pathlib import Path

import pytest

from k2kernels.cli.main import parser
from k2kernels.model import K2Config, K2Model

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.M))
PAGES = ["README.md", "CONTRIBUTING.md", "bench/README.md", *(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]


def blocks(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", ROOT.joinpath(page).read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_commands(page):
    """`k2kernels ...` has these arguments, `make ...` these targets, and programs that are run are in the tree."""
    text = ROOT.joinpath(page).read_text()
    lines = [line for block in blocks(page, "(?:sh|bash|console)") for line in block.replace("\\\n", " ").splitlines()]
    named = re.findall(r"`((?:k2kernels|make|python|torchrun) [^`]+)`", text)  # in a sentence: of one command, a part
    for command in lines + [name.replace("\n", " ") for name in named]:
        words = shlex.split(command, comments=True)
        words = words[: next((i for i, word in enumerate(words) if word in ("|", "&&", "&", ";", ">", "<")), None)]
        starts = [i for i, word in enumerate(words) if Path(word).name == "k2kernels"]
        program = next((i for i in starts if i == 0 or words[i - 1] == "-m" or "=" in words[i - 1]), None)
        if program is not None and "..." not in command:
            check_arguments(words[program + 1 :], command, whole=command in lines)
        elif "make" in words[:2]:  # behind a variable
            assert {word for word in words[words.index("make") + 1 :] if "=" not in word} <= TARGETS, command
        else:
            programs = [word for word in words if re.fullmatch(r"[\w/]+\.py", word)]
            assert all((ROOT / program).is_file() for program in programs), command


def check_arguments(arguments, command, whole):
    if whole:
        try:
            parser().parse_args(arguments)
        except SystemExit as end:
            assert end.code == 0, command
    else:
        (commands,) = (action for action in parser()._actions if action.dest == "command")
        options = commands.choices[arguments[0]]._option_string_actions
        assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= options.keys(), command


def test_readme(tmp_path):
    """With a checkpoint, and a narrower matrix to quantise in the emulator."""
    K2Model(K2Config.preset("tiny")).save_pretrained(tmp_path / "model")
    (block,) = blocks("README.md")
    names = {}
    exec(block.replace("path/to/checkpoint", str(tmp_path / "model")).replace("7168", "256"), names)
    assert names["out"].shape == (2, 1, 64, 512) and names["y"].shape == (16, 2112) and names["tokens"].shape == (1, 11)


def test_numerics():
    first, second = blocks("docs/numerics.md")
    assert "assert torch.equal" in first and "assert torch.equal" in second
    names = {}
    exec(first, names)
    exec(second, names)
