"""Benchmarks: what is measured, and the worlds it is measured on."""
