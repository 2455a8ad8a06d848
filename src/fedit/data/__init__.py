"""Rows -> `Example` -> token ids: reading, templates, encoding."""

from fedit.data.chat_templates import chat_template_of
from fedit.data.encoding import Dropped, EncodingReport, check_text, encode, encode_all, encode_prompt
from fedit.data.loading import load_examples
from fedit.data.templates import AlpacaTemplate, ChatTemplate, PlainTemplate

__all__ = [
    "AlpacaTemplate",
    "ChatTemplate",
    "Dropped",
    "EncodingReport",
    "PlainTemplate",
    "chat_template_of",
    "check_text",
    "encode",
    "encode_all",
    "encode_prompt",
    "load_examples",
]
