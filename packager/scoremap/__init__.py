"""The score map: its types, its folder, its identity."""
