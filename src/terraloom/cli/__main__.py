"""``python -m terraloom.cli``: the command line of this very interpreter."""

from terraloom.cli import main

main()
