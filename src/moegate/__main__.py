"""`python -m moegate`: the command line."""

from moegate.cli import main

if __name__ == "__main__":
    main()
