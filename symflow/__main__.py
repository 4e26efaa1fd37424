"""``python -m symflow`` is the command ``symflow``."""

from symflow.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
