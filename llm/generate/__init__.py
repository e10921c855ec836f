"""Generation: a trained model and prompts in, tokens or text out."""

from llm.generate.draft_length import DraftLength
from llm.generate.drafters import LookupDrafter, ModelDrafter, SelfDrafter
from llm.generate.engine import Engine
from llm.generate.events import Completion, TokenEvent
from llm.generate.load import load_model
from llm.generate.prefix import Prefix
from llm.generate.sampling import Sampling
from llm.generate.scheduler import Scheduler
from llm.generate.text import TextStream, generate_text

__all__ = [
    "Completion",
    "DraftLength",
    "Engine",
    "LookupDrafter",
    "ModelDrafter",
    "Prefix",
    "Sampling",
    "Scheduler",
    "SelfDrafter",
    "TextStream",
    "TokenEvent",
    "generate_text",
    "load_model",
]
