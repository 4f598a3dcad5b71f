"""``python -m matquant``: the command line."""

from matquant.cli import main

if __name__ == "__main__":
    main()
