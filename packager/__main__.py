"""`python -m packager` is the `packager` command."""

from __future__ import annotations

import sys

from packager.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
