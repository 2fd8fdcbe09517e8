"""A descriptor that ends the program."""

raise SystemExit("This chip needs a licence.")
