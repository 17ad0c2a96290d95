"""`python -m fastdeploy.entrypoints.openai.api_server --model PATH --port PORT`, as published."""

from __future__ import annotations

import sys

from fastdeploy.cli import serve

if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], program="api_server"))
