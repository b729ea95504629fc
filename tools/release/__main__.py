"""`python3 -m tools.release`, run in a checkout."""

from tools.release.command import main

main()
