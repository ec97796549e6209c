"""``python -m ddpmctl``."""

from ddpmctl.cli.app import main

if __name__ == "__main__":
    main()
