"""python -m unswag: the command `unswag`."""

from unswag.cli import main

main()
