"""Where a model and a text come from, and which part of a model each unit is."""
