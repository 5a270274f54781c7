"""InfiniteContext: a transformers model with DeepSeek-V3's Multi-Head Latent Attention.

Importing the package registers the architecture with transformers' Auto classes:

    import ic_model
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(ic_model.checkpoint_path("ic-nano"))
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ic_model.cache import LatentCache
from ic_model.checkpoints import checkpoint_path
from ic_model.configuration import ICConfig
from ic_model.modeling import ICForCausalLM, ICModel

AutoConfig.register(ICConfig.model_type, ICConfig, exist_ok=True)
AutoModel.register(ICConfig, ICModel, exist_ok=True)
AutoModelForCausalLM.register(ICConfig, ICForCausalLM, exist_ok=True)

__version__ = "0.1.0"
__all__ = ["ICConfig", "ICForCausalLM", "ICModel", "LatentCache", "__version__", "checkpoint_path"]
