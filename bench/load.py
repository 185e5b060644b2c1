"""`vllm bench serve`, vLLM's own load generator, without the frame of vLLM's command line.

That one asks for the version of a package named vllm, and the CPU build goes by another name.
"""

from __future__ import annotations

import argparse

from vllm.benchmarks.serve import add_cli_args, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_cli_args(parser)
    main(parser.parse_args())
