"""vLLM as the stages reach it: imported late, from an environment that may lack it, with its settings made before."""

import os
from typing import Any

from pipeline.errors import RunError


def import_vllm(key: str, stage: str, device: str) -> tuple[Any, bool]:
    """The module `vllm`, and whether it is a build for CPUs.

    key: the recipe's key that asks for it, stage: whose interpreter must have it, device: the recipe's runtime.device.
    Raises RunError where vLLM cannot be imported or cannot use that device.
    """
    try:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        import vllm
        from vllm.platforms import current_platform
    except (ImportError, OSError, RuntimeError) as error:  # the last two: a broken torchvision beside it
        raise RunError(
            f"{key} is vllm, but it cannot be imported here ({error}). Install it in an environment of its own, "
            f"pip install 'logitbank[vllm]', and name its interpreter with "
            f"--set runtime.python.{stage}=<environment>/bin/python; without a GPU: make vllm-cpu. "
            f"Or take transformers: --set {key}=hf"
        ) from None
    on_cpu = current_platform.is_cpu()
    if device == "cuda" and on_cpu:
        raise RunError("runtime.device is cuda, but this vLLM is a build for CPUs; set runtime.device=auto")
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # 5 times faster where cores are few or shared
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: two imports of 15 s less
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    return vllm, on_cpu
