"""Predictive uncertainty: what it consists of, how large it is, where it can be trusted.

Import the leaf modules; nothing heavy is loaded here.
"""
