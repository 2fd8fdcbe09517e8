"""``python -m plugframe`` is the command ``plugframe``."""

from plugframe.cli import main

if __name__ == "__main__":
    main()
