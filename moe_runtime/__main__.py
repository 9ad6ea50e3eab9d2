"""`python -m moe_runtime`: the command line."""

from moe_runtime.cli import main

if __name__ == "__main__":
    main()
