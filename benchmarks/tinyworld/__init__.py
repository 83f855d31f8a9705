"""Tinyworld: a small synthetic picture world, drawn by code, whose truth is known."""
