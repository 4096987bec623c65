"""Experiments: configuration, command lines, reports and figures on top of the simulator.

Start with ``experiments.runs``: ``compose`` makes a configuration, ``simulate`` a result of it.
"""
