"""``python -m mariotte``."""

from mariotte.cli.main import main

if __name__ == "__main__":
    main()
