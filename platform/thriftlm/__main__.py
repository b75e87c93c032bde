"""`python -m thriftlm` is `thriftlm`."""

from thriftlm.cli import main

main()
