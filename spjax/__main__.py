"""`python -m spjax`: see `cli`."""

from spjax.cli import main

if __name__ == "__main__":
    main()
