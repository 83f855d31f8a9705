"""Measures of overfitting, fidelity and editability, and runs that take them."""
