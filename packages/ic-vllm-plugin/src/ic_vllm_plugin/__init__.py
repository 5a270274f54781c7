"""InfiniteContext for vLLM: `vllm serve MODEL` knows the architecture once this package is installed.

vLLM calls `register` through the entry point `vllm.general_plugins`, in every one of its processes.
Importing this module is cheap: it imports neither vLLM nor PyTorch, and it never initialises CUDA.
"""

__version__ = "0.1.0"
__all__ = ["__version__", "register"]


def register() -> None:
    """Register the architecture, its configuration and its defaults with the running vLLM.

    Safe to call any number of times: vLLM calls it once per process.

    Raises:
        RuntimeError: the installed vLLM is outside the supported range. vLLM passes this on, so
            the server stops with our message instead of an unknown-architecture error later.
    """
    # lazy: entry points are loaded by every vLLM command, also those that serve another model
    from ic_vllm_plugin import compat

    compat.check_vllm_version()
    compat.register_architecture()
