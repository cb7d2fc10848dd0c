"""Accuracy assessment: sample designs, design-based estimators, held-out skill, scoreboard.

Import the leaf modules; nothing heavy is loaded here.
"""
