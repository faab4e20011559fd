"""The bundle: its layout, its manifest, and how it is written and opened."""
