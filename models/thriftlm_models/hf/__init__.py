"""Hugging Face models out of decoders, and decoders out of them."""

from thriftlm_models.hf.exporting import HfModel, save, to_hf
from thriftlm_models.hf.importing import from_pretrained, spec_from_config

__all__ = ["HfModel", "from_pretrained", "save", "spec_from_config", "to_hf"]
