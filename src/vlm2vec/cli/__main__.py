"""`python -m vlm2vec.cli`, for launchers such as torchrun."""

from vlm2vec.cli import main

main()
