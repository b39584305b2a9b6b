"""Templates that do what those shipped with Llama-3.2, Qwen2.5 and Qwen3 do: dates, trimming, defaults, thoughts."""

from __future__ import annotations

import pytest
from chat_processors import chat_processor, conversation, shown
from transformers import LlavaProcessor

from qlip.data.chat_labels import ChatEncoder
from qlip.models.chat_templates import flattening

LLAMA_3_2 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + date_string + '<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
QWEN_2_5 = """\
{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nBe brief<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
QWEN_3 = """\
{%- for message in messages %}
{%- set thought = '<think>\\n\\n</think>\\n\\n' if loop.last and message.role == 'assistant' else '' %}
{{- '<|im_start|>' + message.role + '\\n' + thought + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
TEMPLATES = {"Llama-3.2": ("llama_3", LLAMA_3_2), "Qwen2.5": ("chatml", QWEN_2_5), "Qwen3": ("chatml", QWEN_3)}
CHAT = conversation("<image> What is it?", "red", "Why?", "it is blue", images=1)
ANSWERS = {
    "Llama-3.2": "+red +<|eot_id|> +it +is +blue +<|eot_id|>",
    "Qwen2.5": "+red +<|im_end|> +it +_is +_blue +<|im_end|>",
    "Qwen3": "+red +<|im_end|> +it +_is +_blue +<|im_end|>",
}


def processor_of(name: str) -> LlavaProcessor:
    """`<think>` is a token, and no special one, as in Qwen3."""
    family, template = TEMPLATES[name]
    processor = chat_processor(family, template=flattening(template))
    processor.tokenizer.add_tokens(["<think>", "</think>"])
    return processor


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_alone_are_supervised(name):
    processor = processor_of(name)
    tokens = shown(ChatEncoder(processor, max_length=999).encode(CHAT), processor).split(" ")
    assert " ".join(token for token in tokens if token.startswith("+")) == ANSWERS[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_first_question_is_asked_as_it_was_trained(name):
    processor = processor_of(name)
    trained = ChatEncoder(processor, max_length=999).render(CHAT.messages[:2], num_images=1)
    asked = processor.apply_chat_template(CHAT.messages[:1], tokenize=False, add_generation_prompt=True)
    asked = asked.replace("<image>", "<image>" * 4)
    assert trained.text.startswith(asked + "red")
    assert trained.spans == [(len(asked), len(asked) + len("red"))]


def test_prompts_do_not_depend_on_the_day():
    text = processor_of("Llama-3.2").apply_chat_template(CHAT.messages, tokenize=False)
    assert "26 Jul 2024" in text
