"""Checks of the commands' options: messages name the flags as they are typed."""

from typing import Any

from k2kernels.ops._check import Arguments


class Flags(Arguments):
    """The arguments of a command: `max_new_tokens` is --max-new-tokens."""

    def require(self, condition: Any, name: str, *rest: Any) -> None:
        flag = " and ".join("--" + part.replace("_", "-") for part in name.split(" and "))
        super().require(condition, flag, *rest)
