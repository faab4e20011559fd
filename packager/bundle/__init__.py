"""The bundle: its folder, its manifest, and how it is written and opened."""
