"""Run a script in whose process TRL starts vLLM, on a CPU.

    python tests/engines/vllm_on_cpu.py rl/train_grpo.py --config recipe.yaml --output run
    python tests/engines/vllm_on_cpu.py evals/grpo_benchmark.py --config rl/recipes/nano/grpo.yaml --colocate

vLLM compiles nothing, which takes minutes on a CPU, and packs no weights for oneDNN: packed ones take no new values
(vLLM 0.32), and the trainer gives it new ones before each step.
"""

import functools
import runpy
import sys
from pathlib import Path

from trl.generation import vllm_generation
from vllm import _custom_ops

vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True)
_custom_ops._supports_onednn = False
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
