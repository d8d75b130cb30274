"""``python -m transferops``."""

from transferops.cli import main

if __name__ == "__main__":
    main()
