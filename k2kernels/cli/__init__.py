"""The command line: `k2kernels ...` = `python -m k2kernels ...`. One file per command."""

from k2kernels.cli.main import main

__all__ = ["main"]
