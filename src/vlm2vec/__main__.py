"""`python -m vlm2vec`."""

from vlm2vec.cli import main

main()
