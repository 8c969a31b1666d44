"""LLaVA's conversation templates as chat templates in Jinja, compared with LLaVA's own prompts before they are used."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

STYLES = ("TWO", "SINGLE", "CHATML", "MPT", "GEMMA", "LLAMA_2", "PLAIN")

_CONTENT = """\
{%- set seen = namespace(visual=false, text='') -%}
{%- if message['content'] is string -%}
{%- set seen.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- set part = {'type': 'text', 'text': part} if part is string else part -%}
{%- if part['type'] in ('image', 'image_url', 'video', 'video_url') -%}
{%- set mark = '<video>' if part['type'] in ('video', 'video_url') else '<image>' -%}
{%- set seen.text = seen.text ~ (' ' if seen.visual else '') ~ mark -%}
{%- set seen.visual = true -%}
{%- elif part['type'] == 'text' -%}
{%- set between = '\\n' if seen.visual and not part['text'].startswith('\\n') else '' -%}
{%- set seen.text = seen.text ~ between ~ part['text'] -%}
{%- set seen.visual = false -%}
{%- else -%}
{{- raise_exception('a part of a message is text, image or video, not ' ~ part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
"""
_OTHER_ROLE = """\
{%- elif message['role'] != 'user' -%}
{{- raise_exception('after a system message in front, roles are user and assistant, not ' ~ message['role']) -}}
"""


@dataclass(frozen=True)
class Marks:
    """What a prompt has in place of ``<image>`` and ``<video>``: the word between ``start`` and ``end``
    (``mm_use_im_start_end``), and ``gap`` (a space or nothing) behind it, unless a space is there already.

    gap: LLaVA tokenizes the text behind an image as if a new text began there, and some tokenizers put a space in
    front of a text.
    """

    start: str = ""
    end: str = ""
    gap: str = ""

    def _steps(self) -> list[tuple[str, str]]:
        """Replacements, one after the other."""
        steps = []
        for word in ("<image>", "<video>"):
            whole = f"{self.start}{word}{self.end}"
            if whole + self.gap != word:
                steps.append((word, whole + self.gap))
            if self.gap:
                steps.append((f"{whole}{self.gap} ", f"{whole} "))
        return steps

    def apply(self, text: str) -> str:
        for old, new in self._steps():
            text = text.replace(old, new)
        return text

    def lead(self, style: str) -> str:
        """What stands between the first token and the text; prompts of ``plain`` begin with an image."""
        return "" if style == "PLAIN" else self.gap

    def jinja(self, name: str) -> str:
        """The same of a variable of a template."""
        filters = "".join(f" | replace({json.dumps(old)}, {json.dumps(new)})" for old, new in self._steps())
        return f"{{{{- {name}{filters} -}}}}"


def make_chat_template(conversation: object, bos: bool, marks: Marks) -> str:
    """A Jinja template that writes what the host's ``conversation.get_prompt()`` does.

    Images and videos of a message are written in its order, those in a row with a space between them, and a line break
    follows before text, as in LLaVA's training data. A message of the role ``system`` in front replaces the template's.

    Args:
        conversation: an entry of the host's ``conv_templates``.
        bos: whether the text begins with the tokenizer's first token.
        marks: what is written for an image or a video, and for the words ``<image>`` and ``<video>`` in a text.

    Raises:
        ValueError: a style that is not in :data:`STYLES`, or a template that begins with messages.
    """
    style = conversation.sep_style.name
    if style not in STYLES:
        raise ValueError(f"its separator style is {style}; these can be exported: {', '.join(STYLES)}")
    if conversation.messages:
        raise ValueError(f"it has messages of its own ({len(conversation.messages)})")
    user, assistant = conversation.roles[0], conversation.roles[1]
    sep, sep2 = conversation.sep or "", conversation.sep2 or ""
    system, system_start = conversation.system, ""
    colon = style in ("TWO", "SINGLE")
    if style == "CHATML":
        after_system, before, after = f"{sep}\n", ("\n", "\n"), (f"{sep}\n", f"{sep}\n")
        system_start = f"{user.replace('user', 'system')}\n"
        system = system.removeprefix(system_start)
    elif style in ("PLAIN", "GEMMA"):
        after_system, before = "", ("", "")
        after = (sep, sep2) if style == "PLAIN" else (sep, sep)
        user, assistant = ("", "") if style == "PLAIN" else (user, assistant)
    elif style == "LLAMA_2":
        return _llama_2(system, sep, sep2, bos, marks)
    else:
        after_system, before = sep, (": ", ": ") if colon else ("", "")
        after = (sep, sep2) if style == "TWO" else (sep, sep)
    if style == "GEMMA":
        system = ""
    start = f"{assistant}:" if colon else f"{assistant}{before[1]}"
    q = json.dumps
    shown = f"{{{{- {q(system_start)} ~ system ~ {q(after_system)} -}}}}"
    if style == "CHATML":  # the others write what stands around an empty system message, too
        shown = f"{{%- if system -%}}{shown}{{%- endif -%}}"
    lines = [
        _head(bos and marks.lead(style), system),
        shown,
        "{%- for message in turns -%}",
        "{%- if message['role'] == 'assistant' -%}",
        f"{{{{- {q(assistant + before[1])} -}}}}",
        _OTHER_ROLE.rstrip("\n"),
        "{%- else -%}",
        f"{{{{- {q(user + before[0])} -}}}}",
        "{%- endif -%}",
        _content(marks),
        f"{{{{- {q(after[1])} if message['role'] == 'assistant' else {q(after[0])} -}}}}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {q(start)} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(lines)


def _head(lead: str | bool, system: str) -> str:
    """lead: what stands between the first token and the text; False where there is no such token."""
    return "\n".join(
        [
            "" if lead is False else f"{{{{- bos_token ~ {json.dumps(lead)} -}}}}" if lead else "{{- bos_token -}}",
            "{%- if messages and messages[0]['role'] == 'system' -%}",
            "{%- set turns = messages[1:] -%}",
            "{%- set given = messages[0]['content'] -%}",
            "{%- set system = given if given is string else given | map(attribute='text') | join('') -%}",
            "{%- else -%}",
            f"{{%- set turns, system = messages, {json.dumps(system)} -%}}",
            "{%- endif -%}",
        ]
    ).lstrip("\n")


def _content(marks: Marks) -> str:
    return _CONTENT + marks.jinja("seen.text")


def _llama_2(system: str, sep: str, sep2: str, bos: bool, marks: Marks) -> str:
    """``[INST] <<SYS>>...`` around the first question, ``[INST]`` around the others. LLaVA strips what starts it."""
    q = json.dumps
    lines = [
        _head(bos and marks.lead("LLAMA_2"), system),
        "{%- for message in turns -%}",
        "{%- if message['role'] == 'assistant' -%}",
        "{{- ' ' -}}",
        _content(marks),
        f"{{{{- {q(' ' + sep2)} -}}}}",
        _OTHER_ROLE.rstrip("\n"),
        "{%- else -%}",
        f"{{{{- ({q(sep)} if not loop.first else '') ~ '[INST] ' -}}}}",
        "{%- if loop.first and system -%}{{- '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' -}}{%- endif -%}",
        _content(marks),
        "{{- ' [/INST]' -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------- proof

Turns = Sequence[tuple[str, str | None]]
IMAGE_QUESTION = "<image>\nWhat is in the photo?"
PROBES: tuple[tuple[Turns, list[dict[str, object]]], ...] = (
    (
        [(IMAGE_QUESTION, None)],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the photo?"}]}],
    ),
    (
        [("<image> <image>\nWhich?", "the <first>.\nYes"), ("And now?", None)],
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]},
            {"role": "assistant", "content": "the <first>.\nYes"},
            {"role": "user", "content": "And now?"},
        ],
    ),
    ([("2 + 2?", "4")], [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]),
)
"""Turns (question, answer or None) of a conversation, and the same as messages."""


def probes(style: str) -> list[tuple[Turns, list[dict[str, object]]]]:
    """Those of :data:`PROBES` that LLaVA can write: with ``plain`` no answers."""
    return [pair for pair in PROBES if style != "PLAIN" or all(answer is None for _, answer in pair[0])]


def check_chat_template(
    template: str,
    prompt_of: Callable[[Turns], str],
    bos: str,
    marks: Marks,
    style: str,
) -> None:
    """Raises ``ValueError`` where a template writes another prompt than LLaVA does.

    prompt_of: turns to LLaVA's prompt. bos: the first token, which LLaVA's tokenizer adds.
    """
    start = bos + marks.lead(style) if bos else ""
    for turns, messages in probes(style):
        expected = start + marks.apply(prompt_of(turns))
        generates = turns[-1][1] is None
        made = render(template, messages, bos, generates)
        if made != expected:
            raise ValueError(f"its chat template would write {made!r} where LLaVA writes {expected!r}")


def render(template: str, messages: Sequence[Mapping[str, object]], bos: str, generates: bool) -> str:
    """What transformers makes of messages by a template."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template).render(
        messages=messages, bos_token=bos, eos_token="", add_generation_prompt=generates
    )


def _refuse(message: str) -> None:
    raise ValueError(message)
