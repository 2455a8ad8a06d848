"""Templates: how an example becomes text, as prompt and response segments.

Every template writes the system prompt first, then each turn; only the responses are supervised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from fedit.data.chat_templates import joint, literal
from fedit.interfaces import DataError, Example, Segment, Template, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AlpacaTemplate(Template):
    r"""Headers ``### Instruction:``, ``### Input:`` (where there is a context) and ``### Response:``.

    The headers of Stanford Alpaca without its preamble, which costs 30 tokens a row and says nothing that tuning
    does not teach. Works with any tokenizer.

    Examples:
        >>> example = Example((Turn("Name a colour.", "Blue"),))
        >>> [segment.text for segment in AlpacaTemplate().render(example, None)]
        ['### Instruction:\nName a colour.\n\n### Response:\n', 'Blue']
    """

    name: ClassVar[str] = "alpaca"

    def render(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
        prompts = []
        for turn in example.turns:
            context = f"### Input:\n{turn.context}\n\n" if turn.context else ""
            prompts.append(f"### Instruction:\n{turn.instruction}\n\n{context}### Response:\n")
        return _alternate(example, prompts)

    def chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return _alternate_in_jinja(tokenizer, "### Instruction:\n", "\n\n### Response:\n")


class PlainTemplate(Template):
    r"""The instruction, a blank line and the context (where there is one), a line break, the response.

    The shortest: for small models, whose context and vocabulary are too small for headers.

    Examples:
        >>> example = Example((Turn("Name it.", "Ilka", "An animal of the caves."),))
        >>> [segment.text for segment in PlainTemplate().render(example, None)]
        ['Name it.\n\nAn animal of the caves.\n', 'Ilka']
    """

    name: ClassVar[str] = "plain"

    def render(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
        return _alternate(example, [f"{_question(turn)}\n" for turn in example.turns])

    def chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return _alternate_in_jinja(tokenizer, "", "\n")


class ChatTemplate(Template):
    r"""The tokenizer's own chat template; the context follows the instruction after a blank line.

    Assumes that the text of a chat begins with the prompt that asks for its last message: refuses templates that
    rewrite earlier messages (some reasoning models drop their thoughts), because generation would then see other
    text than training.

    Examples:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
        >>> turn = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
        >>> tokenizer.chat_template = turn + "{% if add_generation_prompt %}[assistant] {% endif %}"
        >>> example = Example((Turn("Name a colour.", "Blue"),), system="Be brief.")
        >>> [segment.text for segment in ChatTemplate().render(example, tokenizer)]
        ['[system] Be brief.\n[user] Name a colour.\n[assistant] ', 'Blue\n']
    """

    name: ClassVar[str] = "chat"
    special_tokens: ClassVar[bool] = True

    def render(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "[data] template = 'chat': the tokenizer has no chat template. Use a chat model's tokenizer, or "
                "template = 'alpaca'."
            )
        messages = [{"role": "system", "content": example.system}] if example.system else []
        segments: list[Segment] = []
        done = ""
        for turn in example.turns:
            messages.append({"role": "user", "content": _question(turn)})
            prompt = _apply(tokenizer, messages, example, asks=True)
            messages.append({"role": "assistant", "content": turn.response})
            full = _apply(tokenizer, messages, example, asks=False)
            if not (prompt.startswith(done) and full.startswith(prompt)):
                raise DataError(
                    f"{example.source or 'row'}: [data] template = 'chat': this tokenizer's chat template rewrites "
                    "earlier text when a message is added, so the prompt of generation would differ from the one in "
                    "training. Use template = 'alpaca', or give the tokenizer another chat template."
                )
            segments += [Segment(prompt[len(done) :], False), Segment(full[len(prompt) :], True)]
            done = full
        return segments

    def chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        return tokenizer.get_chat_template() if tokenizer.chat_template else None


def _question(turn: Turn) -> str:
    return f"{turn.instruction}\n\n{turn.context}" if turn.context else turn.instruction


def _alternate(example: Example, prompts: Sequence[str]) -> list[Segment]:
    """Return prompts and responses in turn; a blank line parts the system prompt and earlier turns from a prompt."""
    segments: list[Segment] = []
    before = f"{example.system}\n\n" if example.system else ""
    for turn, prompt in zip(example.turns, prompts, strict=True):
        segments += [Segment(before + prompt, False), Segment(turn.response, True)]
        before = "\n\n"
    return segments


_JINJA = """\
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content + "\\n\\n" }}
    {%- elif message.role == 'user' %}
        {{- OPENING + message.content + CLOSING }}
    {%- elif message.role == 'assistant' %}
        {{- ANSWER + message.content + eos_token + ("" if loop.last else AGAIN) }}
    {%- else %}
        {{- raise_exception("unknown role: " + message.role) }}
    {%- endif %}
{%- endfor %}
"""


def _alternate_in_jinja(tokenizer: PreTrainedTokenizerBase, opening: str, closing: str) -> str:
    """Return what `_alternate` does with prompts that have `opening` before the question and `closing` after it."""
    texts = {
        "OPENING": opening,
        "CLOSING": closing,
        "ANSWER": joint("\n", "a", tokenizer),
        "AGAIN": joint(str(tokenizer.eos_token), "\n\n", tokenizer) + "\n\n",
    }
    text = _JINJA
    for name, value in texts.items():
        text = text.replace(name, literal(value))
    return text


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], example: Example, asks: bool) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    except TemplateError as error:
        raise DataError(
            f"{example.source or 'row'}: the tokenizer's chat template refuses the chat: {error}. Some know no system "
            "message or one turn only; use template = 'alpaca' for such rows."
        ) from error
    assert isinstance(text, str)
    return text
