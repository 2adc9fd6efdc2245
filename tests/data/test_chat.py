import json
from pathlib import Path

import pytest

from rlhf_jax.data.chat import encode_chat, encode_prompt_messages, render
from rlhf_jax.data.tokenizer import load_tokenizer, train_tokenizer
from rlhf_jax.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
MARKED = (FIXTURES / "chatml_marked.jinja").read_text(encoding="utf-8")


def chats(name):
    return json.loads((FIXTURES / name / "reference.json").read_text(encoding="utf-8"))["chats"]


def with_template(template, name="qwen"):
    return load_tokenizer(FIXTURES / name, chat_template=template)


@pytest.mark.parametrize("name", ["qwen", "llama3", "llama2"])
def test_text_and_ids_are_those_of_transformers(name):
    tokenizer = load_tokenizer(FIXTURES / name)
    for chat in chats(name):
        if "error" in chat:
            with pytest.raises(UserError, match="the chat template refuses the conversation"):
                render(tokenizer, chat["messages"], False)
            continue
        assert render(tokenizer, chat["messages"], chat["prompt"]) == chat["text"]
        assert encode_chat(tokenizer, chat["messages"], chat["prompt"])[0] == chat["ids"]
        if chat["prompt"]:
            assert encode_prompt_messages(tokenizer, chat["messages"]) == chat["ids"]


@pytest.mark.parametrize("name, template", [("llama3", None), ("qwen", None), ("qwen", MARKED)])
def test_masks_are_those_of_transformers(name, template):
    # The reference for "qwen" is of the marked template: turn-by-turn rendering finds the same tokens without marks.
    tokenizer = load_tokenizer(FIXTURES / name, chat_template=template)
    for chat in chats(name):
        ids, mask = encode_chat(tokenizer, chat["messages"], chat["prompt"])
        assert (ids, mask) == (chat["ids"], chat["mask"])
        assert any(mask) == any(m["role"] == "assistant" for m in chat["messages"])


def spoken(ids, mask):
    return [i for i, m in zip(ids, mask, strict=True) if m]


@pytest.mark.parametrize("name", ["llama3", "qwen", "llama2"])
def test_every_turn_of_the_assistant_ends_with_its_stop_token(name):
    tokenizer = load_tokenizer(FIXTURES / name)
    ids, mask = encode_chat(tokenizer, [*HELLO, *HELLO, *HELLO])
    ends = [ids[i] for i in range(len(ids)) if mask[i] and not [*mask, 0][i + 1]]
    assert ends == [tokenizer.eos_id] * 3
    one = spoken(*encode_chat(tokenizer, HELLO))
    assert spoken(ids, mask) == one * 3
    assert tokenizer.decode(one).strip() == "Hi"


def test_generation_marks_beat_a_template_that_changes_its_past():
    forgets = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<|im_start|>(old){% else %}"
        "<|im_start|>MARK{{ m.content }}END{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    plain = with_template(forgets.replace("MARK", "").replace("END", ""))
    assert sum(encode_chat(plain, HELLO)[1]) == len(plain.encode("Hi")) + 1
    with pytest.raises(UserError, match=r"once message 2 follows.*put \{% generation %\}.*loss_on=\"all\""):
        encode_chat(plain, [*HELLO, *HELLO])
    marked = with_template(forgets.replace("MARK", "{% generation %}").replace("END", "{% endgeneration %}"))
    ids, mask = encode_chat(marked, [*HELLO, *HELLO])
    assert marked.decode(spoken(ids, mask)) == "HelloHelloHi"


def test_a_prompt_that_merges_into_the_answer_is_refused():
    # The answer's first token would not be one that generation, which continues the prompt's tokens, can give.
    merging = with_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    word = next(w for i in range(256, 400) if (w := merging.token_bytes(i).decode()).isalpha())
    messages = [{"role": "user", "content": word[:1]}, {"role": "assistant", "content": word[1:]}]
    assert len(merging.encode(word)) == 1
    with pytest.raises(UserError, match="renders a conversation's beginning differently"):
        encode_chat(merging, messages)


def test_a_token_that_straddles_the_beginning_of_a_generation_block_counts():
    word = next(w for i in range(256, 400) if (w := with_template("x").token_bytes(i).decode()).isalpha())
    marked = with_template(f"{word}{word[0]}{{% generation %}}{word[1:]}{{% endgeneration %}}{word}")
    assert encode_chat(marked, HELLO) == (marked.encode(word * 3), [0, 1, 0])


def test_masks_without_a_special_token_cover_the_whole_turn():
    plain = with_template(
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
        + "{{ 'assistant:\n' if add_generation_prompt }}"
    )
    ids, mask = encode_chat(plain, [*HELLO])
    assert plain.decode(spoken(ids, mask)) == "Hi\n"


@pytest.mark.parametrize("answer", ["{{ m.content }}</s>", "{% generation %}{{ m.content }}</s>{% endgeneration %}"])
def test_our_own_tokenizer_chats_too(answer, tmp_path):
    train_tokenizer(["user assistant Hello Hi é\n" * 50, "def f(x):\n    return x\n" * 20], tmp_path / "t.model", 300)
    template = "{% for m in messages %}<s>{{ m.role }}:{% if m.role == 'user' %}{{ m.content }}"
    prompt = "{% else %}ANSWER{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
    tokenizer = load_tokenizer(tmp_path / "t.model", template + prompt.replace("ANSWER", answer))
    ids, mask = encode_chat(tokenizer, [HELLO[0], {"role": "assistant", "content": "Hi é🎉\u2581 x"}])
    head = encode_prompt_messages(tokenizer, [HELLO[0]])
    assert head == ids[: len(head)] and head[0] == tokenizer.bos_id
    assert tokenizer.decode(spoken(ids, mask)) == "Hi é🎉\u2581 x"
    assert spoken(ids, mask) == [*tokenizer.encode("Hi é🎉\u2581 x"), tokenizer.eos_id]
    assert mask == [0] * len(head) + [1] * (len(ids) - len(head) - 1) + [0]  # the newline after </s> is not generated


def test_templates_get_what_transformers_gives():
    def text(template, messages=HELLO, name="llama3"):
        return render(with_template(template, name), messages, False)

    assert text("{{ bos_token }}{{ eos_token }}") == "<|begin_of_text|><|eot_id|>"
    assert text("{{ bos_token }}|", name="qwen") == "|"  # none declared
    assert text("{% if tools is none %}none{% endif %}") == "none"
    assert text("{{ messages[0] | tojson }}") == '{"role": "user", "content": "Hello"}'
    assert text("{{ '<é>' | tojson }}{{ {'b': 1, 'a': 2} | tojson(indent=1) }}") == '"<é>"{\n "b": 1,\n "a": 2\n}'
    assert text("{{ strftime_now('%Y') | length }}") == "4"
    assert text("  {% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\nx{% endfor %}") == "x"
    assert (
        text("{% set ns = namespace(n=0) %}{% for i in range(9) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}")
        == "36"
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]
    assert text("{{ messages[0].content[0].text }}{{ 'name' in messages[0] }}", parts) == "aFalse"


@pytest.mark.parametrize(
    "messages, problem",
    [
        ("Hello", "a conversation is str, not a list"),
        (["Hello"], "message 1 is str, not an object"),
        ([{"content": "x"}], "message 1 has no role"),
        ([HELLO[0], {"role": "assistant"}], r"message 2 \(assistant\) has no content"),
        ([{"role": "user", "content": 3}], "has no content: give a string"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "more than JSON values"),
        ([{"role": "user", "content": "\ufdd0"}], "noncharacter"),
        ([{"role": "assistant", "content": "x"}], "refuses the conversation .A conversation starts with"),
    ],
)
def test_malformed_messages_are_refused(messages, problem):
    with pytest.raises(UserError, match=problem) as error:
        encode_chat(load_tokenizer(FIXTURES / "llama3"), messages)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template, problem",
    [
        ("{{ messages.__class__.__mro__ }}", "is unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "is unsafe"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "is unsafe"),
        ("{{ range(10**9) | list }}", "loops or grows"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "loops or grows"),
        ("{{ 'a' * 99999 * 99999 }}", "loops or grows"),
        ("{{ 9 ** 9 ** 9 }}", "loops or grows"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "loops or grows"),
        ("{% if %}", "no valid Jinja .line 1"),
        ("{% generation %}", "no valid Jinja"),
        ("{{ messages[0]['content'] + 1 }}", "fails on the conversation"),
        ("{{ messages[7].content.x }}", "refuses the conversation"),
        ("{% include '/etc/passwd' %}", "fails on the conversation|refuses|no loader"),
    ],
)
def test_unsafe_and_broken_templates_are_refused(template, problem):
    with pytest.raises(UserError, match=problem) as error:
        encode_chat(with_template(template), HELLO)
    assert "\n" not in str(error.value)


def test_no_template_says_how_to_give_one():
    with pytest.raises(UserError, match="no chat template.*chat_template.jinja.*field tokenizer"):
        encode_chat(load_tokenizer(FIXTURES / "gpt2"), HELLO)


def test_an_empty_rendering_still_starts():
    tokenizer = with_template("{# nothing #}")
    assert encode_prompt_messages(tokenizer, HELLO) == [tokenizer.start_id]
