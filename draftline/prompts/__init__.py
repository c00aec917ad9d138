"""The first station: prompts in, four clean and disjoint splits out.

Torch-free and light: the pipeline's process imports it to compute keys.
"""

from draftline.prompts.clean import CleanedPrompts, clean_prompts, describe_report
from draftline.prompts.records import Prompt
from draftline.prompts.source import source_digest

__all__ = ["CleanedPrompts", "Prompt", "clean_prompts", "describe_report", "source_digest"]
