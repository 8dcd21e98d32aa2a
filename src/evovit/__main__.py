"""`python -m evovit`: the command line."""

from evovit.cli import main

if __name__ == "__main__":
    main()
