"""From a map and a profile to a choice, in half a second and without torch."""
