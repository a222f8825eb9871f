"""Presets, weights and the cluster: which machine runs which part."""
