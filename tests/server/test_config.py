"""Settings are checked when they are made, not when they are used."""

from __future__ import annotations

import pytest
from server_fakes import ByteTokenizer, FakeEngine

import loongjax_server
from loongjax.errors import ConfigError
from loongjax.models.tokenizer import load_tokenizer
from loongjax_server import ServerConfig, create_app
from loongjax_server.run import listen
from tests.checkpoints import make_checkpoint


@pytest.mark.parametrize(
    "settings",
    [
        {"port": -1},
        {"port": 65536},
        {"drain_timeout_s": -1.0},
        {"drain_timeout_s": float("inf")},
        {"health_timeout_s": float("nan")},
        {"max_body_bytes": 0},
        {"num_tokenizer_threads": 0},
        {"max_num_concurrent_choices": 0},
        {"root_path": "llm"},
        {"api_key": ""},
        {"api_key": " key"},
        {"metrics_timeout_s": -1.0},
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_its_flag_and_with_a_remedy(settings):
    flag = "--" + next(iter(settings)).replace("_", "-")
    with pytest.raises(ConfigError, match=rf"{flag} .*: .+"):
        ServerConfig(**settings)


def test_the_configured_key_has_precedence_over_the_environment():
    environ = {"LOONGJAX_API_KEY": "env"}
    assert ServerConfig(api_key="own").resolve_api_key(environ) == "own"
    assert ServerConfig().resolve_api_key(environ) == "env"
    assert ServerConfig().resolve_api_key({}) is None


def test_an_empty_variable_does_not_turn_authentication_off():
    with pytest.raises(ConfigError, match=r"LOONGJAX_API_KEY is empty: give a key, or .* \(unset\)"):
        ServerConfig().resolve_api_key({"LOONGJAX_API_KEY": ""})
    assert ServerConfig(api_key="own").resolve_api_key({"LOONGJAX_API_KEY": ""}) == "own"


def test_a_missing_or_unreadable_template_is_refused_at_start(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "missing", tmp_path / "binary", tmp_path):
        with pytest.raises(ConfigError, match=r"--chat-template .* UTF-8"):
            create_app(FakeEngine(), ByteTokenizer(), ServerConfig(chat_template=path))


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ messages", r"line 1: .*end of print statement"),
        ("{% for m in messages %}\n{{ m.content }}", r"line 2: Unexpected end of template"),
        ("a\n{{ messages | to_yaml }}", r"line 2: No filter named 'to_yaml'"),
    ],
)
def test_a_template_with_a_mistake_is_refused_at_start_with_its_line(tmp_path, template, complaint):
    path = tmp_path / "chat.jinja"
    path.write_text(template)
    with pytest.raises(ConfigError, match=rf"--chat-template {path} is no Jinja template \({complaint}") as caught:
        ServerConfig(chat_template=path).check_outside()
    assert "mend it" in str(caught.value)


def test_a_template_may_use_all_that_tokenizers_know(tmp_path):
    template = (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content | tojson }}"
        "{% if m.role == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    path = tmp_path / "chat.jinja"
    path.write_text(template)
    assert ServerConfig(chat_template=path).read_chat_template() == template
    tokenizer = load_tokenizer(make_checkpoint(tmp_path / "checkpoint", "gqa"))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}] * 3, chat_template=template)
    assert tokenizer.decode(ids) == '"hi"hi"hi"hi'


def test_the_public_names_load_on_first_use():
    assert [getattr(loongjax_server, name).__name__ for name in loongjax_server.__all__] == loongjax_server.__all__
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = loongjax_server.no_such_name


def test_a_port_in_use_is_refused_before_anything_is_loaded():
    with listen(ServerConfig(port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}.*another --host or --port"):
            listen(ServerConfig(port=port))


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
        listen(ServerConfig(host="192.0.2.1", port=0))
