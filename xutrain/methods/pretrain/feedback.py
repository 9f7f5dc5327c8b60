"""Error feedback on the uplink (ours, not in arXiv 2411.17866): a worker adds to its message what earlier ones left out.

send C(v + e);   e <- (v + e) - C(v + e)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from xutrain.errors import Issue
from xutrain.methods.base import DataParallel, Setup
from xutrain.methods.codecs.base import Codec
from xutrain.methods.sparsify.soundness import no_feedback_over_shards, not_contractive
from xutrain.registry import Named


class FeedbackOptions(Named):
    """Options of every method whose messages may be encoded."""

    error_feedback: bool = Field(False, description="send what earlier messages left out as well; for codecs that lose something")


class WithFeedback(DataParallel):
    """A method whose hosted workers may each keep e, float32 of shape (D,), in ``error``; an empty list without feedback."""

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__(options, setup)
        self.error = [torch.zeros_like(self.x) for _ in setup.workers.hosted] if options.error_feedback else []

    def add_left_out(self, messages: Sequence[Tensor]) -> None:
        """v becomes v + e, in place."""
        for message, error in zip(messages, self.error, strict=False):
            message.add_(error)

    def keep_left_out(self, messages: Sequence[Tensor], sent: Sequence[Tensor]) -> None:
        """e becomes what ``sent``, the decoded messages, lacks."""
        for message, error, decoded in zip(messages, self.error, sent, strict=False):
            torch.sub(message, decoded, out=error)

    @classmethod
    def unsound(cls, recipe: Any, codec: Codec) -> list[Issue]:
        return no_feedback_over_shards(recipe, codec) if recipe.method.error_feedback else []

    def notes(self) -> list[str]:
        return not_contractive(self.setup.exchange.codec) if self.error else []
