"""Labels against what a person would mark, ids against what the processor makes of the same question when asked."""

import pickle

import pytest
import torch
from chat_processors import chat_processor, conversation, shown, with_template
from PIL import Image

from qlip.core.errors import UserError
from qlip.data.chat_labels import ChatEncoder
from qlip.data.conversations import Conversation
from qlip.data.tar_reader import SampleRejected
from qlip.models.chat_templates import CHATML, PRELUDE

FAMILIES = ("vicuna_v1", "llama_3", "chatml")
CASES = {
    "multi-turn": conversation("<image> What is it?", "red", "Why?", "it is blue.", system="Be brief.", images=1),
    "multi-image": conversation("<image> A <image> B What?", "A is red and B blue!", system="Be brief.", images=2),
    "text-only": conversation("Where is it?", "this", system="Be brief."),
}
BEGIN, SYSTEM = "<|begin_of_text|>", "Be brief . <|eot_id|>"
USER, ASSISTANT = (f"<|start_header_id|> {role} <|end_header_id|> \\n\\n" for role in ("user", "assistant"))
LLAMA_3 = f"{BEGIN} <|start_header_id|> system <|end_header_id|> \\n\\n {SYSTEM} {USER}"
CHATML_SYSTEM = "<|im_start|> system \\n Be _brief . <|im_end|> \\n <|im_start|> user \\n"
CHATML_ASSISTANT = "<|im_end|> \\n <|im_start|> assistant \\n"
EXPECTED = {  # by hand: + before what is supervised, _ for a space inside a token
    ("vicuna_v1", "multi-turn"): (
        "<s> _Be _brief . _USER : _ <image>*4 \\n What _is _it ? _ASSISTANT : +_red +</s> "
        "USER : _Why ? _ASSISTANT : +_it +_is +_blue +. +</s>"
    ),
    ("vicuna_v1", "multi-image"): (
        "<s> _Be _brief . _USER : _ <image>*4 \\n A <image>*4 \\n B _What ? _ASSISTANT : "
        "+_A +_is +_red +_and +_B +_blue +! +</s>"
    ),
    ("vicuna_v1", "text-only"): "<s> _Be _brief . _USER : _Where _is _it ? _ASSISTANT : +_this +</s>",
    ("llama_3", "multi-turn"): (
        f"{LLAMA_3} <image>*4 \\n What is it ? <|eot_id|> {ASSISTANT} +red +<|eot_id|> "
        f"{USER} Why ? <|eot_id|> {ASSISTANT} +it +is +blue +. +<|eot_id|>"
    ),
    ("llama_3", "multi-image"): (
        f"{LLAMA_3} <image>*4 \\n A <image>*4 \\n B What ? <|eot_id|> {ASSISTANT} "
        "+A +is +red +and +B +blue +! +<|eot_id|>"
    ),
    ("llama_3", "text-only"): f"{LLAMA_3} Where is it ? <|eot_id|> {ASSISTANT} +this +<|eot_id|>",
    ("chatml", "multi-turn"): (
        f"{CHATML_SYSTEM} <image>*4 \\n What _is _it ? {CHATML_ASSISTANT} +red +<|im_end|> \\n "
        f"<|im_start|> user \\n Why ? {CHATML_ASSISTANT} +it +_is +_blue +. +<|im_end|> \\n"
    ),
    ("chatml", "multi-image"): (
        f"{CHATML_SYSTEM} <image>*4 \\n A <image>*4 \\n B _What ? {CHATML_ASSISTANT} "
        "+A +_is +_red +_and +_B +_blue +! +<|im_end|> \\n"
    ),
    ("chatml", "text-only"): f"{CHATML_SYSTEM} Where _is _it ? {CHATML_ASSISTANT} +this +<|im_end|> \\n",
}


@pytest.fixture(scope="module")
def processors() -> dict:
    return {family: chat_processor(family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_the_answers_and_their_ends_are_supervised_and_nothing_else(processors, family: str, case: str) -> None:
    chat = ChatEncoder(processors[family], max_length=999).encode(CASES[case])
    assert shown(chat, processors[family]) == EXPECTED[family, case]
    assert chat.input_ids.dtype == chat.labels.dtype == torch.int64
    assert (chat.num_images, chat.num_cut_turns) == (len(CASES[case].images), 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_training_reads_the_ids_that_the_processor_makes(processors, family: str, case: str) -> None:
    """Of the whole conversation, and of the question alone: so an answer follows what it followed in training."""
    processor, chats = processors[family], CASES[case]
    chat = ChatEncoder(processor, max_length=999).encode(chats)
    images = [Image.new("RGB", (20, 10), "red") for _ in chats.images] or None
    whole = processor.apply_chat_template(chats.messages, tokenize=False)
    add = not whole.startswith(processor.tokenizer.bos_token or "\0")
    assert processor(text=whole, images=images, add_special_tokens=add)["input_ids"][0] == chat.input_ids.tolist()
    asked = processor.apply_chat_template(chats.messages[:2], tokenize=False, add_generation_prompt=True)
    prompt = processor(text=asked, images=images, add_special_tokens=add)["input_ids"][0]
    first = int((chat.labels >= 0).nonzero()[0])
    assert chat.input_ids[:first].tolist() == prompt


def test_a_picture_has_as_many_tokens_as_the_model_has_features() -> None:
    processor = chat_processor("llama_3", image_size=32)
    chat = ChatEncoder(processor, max_length=999).encode(CASES["multi-image"])
    assert int((chat.input_ids == processor.image_token_id).sum()) == 2 * 2 * 2
    processor.patch_size = 4
    chat = ChatEncoder(processor, max_length=999).encode(CASES["multi-image"])
    assert int((chat.input_ids == processor.image_token_id).sum()) == 2 * 8 * 8


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_texts_are_characters(processors, family: str) -> None:
    processor = processors[family]
    markers = (
        "<image> </s> <|im_end|> <|eot_id|> <s> <|im_start|> <|start_header_id|> {{ messages }} @answer:0; @answer"
    )
    hostile = Conversation(
        key="h",
        images=("0.png",),
        messages=[
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": markers}]},
            {"role": "assistant", "content": [{"type": "text", "text": markers}]},
        ],
    )
    encoder = ChatEncoder(processor, max_length=999)
    chat, honest = encoder.encode(hostile), encoder.encode(conversation("<image> A", "B", images=1))
    special = set(processor.tokenizer.all_special_ids) - {processor.tokenizer.unk_token_id}

    def specials(ids: torch.Tensor) -> list[int]:
        return [number for number in ids.tolist() if number in special]

    assert specials(chat.input_ids) == specials(honest.input_ids)
    assert specials(chat.labels) == specials(honest.labels) and len(specials(chat.labels)) == 1


def test_a_marker_in_disguise_is_rejected(processors) -> None:
    processor = chat_processor("llama_3")
    processor.tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    encoder = ChatEncoder(processor, max_length=999)
    encoder._markers.remove("<|tool|>")  # as if a normalizer made one of other characters
    with pytest.raises(SampleRejected, match="special token in the text"):
        encoder.encode(conversation("A", "B <|tool|>"))


@pytest.mark.parametrize("template", ["vicuna_v1", "short"])
def test_plain_is_picture_caption_newline(template: str) -> None:
    """LLaVA's first stage: no template, no question."""
    processor = chat_processor("vicuna_v1", template=template)
    encoder = ChatEncoder(processor, max_length=999, plain=True)
    chat = encoder.encode(conversation("<image> What is it?", "red and blue", images=1))
    assert shown(chat, processor) == "<s> <image>*4 +red +_and +_blue +\\n"
    two = encoder.encode(conversation("<image> A", "red", "B", "blue", images=1))
    assert shown(two, processor) == "<s> <image>*4 +red +\\n +blue +\\n"


def test_space_before_an_end_token_belongs_to_the_end(processors) -> None:
    template = PRELUDE + CHATML.replace("message.content + '<|im_end|>", "message.content + ' \\n<|im_end|>")
    processor = chat_processor("chatml", template=template)
    chat = ChatEncoder(processor, max_length=999).encode(conversation("A", "red", "B", "blue"))
    assert shown(chat, processor).count("+") == 2 * 3 and shown(chat, processor).count("+<|im_end|>") == 2


def test_what_a_template_puts_before_the_answer_is_for_the_model_to_write() -> None:
    """Qwen3: an empty thought before the last answer, which its question for an answer does not hold."""
    thought = "'<|im_start|>' + message.role + '\\n' + ('A B\\n' if loop.last and message.role == 'assistant' else '')"
    template = PRELUDE + CHATML.replace("'<|im_start|>' + message.role + '\\n'", thought)
    processor = chat_processor("chatml", template=template)
    chat = ChatEncoder(processor, max_length=999).encode(conversation("A", "red", "B", "blue"))
    assert "assistant \\n +red +<|im_end|>" in shown(chat, processor)
    assert "assistant \\n +A +_B +\\n +blue +<|im_end|>" in shown(chat, processor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            ("for message in messages", "for message in messages[-2:]"), "drops, repeats or moves", id="drops"
        ),
        pytest.param(
            ("message.content + '<|im", "message.content * 2 + '<|im"), "drops, repeats or moves", id="repeats"
        ),
        pytest.param(("for message in messages", "for message in messages|reverse"), "in other words", id="reverses"),
        pytest.param(("{%- if add_gen", "{{- 'A' -}}{%- if add_gen"), "in other words", id="asks otherwise"),
        pytest.param(("{%- if add_gen", "{{- raise_exception('no\\nway') -}}{%- if add_gen"), "no way", id="raises"),
        pytest.param(("{%- if add_gen", "{{- nothing.at.all -}}{%- if add_gen"), "fails", id="broken"),
    ],
)
def test_a_template_that_labels_cannot_be_made_of_is_refused(change: tuple[str, str], message: str) -> None:
    template = PRELUDE + CHATML.replace(*change)
    assert template != PRELUDE + CHATML
    with pytest.raises(UserError, match=rf"chat template.*{message}.*--chat-template"):
        processor = chat_processor("chatml", template=template)
        ChatEncoder(processor, max_length=999).encode(conversation("A", "red", "B", "blue"))


def test_a_template_without_pictures_is_refused() -> None:
    processor = chat_processor("chatml", template=PRELUDE.replace("ns.text + '<image>\\n'", "ns.text") + CHATML)
    with pytest.raises(UserError, match=r"one <image> per picture.*--chat-template"):
        ChatEncoder(processor, max_length=999).encode(CASES["multi-turn"])


def test_whole_pairs_are_left_out_until_it_fits(processors) -> None:
    processor = processors["llama_3"]
    chats = conversation("<image> A", "red", "B", "blue", "<image> Why?", "it", images=2)
    whole = ChatEncoder(processor, max_length=999).encode(chats)
    for turns in (1, 2, 3):
        kept = Conversation(key="c", images=chats.images, messages=chats.messages[: 2 * turns])
        expected = ChatEncoder(processor, max_length=999).encode(kept)
        for max_length in (len(expected.input_ids), len(expected.input_ids) + 3):
            chat = ChatEncoder(processor, max_length=max_length).encode(chats)
            assert torch.equal(chat.input_ids, expected.input_ids) and torch.equal(chat.labels, expected.labels)
            assert (chat.num_images, chat.num_cut_turns) == (2 if turns == 3 else 1, 3 - turns)
    assert whole.num_cut_turns == 0
    with pytest.raises(SampleRejected, match=r"^longer than the context: .*limit 11"):
        ChatEncoder(processor, max_length=11).encode(chats)


def test_pictures_that_do_not_fit_take_the_sample_with_them(processors) -> None:
    chats = conversation("A", "red", "<image> B", "blue", images=1)
    with pytest.raises(SampleRejected, match=r"^longer than the context: its pictures"):
        ChatEncoder(processors["llama_3"], max_length=14).encode(chats)


def test_nothing_to_learn_from_is_never_silent(processors) -> None:
    with pytest.raises(SampleRejected, match=r"^no supervised token"):
        ChatEncoder(processors["chatml"], max_length=99).encode(conversation("A"))


def test_a_question_without_answer_at_the_end_is_left_out(processors) -> None:
    encoder = ChatEncoder(processors["chatml"], max_length=99)
    open_end, closed = encoder.encode(conversation("A", "red", "B")), encoder.encode(conversation("A", "red"))
    assert torch.equal(open_end.input_ids, closed.input_ids)


def test_encoders_go_to_worker_processes(processors) -> None:
    encoder = pickle.loads(pickle.dumps(ChatEncoder(processors["vicuna_v1"], max_length=999)))
    assert shown(encoder.encode(CASES["multi-turn"]), encoder.processor) == EXPECTED["vicuna_v1", "multi-turn"]


def test_a_template_can_be_changed_by_name() -> None:
    processor = with_template(chat_processor("vicuna_v1"), "short")
    chat = ChatEncoder(processor, max_length=99).encode(conversation("<image> What is it?", "red", images=1))
    assert shown(chat, processor) == "<s> <image>*4 \\n What _is _it ? \\n +red +</s>"
