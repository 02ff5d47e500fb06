"""The data layer: files -> rows -> records -> token ids -> batches."""

from rlhf.data.collate import collate_prompts, collate_rankings, collate_responses
from rlhf.data.embedded import embedded_corpus
from rlhf.data.spec import DataError, DatasetSpec
from rlhf.data.stage_data import StageData, load_stage_data
from rlhf.data.templates import load_template, render_messages
from rlhf.data.tokenize import TextEncoder, TokenReport, tokenize_records

__all__ = [
    "DataError",
    "DatasetSpec",
    "StageData",
    "TextEncoder",
    "TokenReport",
    "collate_prompts",
    "collate_rankings",
    "collate_responses",
    "embedded_corpus",
    "load_stage_data",
    "load_template",
    "render_messages",
    "tokenize_records",
]
