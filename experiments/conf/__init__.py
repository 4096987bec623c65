"""Hydra's primary configuration; everything that can be chosen is in ``experiments.configs``."""
