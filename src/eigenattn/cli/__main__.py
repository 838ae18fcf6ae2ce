"""`python -m eigenattn.cli`."""

from . import main

main()
