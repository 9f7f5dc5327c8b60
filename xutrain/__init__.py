"""xutrain: compressed, distributed, federated and asynchronous training under one protocol.

``import xutrain`` is light; what needs torch is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xutrain.dsm import DSM
    from xutrain.engine.rng import Key, key
    from xutrain.errors import RecipeError
    from xutrain.launch.api import run
    from xutrain.methods.codecs.base import Codec, Payload

__version__ = "0.1.0"
__all__ = ["DSM", "Codec", "Key", "Payload", "RecipeError", "__version__", "codec", "key", "run"]

_HOMES = {
    "DSM": "xutrain.dsm",
    "run": "xutrain.launch.api",
    "RecipeError": "xutrain.errors",
    "key": "xutrain.engine.rng",
    "Key": "xutrain.engine.rng",
    "Codec": "xutrain.methods.codecs.base",
    "Payload": "xutrain.methods.codecs.base",
}


def codec(name: str, *, workers: int = 1, **options: object) -> Codec:
    """The codec called ``name`` with its options: ``xutrain.codec("orq", levels=9, bucket=2048)``.

    ``workers`` is how many messages will be averaged, which K-aware codecs use. ``xutrain ls codecs`` lists the names.

    Raises:
        RecipeError: an unknown codec, an unknown option, or a value that cannot be right, all of them at once.
    """
    from pydantic import ValidationError

    from xutrain import registry
    from xutrain.errors import RecipeError
    from xutrain.recipe.explain import issues_of

    cls: Any = registry.load("codec", name)
    try:
        chosen = cls.Options(name=cls.entry.name, **options)
    except ValidationError as error:
        raise RecipeError(*issues_of(error, cls.Options, "codec")) from error
    built: Codec = cls(chosen, workers)
    return built


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
