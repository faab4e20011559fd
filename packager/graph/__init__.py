"""The exporter's graph, and our weights in it."""
