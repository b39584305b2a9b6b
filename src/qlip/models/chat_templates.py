"""Chat templates: how a conversation becomes the text that a language model reads, as Jinja (transformers' convention).

A language model's own template expects texts; ours are preceded by a prelude that turns a list of parts into a text,
with `<image>` where a picture stands. So one template serves training, `qlip ask` and the harnesses. The prelude also
sets what makes a template's text depend on more than the messages: Llama-3.1's date, Qwen3's thinking.
"""

from __future__ import annotations

IMAGE_TOKEN = "<image>"

PRELUDE = """\
{%- set ns = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message.content is string -%}{%- set ns.text = message.content -%}
{%- else -%}
{%- set ns.text = '' -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{%- set ns.text = ns.text + '<image>\\n' -%}
{%- elif part.type == 'text' -%}{%- set ns.text = ns.text + part.text -%}
{%- else -%}{{- raise_exception('parts of a message are image or text, not ' + part.type) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set ns.messages = ns.messages + [{'role': message.role, 'content': ns.text}] -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
{%- set date_string = '26 Jul 2024' -%}
{%- set enable_thinking = false -%}
"""

VICUNA_V1 = """\
{%- if messages[0].role == 'system' -%}
{{- messages[0].content + ' ' -}}{%- set messages = messages[1:] -%}
{%- else -%}
{{- "A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- 'USER: ' + message.content + ' ' -}}
{%- else -%}{{- 'ASSISTANT: ' + message.content + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

LLAMA_3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

SHORT = """\
{%- for message in messages -%}
{{- message.content -}}{{- eos_token if message.role == 'assistant' else '\\n' -}}
{%- endfor -%}
"""

CHAT_TEMPLATES = {"vicuna_v1": VICUNA_V1, "llama_3": LLAMA_3, "chatml": CHATML, "short": SHORT}
"""By name: LLaVA-1.5's `v1`, those of the Llama-3 and Qwen families, and `short`, nothing but a line break and an end
marker, for tiny language models. (LLaVA's `plain` is no template: `data.plain`.)"""

NEEDED_TOKENS = {
    "vicuna_v1": (),
    "llama_3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "short": (),
}
"""Markers of each template that a tokenizer must know as single tokens; `vicuna_v1` and `short` take any end token."""


def flattening(template: str) -> str:
    """The template of a language model, made to accept messages that are lists of parts."""
    return template if template.startswith(PRELUDE) else PRELUDE + template
