"""Does a bundle, on the target runtime, do what was promised? Owns `report.json`."""
