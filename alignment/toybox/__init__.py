"""Toybox: a closed world in which every output is right or wrong, attribute by attribute."""
