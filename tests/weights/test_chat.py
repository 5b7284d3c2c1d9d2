"""Chat templates: the same bytes as transformers renders, and one line where a template fails."""

import sys

import pytest

from resa.reference.weights.chat import folder_special_tokens, render_chat
from resa.reference.weights.models import open_model

tokenizers = pytest.importorskip("tokenizers", reason="the extra `dev` has it")
transformers = pytest.importorskip("transformers", reason="the extra `dev` has it")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
MESSAGE = 'What is <b>5 & 6</b>?\n\t"Größe" 日本 {{ no }} </s>\n'
TEMPLATES = {
    "one line": "{{ bos_token }}{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}{{ eos_token }}",
    "indented blocks, which leave no space": """
{% if messages[0]['role'] != 'system' %}
    {{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
{% endif %}
{% for message in messages %}
    {% if loop.last %}

<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
    "tools, a namespace, dashes": """{%- set ns = namespace(found=false, last=messages | length - 1) %}
{%- if tools is not none and tools %}
    {{- raise_exception("no tools were given") }}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and message.content is string and not ns.found %}
        {%- set ns.found = true %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content.split('</think>')[-1] + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.found %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "a date": "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}",
    "JSON": "{{ messages | tojson }}{{ messages | tojson(indent=2, ensure_ascii=True) }}{{ unknown_name }}",
    "loop controls": "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}"
    "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ pad_token }}",
    "marks for training": "{% for m in messages %}\n{% generation %}\n  {{ m.content }}{% endgeneration %}{% endfor %}",
}  # fmt: skip


def by_transformers(template, message, special):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)
    messages = [{"role": "user", "content": message}]
    return theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("message", ["", MESSAGE])
def test_the_text_is_that_of_transformers(name, message):
    rendered = render_chat(TEMPLATES[name], message, SPECIAL)
    assert rendered == by_transformers(TEMPLATES[name], message, SPECIAL)
    assert rendered


def test_a_real_models_text_is_that_of_transformers():
    try:
        found = open_model("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    rendered = render_chat(found.chat_template, MESSAGE, found.special_tokens)
    assert rendered == by_transformers(found.chat_template, MESSAGE, found.special_tokens)
    assert "<|im_start|>user\nWhat is <b>5 & 6</b>?" in rendered
    tokens = found.tokenizer.encode_chat(rendered)
    assert found.tokenizer.decode(tokens) == rendered
    assert (tokens[0], tokens.count(1), tokens.count(2)) == (1, 3, 2)  # <|im_start|>, <|im_end|>


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "TemplateError: roles must"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
    ],
)
def test_a_template_that_fails_is_named(template, message):
    with pytest.raises(ValueError, match=f"chat template: got {message}.*allowed: "):
        render_chat(template.replace("\n", " "), "hi", {})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"chat template: .*pip install jinja2"):
        render_chat("{{ messages }}", "hi", {})


def test_a_folder_names_its_special_tokens(tmp_path):
    assert folder_special_tokens(tmp_path) == {}
    text = '{"bos_token": null, "eos_token": {"content": "</s>"}, "pad_token": "<p>", "add_bos_token": true, "x": "y"}'
    (tmp_path / "tokenizer_config.json").write_text(text)
    assert folder_special_tokens(tmp_path) == {"eos_token": "</s>", "pad_token": "<p>"}
