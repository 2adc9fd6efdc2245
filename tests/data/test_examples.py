import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_jax.data.examples import (
    Example,
    answer_ids,
    completion_example,
    fim_example,
    messages_example,
    prompt_ids,
    show_example,
    text_examples,
)
from rlhf_jax.data.sources import stream_records
from rlhf_jax.data.tokenizer import load_tokenizer, train_tokenizer
from rlhf_jax.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
PAD, BOS, EOS, START, END = 0, 1, 2, 3, 4
SPELLED = {"<s>": BOS, "</s>": EOS, "<|start|>": START, "<|end|>": END}
# ChatML, whose newline after a turn's end no answer should have.
TURNS = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
CHATML = "{{ bos_token }}" + TURNS + "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"


def characters(text):
    return [100 + ord(c) for c in text]


def rendered(text):
    parts = re.split("(" + "|".join(map(re.escape, SPELLED)) + ")", text)
    return [i for part in parts for i in ([SPELLED[part]] if part in SPELLED else characters(part))]


def fake_tokenizer(prefix=(BOS,), chat_template=CHATML):
    """A token a character. Without a prefix, as for GPT-2, an empty prompt starts from eos."""
    return SimpleNamespace(
        path="fake",
        pad_id=PAD,
        bos_id=BOS if prefix else None,
        eos_id=EOS,
        stop_ids=(EOS, END),
        special_ids=frozenset(SPELLED.values()),
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        prefix=prefix,
        start_id=BOS if prefix else EOS,
        fim_prefix_id=None,
        fim_suffix_id=None,
        fim_middle_id=None,
        chat_template=chat_template,
        encode=characters,
        encode_rendered=rendered,
        encode_prompt=lambda text: [*prefix, *characters(text)] or [EOS],
        decode=lambda ids: "".join(chr(i - 100) for i in ids if i >= 100),
    )


def chat_ids(messages, generation_prompt=False):
    """The template, written out."""
    ids = [BOS]
    for message in messages:
        ids += [START, *characters(message["role"] + "\n" + message["content"]), END, *characters("\n")]
    return ids + ([START, *characters("assistant\n")] if generation_prompt else [])


def say(role, content):
    return {"role": role, "content": content}


def counted_tokens(example):
    return [token for token, counts in zip(example.tokens, example.counted, strict=True) if counts]


# Strings.


@pytest.mark.parametrize("prompt", ["ab", ""])
def test_strings_are_bos_prompt_completion_eos(prompt):
    tokenizer = fake_tokenizer()
    head, tail = [BOS, *characters(prompt)], [*characters("cde"), EOS]
    assert prompt_ids(tokenizer, prompt) == head
    assert answer_ids(tokenizer, prompt, "cde") == tail
    assert completion_example(tokenizer, prompt, "cde", "completion") == Example.counting_from(head + tail, len(head))
    assert completion_example(tokenizer, prompt, "cde", "all") == Example.counting_from(head + tail, 1)
    assert text_examples(tokenizer, prompt + "cde", 100) == [Example.counting_from(head + tail, 1)]


def test_without_a_prefix_a_text_starts_with_its_own_tokens():
    tokenizer = fake_tokenizer(prefix=())
    assert text_examples(tokenizer, "abc", 2) == [
        Example(characters("abc"), [False, True, True]),
        Example([*characters("c"), EOS], [False, True]),
    ]
    assert completion_example(tokenizer, "", "c", "completion") == Example(
        [EOS, *characters("c"), EOS], [False, True, True]
    )


def test_the_projects_own_tokenizer_gives_bos_prompt_completion_eos(tmp_path):
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)]
    train_tokenizer(texts, tmp_path / "t.model", 300)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    prompt, completion = texts[7][:12], texts[7][12:]
    head = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    tail = [*tokenizer.encode(completion), tokenizer.eos_id]
    assert prompt_ids(tokenizer, prompt) == head and answer_ids(tokenizer, prompt, completion) == tail
    assert completion_example(tokenizer, prompt, completion, "completion").tokens == head + tail
    (whole,) = text_examples(tokenizer, texts[7], 1000)
    assert whole.tokens == [tokenizer.bos_id, *tokenizer.encode(texts[7]), tokenizer.eos_id]
    middle = [*tokenizer.encode(completion[:5]), tokenizer.eos_id]
    example = fim_example(tokenizer, prompt, completion, 5 / len(completion), "completion")
    assert counted_tokens(example) == middle
    assert example.tokens == [
        tokenizer.bos_id,
        tokenizer.fim_prefix_id,
        *head[1:],
        tokenizer.fim_suffix_id,
        *tokenizer.encode(completion[5:]),
        tokenizer.fim_middle_id,
        *middle,
    ]


# Conversations.

DIALOGUES = [
    [say("user", "hi"), say("assistant", "yes")],
    [say("system", "be\nkind"), say("user", "hi"), say("assistant", "yes"), say("user", "?"), say("assistant", "no\n")],
]


@pytest.mark.parametrize("messages", DIALOGUES)
def test_a_conversation_is_its_template_through_the_end_of_the_turn(messages):
    tokenizer = fake_tokenizer()
    prompt, answer = messages[:-1], messages[-1:]
    head, tail = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, prompt, answer)
    assert head == chat_ids(prompt, True)
    assert tail == [*characters(answer[0]["content"]), END]
    example = completion_example(tokenizer, prompt, answer, "completion")
    assert example == Example.counting_from(head + tail, len(head))
    assert completion_example(tokenizer, prompt, answer, "all") == Example.counting_from(head + tail, 1)
    assert messages_example(tokenizer, messages, "all") == completion_example(tokenizer, prompt, answer, "all")


@pytest.mark.parametrize("messages", DIALOGUES)
def test_every_assistant_turn_of_a_chat_record_counts_with_its_end(messages):
    example = messages_example(fake_tokenizer(), messages, "completion")
    turns = [[*characters(m["content"]), END] for m in messages if m["role"] == "assistant"]
    assert counted_tokens(example) == sum(turns, [])
    assert example.tokens == chat_ids(messages)[:-1]


def test_of_an_answer_of_several_messages_the_assistants_count():
    answer = [say("assistant", "a"), say("user", "b"), say("assistant", "c")]
    example = completion_example(fake_tokenizer(), [say("user", "q")], answer, "completion")
    assert counted_tokens(example) == [*characters("a"), END, *characters("c"), END]


def test_a_template_may_rewrite_what_came_before_the_prompt():
    """Templates that drop the thoughts of earlier turns: no mask for all turns, but the last answer is known."""
    shown = "{{ m.content if loop.last or m.role == 'user' else '' }}"
    tokenizer = fake_tokenizer(chat_template=CHATML.replace("{{ m.content }}", shown))
    messages = DIALOGUES[1][1:]
    example = completion_example(tokenizer, messages[:-1], messages[-1:], "completion")
    assert counted_tokens(example) == [*characters("no\n"), END]
    assert messages_example(tokenizer, messages, "all").tokens == example.tokens
    with pytest.raises(UserError, match="the assistant's tokens cannot be told"):
        messages_example(tokenizer, messages, "completion")


def test_a_template_that_does_not_continue_its_prompt_is_refused():
    tokenizer = fake_tokenizer(chat_template=CHATML.replace("<|start|>assistant", "<|start|>helper"))
    with pytest.raises(UserError, match="writes a prompt differently once its answer follows"):
        answer_ids(tokenizer, DIALOGUES[0][:1], DIALOGUES[0][1:])


def test_a_template_that_ends_no_answer_is_refused():
    ended = "{{ '<|end|>' if m.role == 'user' else '' }}"  # an end before the answer is none of it
    tokenizer = fake_tokenizer(chat_template=CHATML.replace("<|end|>", ended))
    for make in (
        lambda: answer_ids(tokenizer, DIALOGUES[0][:1], DIALOGUES[0][1:]),
        lambda: messages_example(tokenizer, DIALOGUES[0], "completion"),
    ):
        with pytest.raises(UserError, match=r"none of the tokenizer's stop ids \[2, 4\]"):
            make()


def test_a_conversation_without_an_answer_is_refused():
    with pytest.raises(UserError, match="marks no token as the assistant's"):
        messages_example(fake_tokenizer(), DIALOGUES[0][:1], "completion")


def test_a_conversation_has_no_middle():
    tokenizer = SimpleNamespace(**{**vars(fake_tokenizer()), **dict.fromkeys(("fim_prefix_id", "fim_suffix_id"), 9)})
    tokenizer.fim_middle_id = 9
    with pytest.raises(UserError, match="a record is a conversation, which has no middle: set fim_rate=0"):
        fim_example(tokenizer, DIALOGUES[0][:1], DIALOGUES[0][1:], 0.5, "all")


def test_a_conversation_of_the_projects_own_tokenizer(tmp_path):
    train_tokenizer([f"{i} and {i + 1}\nmore text" for i in range(60)], tmp_path / "t.model", 300)
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q{{ m.content }}A{% else %}{{ m.content }}"
    )
    tokenizer = load_tokenizer(tmp_path / "t.model", template + "{{ eos_token }}\n{% endif %}{% endfor %}")
    prompt, answer = [say("user", "1 and"), say("assistant", "2"), say("user", "more")], [say("assistant", "3 text")]
    head, tail = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, prompt, answer)
    assert head[0] == tokenizer.bos_id and tokenizer.decode(head) == "Q1 andA2\nQmoreA"
    assert tail[-1] == tokenizer.eos_id and tokenizer.decode(tail) == "3 text"
    assert completion_example(tokenizer, prompt, answer, "completion") == Example.counting_from(head + tail, len(head))
    example = messages_example(tokenizer, [*prompt, *answer], "completion")
    assert example.tokens == head + tail
    assert tokenizer.decode(counted_tokens(example)) == "23 text"


# One example for people.


def test_an_example_is_shown_with_what_is_masked():
    tokenizer = fake_tokenizer()
    example = completion_example(tokenizer, "a\nb", "c\\d\t", "completion")
    assert show_example(tokenizer, example) == "9 tokens: 4 masked in ⟦ ⟧, 5 counted\n⟦<bos>a\\nb⟧c\\\\d\\t<eos>"
    assert show_example(tokenizer, Example([5, 5], [False, False])) == "2 tokens: 2 masked in ⟦ ⟧, 0 counted\n⟦⟧"
    head, tail = show_example(tokenizer, messages_example(tokenizer, DIALOGUES[1], "completion")).split("\n")
    assert head == "68 tokens: 60 masked in ⟦ ⟧, 8 counted"
    assert tail.endswith("assistant\\n⟧yes<stop>⟦\\nuser\\n?<stop>\\nassistant\\n⟧no\\n<stop>")


def test_a_long_text_is_cut_in_its_middle():
    tokenizer = fake_tokenizer()
    (example,) = text_examples(tokenizer, "x" * 50 + "y" * 900 + "z" * 50, 2000)
    shown = show_example(tokenizer, example, width=100)
    assert (
        shown == f"1002 tokens: 1 masked in ⟦ ⟧, 1001 counted\n⟦<bos>⟧{'x' * 50} ... 905 characters ... {'z' * 45}<eos>"
    )


# Real data.


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data on this machine")
def test_prompts_and_answers_of_real_dialogues_make_up_what_is_trained_on():
    tokenizer = fake_tokenizer()
    path = SHARED / "hh-rlhf" / "helpful-base.jsonl.gz"
    for record in stream_records(str(path), "preference", limit=200):
        prompt = record["prompt"]
        for answer in (record["chosen"], record["rejected"]):
            head, tail = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, prompt, answer)
            assert tokenizer.decode(head + tail) == prompt + answer
            assert (head[0], tail[-1], BOS in tail, EOS in head) == (BOS, EOS, False, False)
            example = completion_example(tokenizer, prompt, answer, "completion")
            assert example.tokens == head + tail and counted_tokens(example) == tail
