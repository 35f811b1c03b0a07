"""Prompts that are chats: as lists, as JSON, as Python writes it; and texts that only look alike."""

import json

import pytest

from dynamo_jax.tasks.chat import prompt

USER = [{"role": "user", "content": 'It\'s 2+3 "?"\n\\frac12'}]
EMPTY_SYSTEM = [{"role": "system", "content": ""}, *USER]


@pytest.mark.parametrize("messages", [USER, EMPTY_SYSTEM, [*USER, {"role": "assistant", "content": "5"}, *USER]])
@pytest.mark.parametrize(
    "write", [lambda m: m, json.dumps, lambda m: json.dumps(m, indent=1), str, lambda m: f"\n {m}\n"]
)
def test_messages(messages, write):
    assert prompt(write(messages), "x", "prompt") == tuple(messages)


def test_other_keys_of_messages_are_left_out():
    text = '[{"name": null, "content": "hi", "loss": true, "role": "user"}]'
    assert prompt(text, "x", "prompt") == ({"role": "user", "content": "hi"},)


@pytest.mark.parametrize(
    "text",
    ["[1, 2] is what?", "[", "[{", "[0, 1)", '["role", "content"]', '[{"a": 1}, {"a": 2}] holds how many objects?',
     '[{"a": 1}]', "[{'x': 5}]", '{"role": "user", "content": "hi"}', "[Hint: it is even] What is 2+2?",
     "[[1, 0], [0, 1]]", "[{'" + "[" * 10_000, "\\[{x}\\]"],
)  # fmt: skip
def test_texts_that_begin_like_a_list_stay_texts(text):
    assert prompt(text, "x", "prompt") == text


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ('[{"role": "user", "content": "cut', "begins like chat messages and cannot be read"),
        ('[{"role": "user", "content": "hi"}] and more', "begins like chat messages and cannot be read"),
        ('[{"content": "hi"}]', "begins like chat messages and cannot be read"),
        ("[{'role': 'user', 'content': open('x')}]", "begins like chat messages and cannot be read"),
        ("[{'role': 'user', 'content': 'a'} {'role': 'user', 'content': 'b'}]", "begins like chat messages"),
        ('[{"role": "user", "content": ""}]', r"prompt\[0\]\.content is empty"),
        ('[{"role": "system", "content": "hi"}]', "no message with the role 'user'"),
        ('[{"role": "user", "content": null}]', r"content = None is a NoneType"),
        ([{"role": "", "content": "hi"}], r"prompt\[0\]\.role is empty"),
        ([{"role": "system", "content": None}, *USER], "content = None is a NoneType"),
        ([*USER, {"role": "assistant", "content": ""}], r"prompt\[1\]\.content is empty"),
    ],
)  # fmt: skip
def test_what_is_no_chat(value, why):
    with pytest.raises(ValueError, match=why) as error:
        prompt(value, "x.jsonl, line 3", "prompt")
    assert str(error.value).startswith("x.jsonl, line 3: prompt")
