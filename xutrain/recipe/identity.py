"""Which runs are the same experiment: a hash of what is computed, without the seed and without where records go."""

from __future__ import annotations

import hashlib
import json

from xutrain.recipe.schema import Recipe

#: Keys that change how a run is watched or described, not what it computes (but see ``Recipe.also_computes``).
OUTSIDE = {"seed", "log", "checkpoint", "summary", "paper", "smoke"}


def group_id(recipe: Recipe) -> str:
    """Eight hex digits of the recipe's canonical JSON; equal for all seeds of one experiment."""
    value = recipe.model_dump(mode="json", exclude=OUTSIDE) | recipe.also_computes()
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
