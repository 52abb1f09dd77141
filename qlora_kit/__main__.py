"""`python -m qlora_kit` is `qlora-kit`."""

from qlora_kit.cli import main

main()
