"""``python -m symflow`` is the command ``symflow``."""

from symflow.cli import main

raise SystemExit(main())
