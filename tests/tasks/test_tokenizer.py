"""Tokenizers of Hugging Face folders: ids, stop tokens, chat templates, and folders that hold none."""

import json
import shutil
from datetime import UTC, datetime

import pytest

from dynamo_jax.config.checks import TEMPLATE_OWN
from dynamo_jax.tasks.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["<unk>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>", "1", "2", "3", "+", "=", "user", "assistant", "of"]
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


@pytest.fixture
def make_folder(tmp_path):
    """Makes a folder with a word-level tokenizer; a word's id is its place in WORDS."""
    import tokenizers
    import transformers

    def make(template=CHATML, specials=None, generation_config=None, config=None):
        model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")  # noqa: S106
        inner = tokenizers.Tokenizer(model)
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        named = {"unk_token": "<unk>", "eos_token": "<eos>"} if specials is None else specials
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **named)
        fast.chat_template = template
        fast.save_pretrained(tmp_path / "model")
        if generation_config is not None:
            (tmp_path / "model" / "generation_config.json").write_text(generation_config)
        if config is not None:
            (tmp_path / "model" / "config.json").write_text(config)
        return tmp_path / "model"

    return make


def test_ids_of_a_chat_tokenizer(make_folder):
    tokenizer = load_tokenizer(make_folder())
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.size) == (1, 1, 13)  # no pad token: the end-of-sequence token
    assert tokenizer.stop_ids == (1, 4)
    assert tokenizer.encode("1 + 2") == [5, 8, 6]
    assert tokenizer.decode([5, 8, 6, 4, 1]) == "1 + 2"
    assert tokenizer.render_chat([{"role": "user", "content": "1 + 2"}]) == (
        "<|im_start|>user\n1 + 2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_ids_without_a_token_are_marked(tmp_path):
    """Beyond the last token, and in a gap among them: left out, "1 2" would be read where "1 ? 2" was sampled."""
    import tokenizers
    import transformers

    words = {word: i for i, word in enumerate(WORDS)} | {"7": 20}  # no token has ids 13 to 19
    model = tokenizers.models.WordLevel(words, unk_token="<unk>")  # noqa: S106
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<unk>", "<eos>"])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>")  # noqa: S106
    wrapped.save_pretrained(tmp_path / "holes")
    tokenizer = load_tokenizer(tmp_path / "holes")
    assert tokenizer.size == 21
    assert tokenizer.decode([20, 8, 6]) == "7 + 2"
    assert tokenizer.decode([5, 13, 20, 19, 19, 21, 6, 1]) == "1\ufffd7\ufffd\ufffd\ufffd2"
    assert tokenizer.decode([13]) == tokenizer.decode([21]) == tokenizer.decode([2**31 - 1]) == "\ufffd"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    ("template", "generation_config", "stop_ids"),
    [
        (CHATML, '{"eos_token_id": 2}', (1, 2, 4)),
        (CHATML, '{"eos_token_id": [4, 1, 2]}', (1, 4, 2)),
        (CHATML, '{"do_sample": false}', (1, 4)),
        (None, None, (1,)),
        ("{% for m in messages %}{{ m.content }} 1 {% endfor %}", None, (1,)),  # a plain token follows the answer
        ("{% for m in messages %}[{{ m.role }}] {{ m.content }} <eos>{% endfor %}", None, (1,)),
        ("{{ raise_exception('no assistant messages') }}", None, (1,)),
    ],
)
def test_stop_ids(make_folder, template, generation_config, stop_ids):
    assert load_tokenizer(make_folder(template, generation_config=generation_config)).stop_ids == stop_ids


CONFIGS = [
    ('{"eos_token_id": 2}', (1, 2)),
    ('{"eos_token_id": [2, 1, 7, 2]}', (1, 2, 7)),
    ('{"eos_token_id": 0}', (1, 0)),  # the first token of the vocabulary is one, too
    ('{"eos_token_id": []}', (1,)),
    ('{"eos_token_id": null}', (1,)),
    ('{"bos_token_id": 2, "pad_token_id": 3}', (1,)),
    ('{"text_config": {"eos_token_id": [7, 8]}}', (1, 7, 8)),
    ('{"eos_token_id": null, "text_config": {"eos_token_id": 7}}', (1, 7)),
    ('{"eos_token_id": 2, "text_config": {"eos_token_id": 7}}', (1, 2)),
    ('{"decoder": {"eos_token_id": 3}}', (1, 3)),
    ('{"model_type": "qwen2", "eos_token_id": [2, 3]}', (1, 2, 3)),
    ('{"vision_config": {"eos_token_id": 3}, "text_config": {}}', (1,)),
]


@pytest.mark.parametrize(("config", "stop_ids"), CONFIGS)
def test_stop_ids_of_the_models_config(make_folder, config, stop_ids):
    """What transformers generates with, beside the tokenizer's own end of sequence."""
    import transformers

    folder = make_folder(template=None)
    (folder / "config.json").write_text(config)
    assert load_tokenizer(folder).stop_ids == stop_ids
    theirs = transformers.GenerationConfig.from_pretrained(
        folder, config_file_name="config.json", _from_model_config=True
    ).eos_token_id
    assert {1, *(theirs if isinstance(theirs, list) else [] if theirs is None else [theirs])} == set(stop_ids)


@pytest.mark.parametrize(
    ("generation_config", "stop_ids"), [('{"eos_token_id": 2}', (1, 2)), ('{"do_sample": true}', (1,)), ("{}", (1,))]
)
def test_generation_config_is_instead_of_config(make_folder, generation_config, stop_ids):
    folder = make_folder(template=None, generation_config=generation_config, config='{"eos_token_id": [7, 8]}')
    assert load_tokenizer(folder).stop_ids == stop_ids


@pytest.mark.parametrize(
    ("files", "stop_ids"),
    [
        ({}, (1, 2)),
        ({"config.json": '{"eos_token_id": [7, 2]}'}, (1, 2, 7)),
        ({"config.json": '{"eos_token_id": 7}', "generation_config.json": '{"eos_token_id": [8, 1]}'}, (1, 2, 8)),
        ({"generation_config.json": "{}", "config.json": '{"eos_token_id": 7}'}, (1, 2)),
    ],
)
def test_a_policy_from_another_folder_ends_its_answers_as_it_was_taught(make_folder, tmp_path, files, stop_ids):
    folder = make_folder(template=None, config='{"eos_token_id": 2}')
    (tmp_path / "policy").mkdir()
    for name, text in files.items():
        (tmp_path / "policy" / name).write_text(text)
    assert load_tokenizer(folder, policy_folder=tmp_path / "policy").stop_ids == stop_ids
    assert load_tokenizer(folder, policy_folder=folder).stop_ids == (1, 2)
    assert load_tokenizer(folder, policy_folder=str(tmp_path / "gone")).stop_ids == (1, 2)  # others say that it is


def test_pad_token_of_the_tokenizer(make_folder):
    specials = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    assert load_tokenizer(make_folder(specials=specials)).pad_id == 2


def test_no_end_of_sequence_token(make_folder):
    with pytest.raises(ValueError, match=r"model: the tokenizer has no end-of-sequence token.*tokenizer_config\.json"):
        load_tokenizer(make_folder(specials={"unk_token": "<unk>"}))


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("of_policy", [False, True])
def test_broken_stop_ids(make_folder, tmp_path, name, of_policy):
    folder = make_folder()
    other = tmp_path / "policy" if of_policy else folder
    other.mkdir(exist_ok=True)
    for text, message in (
        ("{", r"cannot be read: .*Copy it again"),
        ("[1, 2]", r"holds a list, not a JSON object.*Copy it again"),
        ('{"eos_token_id": "x"}', r'eos_token_id = "x" is neither an id nor a list of ids'),
        ('{"eos_token_id": "2"}', r'eos_token_id = "2" is neither'),
        ('{"eos_token_id": true}', r"eos_token_id = true is neither"),
        ('{"eos_token_id": 2.0}', r"eos_token_id = 2\.0 is neither"),
        ('{"eos_token_id": -1}', r"eos_token_id = -1 is neither"),
        ('{"eos_token_id": 2147483648}', r"eos_token_id = 2147483648 is neither"),
        ('{"eos_token_id": [2, null]}', r"eos_token_id = \[2, null\] is neither"),
        ('{"eos_token_id": [[2]]}', r"eos_token_id = \[\[2\]\] is neither"),
        ('{"eos_token_id": {"0": 2}}', r'eos_token_id = \{"0": 2\} is neither'),
        ('{"model_type": "qwen2", "eos_token_id": "x"}', r'eos_token_id = "x" is neither'),
    ):
        (other / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{other.name}/{name}: {message}"):
            load_tokenizer(folder, policy_folder=other)
    if name == "config.json":
        (other / name).write_text('{"text_config": {"eos_token_id": "x"}}')
        with pytest.raises(ValueError, match=r'config\.json: text_config\.eos_token_id = "x" is neither'):
            load_tokenizer(folder, policy_folder=other)


def test_chat_template_errors(make_folder):
    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]
    with pytest.raises(ValueError, match=r"model: .* no chat template\. Set task\.chat_template=false"):
        load_tokenizer(make_folder(template=None)).render_chat(messages)
    tokenizer = load_tokenizer(make_folder(template=NO_SYSTEM))
    assert tokenizer.stop_ids == (1, 4)
    with pytest.raises(ValueError, match=r"roles \['system', 'user'\]: no system role\. .* task\.system_prompt"):
        tokenizer.render_chat(messages)


# --- values for the variables of a template, and today's date

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
USER = [{"role": "user", "content": "1 + 2"}]
ASKED = "<|im_start|>user\n1 + 2<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "values", "rendered"),
    [
        (THINKING, None, ASKED),
        (THINKING, {}, ASKED),
        (THINKING, {"enable_thinking": True}, ASKED),
        (THINKING, {"enable_thinking": False}, ASKED + "<think>\n\n</think>\n\n"),
        (THINKING, {"enable_thinking": None}, ASKED + "<think>\n\n</think>\n\n"),  # set, if to nothing
        ("{{ effort }}", {"effort": "high"}, "high"),
        ("{{ budget + 1 }}{{ share }}", {"budget": 3, "share": 0.5}, "40.5"),
        ("{{ names | join('+') }} {{ nested.a.b[1] }}", {"names": ["x", "y"], "nested": {"a": {"b": [1, 2]}}}, "x+y 2"),
        ("{{ documents_wanted | tojson }}", {"documents_wanted": None}, "null"),
        ("{{ eos_token }}", {"eos_token": "</s>"}, "</s>"),  # before the tokenizer's own
    ],
)
def test_values_reach_the_template(make_folder, caplog, template, values, rendered):
    tokenizer = load_tokenizer(make_folder(template=template), chat_template_kwargs=values)
    assert tokenizer.render_chat(USER) == tokenizer.render_chat(USER) == rendered
    assert not caplog.messages


def test_values_decide_the_end_of_turn(make_folder):
    """A template may end a turn otherwise by such a value; one that it cannot take tells nothing about the end."""
    ends = CHATML.replace("<|im_end|>", "{{ '<pad>' if short else '<|im_end|>' }}")
    folder = make_folder(ends, {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"})
    assert load_tokenizer(folder).stop_ids == (1, 4)
    assert load_tokenizer(folder, chat_template_kwargs={"short": True}).stop_ids == (1, 2)


def test_values_that_the_template_cannot_take(make_folder, caplog):
    folder = make_folder("{{ budget + 1 }}{% if stop %}{{ raise_exception('no stop') }}{% endif %}" + CHATML)
    for values, why in (
        ({"budget": "3"}, r"can only concatenate str"),
        ({}, r"'budget' is undefined"),
        ({"budget": 3, "stop": True}, "no stop"),
        ({"budget": [1]}, "list"),
    ):
        tokenizer = load_tokenizer(folder, chat_template_kwargs=values)
        with pytest.raises(ValueError, match=rf"roles \['user'\].*: .*{why}.*Change them") as caught:
            tokenizer.render_chat(USER)
        assert (f"task.chat_template_kwargs = {json.dumps(values)}" in str(caught.value)) is bool(values)
    assert not caplog.messages


def test_names_that_transformers_takes_for_itself_are_known():
    """The config refuses them: each parameter on the way to a template, and what every template can call."""
    import inspect

    import transformers
    from transformers.utils import chat_template_utils

    def names(function):
        return {p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD}

    own = names(transformers.PreTrainedTokenizerBase.apply_chat_template)
    own |= names(chat_template_utils.render_jinja_template)
    own |= chat_template_utils._compile_jinja_template("").environment.globals.keys()
    assert "strftime_now" in own
    assert own <= TEMPLATE_OWN


@pytest.mark.parametrize("template", [CHATML, {"default": THINKING, "tool_use": CHATML}])
def test_a_variable_that_the_template_does_not_have_is_told_of(make_folder, caplog, template):
    tokenizer = load_tokenizer(make_folder(template), chat_template_kwargs={"enable_thinkng": False, "tool": 1})
    assert tokenizer.render_chat(USER) == ASKED
    first, second = caplog.messages
    assert "model: its chat template has no variable enable_thinkng, which task.chat_template_kwargs sets" in first
    assert "no variable tool," in second


DATED = [
    "{{ strftime_now('%d %b %Y') }}",
    "\n  {% if strftime_now is defined %}\n  {%- set date_string = strftime_now('%Y-%m-%d %H:%M:%S') %}\n"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}\n {{ date_string }} \n\n",
    "   {% macro date(of) %}{{ strftime_now(of) }}{% endmacro %}{{ date('%A') }}{{ date('100%% %B') }}\n",
    "{# a comment #}\n{% set f = ['%d', '%m'] %}{% for x in f %}{{ strftime_now(x ~ '/') }}{% endfor %}",
    "{{- strftime_now(format='%j') -}}   \n{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}\n",
]


@pytest.fixture
def clock(monkeypatch):
    """Sets the time that transformers reads for a template."""
    from transformers.utils import chat_template_utils

    def set_to(moment):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return moment

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_to


@pytest.mark.parametrize("template", DATED)
def test_the_date_of_the_run_is_that_of_its_start(make_folder, clock, template):
    """The text is what the clock gives at that moment, at any later time, beside a tokenizer that reads the clock."""
    folder, start, later = make_folder(template), datetime(2026, 11, 27, 23, 59, 58), datetime(2027, 1, 2, 3, 4, 5)
    clock(start)
    expected = load_tokenizer(folder).render_chat(USER)
    fixed = load_tokenizer(folder, now=start)
    assert fixed.render_chat(USER) == expected
    clock(later)
    by_clock = load_tokenizer(folder)
    assert by_clock.render_chat(USER) != expected
    again = load_tokenizer(folder, now=start)
    assert fixed.render_chat(USER) == again.render_chat(USER) == expected
    assert load_tokenizer(folder, now=later).render_chat(USER) == by_clock.render_chat(USER) != expected
    assert fixed.render_chat(USER) == expected  # two moments at once
    assert (fixed.stop_ids, fixed.eos_id) == (by_clock.stop_ids, by_clock.eos_id)


def test_a_moment_changes_nothing_else(make_folder, clock):
    start = datetime(2026, 11, 27, tzinfo=UTC)
    folder = make_folder(THINKING)
    tokenizer = load_tokenizer(folder, now=start, chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.render_chat(USER) == ASKED + "<think>\n\n</think>\n\n"
    assert tokenizer.stop_ids == (1, 4)
    # As in Llama 3.1: a date of the user's own comes before today's.
    today = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y %Z') %}{% endif %}"
    folder = make_folder(today + "{{ date_string }}")
    assert load_tokenizer(folder, now=start).render_chat(USER) == "27 Nov 2026 UTC"
    own = load_tokenizer(folder, now=start, chat_template_kwargs={"date_string": "26 Jul 2024"})
    assert own.render_chat(USER) == "26 Jul 2024"


def test_folder_without_a_tokenizer(tmp_path):
    def message(folder):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller reads the message
            load_tokenizer(folder)
        assert str(error.value).startswith(f"{folder}: ")
        assert "Point task.tokenizer at a folder" in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such folder" in message(tmp_path / "Qwen" / "Qwen2.5-Math-1.5B")
    (tmp_path / "file").write_text("x")
    assert "is a file, not a folder" in message(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "holds no readable tokenizer" in message(tmp_path / "empty")
    # transformers itself makes a tokenizer without a single word out of this one
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert "a tokenizer without a vocabulary" in message(tmp_path / "config")
    (tmp_path / "config" / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": "wide"}))
    assert "hidden_size" in message(tmp_path / "config")


@pytest.mark.parametrize("text", ["{}", "[]", '{"version": "1.0", ', '{"model": 3, "added_tokens": []}'])
def test_damaged_tokenizer_file(make_folder, text):
    folder = make_folder()
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"model: holds no readable tokenizer: .* Point task\.tokenizer"):
        load_tokenizer(folder)


@pytest.mark.shared
def test_qwen(shared, tmp_path):
    folder = shared / "data/qwen2.5-math-1.5b"
    tokenizer = load_tokenizer(folder)
    im_end = tokenizer.encode("<|im_end|>")
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.size) == (151643, 151643, 151665)
    assert tokenizer.stop_ids == (151643, *im_end) == (151643, 151645)
    text = "so  x = \\frac{1}{2} , and 你好 🙂 .\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode("ab"), *im_end, 151643]) == "ab"
    four, five = tokenizer.encode("4"), tokenizer.encode("5")
    assert tokenizer.decode([*four, 151665, *five, 151934, 151935]) == "4\ufffd5\ufffd\ufffd"  # of 151936 in the policy
    half = tokenizer.encode("🙂")[:1]  # bytes that only the next token would complete
    assert tokenizer.decode([*half, 151665, *tokenizer.encode("🙂")]) == tokenizer.decode(half) + "\ufffd🙂"
    rendered = tokenizer.render_chat([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    assert rendered == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"

    for name in ("config.json", "tokenizer_config.json", "merges.txt"):  # vocab.json is missing
        shutil.copy(folder / name, tmp_path / name)
    with pytest.raises(ValueError, match="holds no readable tokenizer"):
        load_tokenizer(tmp_path)
