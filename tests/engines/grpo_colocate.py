"""`qzoom train grpo` with vLLM in the trainer's process; without compilation, which takes minutes on a CPU."""

import functools
import sys

from trl.generation import vllm_generation

from qzoom_agent.cli.main import main

vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True)
sys.exit(main(["train", "grpo", *sys.argv[1:]]))
