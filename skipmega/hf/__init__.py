"""Hugging Face exports: the self-contained model they carry, writing, verifying and reading them."""

from skipmega.hf.export import load_export, verify_export, write_export
from skipmega.hf.naming import native_to_hf_names, to_hf_config, to_hf_state
from skipmega.hf.tokenizer import count_mismatches, export_tokenizer

__all__ = [
    "count_mismatches",
    "export_tokenizer",
    "load_export",
    "native_to_hf_names",
    "to_hf_config",
    "to_hf_state",
    "verify_export",
    "write_export",
]
