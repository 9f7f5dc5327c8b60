"""The recipe of `xutrain sparsify`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from xutrain import registry
from xutrain.errors import Issue
from xutrain.recipe.quantize import DataParallelRecipe


class SparsifyRecipe(DataParallelRecipe):
    """`xutrain sparsify`: SAEF, DEF, DEF-A and their baselines."""

    resume_from: str | None = Field(
        None, description="run folder to go on from with any number of workers: each takes their mean state, which keeps the virtual point"
    )

    def issues(self) -> list[Issue]:
        found = super().issues()
        codec = registry.load("codec", self.codec.name)(self.codec, workers=self.workers)
        found += registry.load("method", self.method.name, verb="sparsify").unsound(self, codec)
        if self.resume_from is not None and not Path(self.resume_from, "checkpoints").is_dir():
            found.append(
                Issue("resume_from", "is not a run folder with checkpoints", self.resume_from, "xutrain runs ls lists run folders")
            )
        return found
