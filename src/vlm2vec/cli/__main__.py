"""`python -m vlm2vec.cli`: what torchrun starts."""

from vlm2vec.cli import main

main()
