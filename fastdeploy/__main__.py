"""The command `fastdeploy`, also `python -m fastdeploy`; Ctrl-C ends its imports quietly."""

import sys


def main() -> int:
    """Run the command; returns the exit status."""
    try:
        from fastdeploy import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
