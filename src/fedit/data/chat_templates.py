"""The run's template for other programs: Jinja text beside the tokenizer, by which they make the same ids of a chat.

They render the whole chat and tokenise it at once; fedit tokenises every prompt and every response by itself. To
tokenizers that put a space before a text (SentencePiece) that is another thing; a space in the rendered text makes up
for it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fedit.data.encoding import ids_before_text
from fedit.interfaces import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_template_of(template: Template, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the Jinja text of `template` with what the tokenizer puts before a text; None: the template has none."""
    text = template.chat_template(tokenizer)
    if text is None or template.special_tokens:
        return text
    before = "".join(tokenizer.convert_ids_to_tokens(ids_before_text(tokenizer)))
    return f"{{{{- {literal(before + joint(before, 'a', tokenizer))} }}}}{text}" if before else text


def joint(before: str, after: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what to put between two texts so that the tokenizer makes of both at once the ids that it makes of each: a
    space, or nothing, also where neither does.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    apart = ids(before) + ids(after)
    return next((space for space in ("", " ") if ids(before + space + after) == apart), "")


def literal(text: str) -> str:
    """Return a text as Jinja spells it in an expression."""
    return json.dumps(text, ensure_ascii=False)
