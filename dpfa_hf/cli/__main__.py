"""`python -m dpfa_hf.cli`, where the console script is not on the path."""

from dpfa_hf.cli import main

main()
