"""Runs and their states: what is recorded, released, compared, brought back, resumed, watched."""
