"""What no schedule beats: the bound of a step, from numbers alone."""
