"""`python -m spectune` is the command line."""

from spectune.cli import main

if __name__ == "__main__":
    main()
