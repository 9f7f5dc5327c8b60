"""`python -m xutrain` is the `xutrain` command."""

from xutrain.cli.app import main

if __name__ == "__main__":
    main()
