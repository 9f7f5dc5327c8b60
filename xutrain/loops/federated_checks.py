"""Combinations of method, codec and local optimizer that cannot be trained, named before the first round."""

from __future__ import annotations

from typing import Any

from xutrain.errors import Issue, RecipeError
from xutrain.methods.codecs.base import Codec
from xutrain.methods.federate.base import FederatedMethod


def check_combination(recipe: Any, cls: type[FederatedMethod], codec: Codec, buffers: int) -> None:
    """Refuse what an average of clients' messages, or a client's local steps, cannot be.

    Raises:
        RecipeError: all faults at once.
    """
    hint = "choose a codec whose messages are averaged; all: xutrain ls codecs"
    name, issues = recipe.codec.name, []
    method = recipe.method.name
    if recipe.clients.steps == "own" and not cls.own_steps:
        issues.append(Issue("clients.steps", f"{method} needs clients that do equally many steps", "own", "use clients.steps=equal"))
    if type(codec).combine is not Codec.combine:
        issues.append(Issue("codec.name", "takes a vote over messages, which a weighted average of clients is not", name, hint))
    if codec.collective:
        issues.append(Issue("codec.name", "needs several exchanges for one mean, and a client answers once", name, hint))
    if cls.plain and not (codec.dense and codec.payload_bits(1) == 32):
        what = f"encodes gradients, and {method} sends whole models or several kinds of vectors"
        issues.append(Issue("codec.name", what, name, "use codec=fp"))
    if recipe.uplink.error_feedback == "always" and codec.expands:
        what = f"grows without bound with {name}, which is not contractive"
        issues.append(Issue("uplink.error_feedback", what, "always", "use auto or never"))
    if recipe.train.optimizer == "adam":
        momentum = getattr(recipe.method, "local_momentum", 0.0)
        if not cls.adaptive:
            what = f"{method} prescribes its local steps, which are SGD's"
            issues.append(Issue("train.optimizer", what, "adam", "use sgd, or a method such as fedavg, fedprox or fedsm"))
        elif momentum:
            issues.append(
                Issue("method.local_momentum", "a momentum on top of local Adam's", momentum, "set it to 0, or train.optimizer=sgd")
            )
    if cls.without_buffers and buffers:
        what = f"has running statistics, which the several models of a client under {method} cannot share"
        issues.append(Issue("model", what, recipe.model.name, "take a net without batch norm, for example unet with norm: instance"))
    if issues:
        raise RecipeError(*issues)
