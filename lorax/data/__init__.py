"""Data: rows of any format → chat template → tokens and loss mask → packed batches."""

import os

# transformers is here for tokenizers only: that PyTorch is missing is no news.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from lorax.data.batches import Batch, BatchPlan
from lorax.data.chat import encode_prompt, read_own_template, read_template
from lorax.data.dataset import EncodedDataset, EncodedRow, EncodeReport
from lorax.data.encode import load_encoded_dataset
from lorax.data.formats import ROW_KINDS, RowKind, alpaca_prompt
from lorax.data.masks import encode_text
from lorax.data.packing import pack_rows
from lorax.data.prefetch import prefetch
from lorax.data.preview import render_example
from lorax.data.renderer import RENDERER
from lorax.data.rows import DataError, SourceError
from lorax.data.tokenizer import WITHOUT_TORCH, Tokenizer, load_tokenizer

__all__ = [
    "RENDERER",
    "ROW_KINDS",
    "WITHOUT_TORCH",
    "Batch",
    "BatchPlan",
    "DataError",
    "EncodeReport",
    "EncodedDataset",
    "EncodedRow",
    "RowKind",
    "SourceError",
    "Tokenizer",
    "alpaca_prompt",
    "encode_prompt",
    "encode_text",
    "load_encoded_dataset",
    "load_tokenizer",
    "pack_rows",
    "prefetch",
    "read_own_template",
    "read_template",
    "render_example",
]
