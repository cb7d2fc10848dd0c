"""Scenes: archives, item search and lock, reading, simulation."""
