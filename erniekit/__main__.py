"""The command `erniekit`, also `python -m erniekit`; Ctrl-C ends its imports quietly."""

import sys


def main() -> int:
    """Run the command; returns the exit status."""
    try:
        from erniekit import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
