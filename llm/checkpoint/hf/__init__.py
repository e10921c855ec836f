"""Hugging Face transformers: import of its checkpoints, export to them, and the proof that both compute the same."""

from llm.checkpoint.hf.build import build_model
from llm.checkpoint.hf.export import ExportOptions, export_hf
from llm.checkpoint.hf.load import is_hf_folder, load_hf

__all__ = ["ExportOptions", "build_model", "export_hf", "is_hf_folder", "load_hf"]
