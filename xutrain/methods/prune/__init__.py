"""Methods of `xutrain prune`: scores, masks and repairs of one expert at a time, and the choice of whole experts."""
