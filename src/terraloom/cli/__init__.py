"""Command line: one verb per rule, and a few for people.

Each verb imports what it needs itself, so that ``terraloom --help`` starts at once. A module of
verbs registers them when it is imported.
"""

# In the order of the help: verbs for people, then the stages.
# isort: off
from terraloom.cli import people, runs, state, scenes, model, products
# isort: on

from terraloom.cli.base import app, main

__all__ = ["app", "main", "model", "people", "products", "runs", "scenes", "state"]
