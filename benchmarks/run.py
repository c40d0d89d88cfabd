"""`make bench`: every op of the library beside its peers, one thread; arguments as of `llmkernels bench`."""

import sys

from llmkernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
