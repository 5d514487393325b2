"""The model: configuration, checkpoints, layers. `K2Model.generate` comes from `k2kernels.engine`."""

from typing import TYPE_CHECKING, Any

from k2kernels.model.config import K2Config

if TYPE_CHECKING:
    from k2kernels.model.model import K2Model

__all__ = ["K2Config", "K2Model"]


def __getattr__(name: str) -> Any:
    """Imports K2Model when it is first named: it takes `generate` from the engine, which imports modules from here."""
    if name == "K2Model":
        from k2kernels.model.model import K2Model

        return K2Model
    raise AttributeError(f"module 'k2kernels.model' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
