"""Everything is declared in pyproject.toml; native kernels (csrc/) will be built from here."""

from setuptools import setup

setup()
