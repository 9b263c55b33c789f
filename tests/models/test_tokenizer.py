"""Text, ids and conversations, on a byte-level tokenizer whose ids are known by construction."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.errors import CheckpointError, RequestError
from loongjax.models.tokenizer import Tokenizer, load_tokenizer
from tests.checkpoints import SPECIAL_TOKENS, make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "gqa")


@pytest.fixture(scope="module")
def tokenizer(checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@given(st.text())
def test_no_text_is_too_strange_to_encode(tokenizer, text):
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in tokenizer.encode(text))


def test_special_tokens_are_added_only_when_asked_for(tokenizer):
    with_bos, without = (tokenizer.encode("hello", add_special_tokens=added) for added in (True, False))
    assert with_bos == [0, *without]


def test_special_tokens_are_left_out_of_text_only_when_asked_for(tokenizer):
    ids = tokenizer.encode("hello the world")
    assert tokenizer.decode(ids) == "<s>hello the world"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello the world"


def test_ids_beyond_the_tokenizer_are_empty_text(tokenizer):
    ids = tokenizer.encode("hello", add_special_tokens=False)
    beyond = [tokenizer.vocab_size, 319, 2**40, -1]
    assert tokenizer.decode([*beyond, *ids, *beyond]) == "hello"
    assert tokenizer.decode(beyond) == ""
    assert tokenizer.convert_ids_to_tokens(beyond) == [""] * 4


def test_half_a_character_is_the_replacement_character(tokenizer):
    ids = tokenizer.encode("é", add_special_tokens=False)
    assert len(ids) == 2
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_the_vocabulary_counts_added_tokens(tokenizer):
    assert tokenizer.vocab_size == 284
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.all_special_ids >= {0, 1}


def test_tokens_are_spelled_as_in_the_vocabulary(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" the", add_special_tokens=False)) == ["Ġthe"]


def test_a_conversation_is_rendered_by_the_template_and_encoded_once(tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    body = [0, 2, *tokenizer.encode("be brief", False), 1, 3, *tokenizer.encode("hi", False), 1]
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(messages) == [*body, 4]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == body


def test_a_template_given_with_the_request_wins(tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], chat_template="{{ messages[0].content }}!")
    assert tokenizer.decode(ids) == "hi!"


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('roles must alternate') }}", "{{ 1 + '1' }}"])
def test_a_template_that_fails_is_the_requests_fault(tokenizer, template):
    with pytest.raises(RequestError, match="chat template") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], chat_template=template)
    assert caught.value.param == "messages"


def test_without_a_template_conversations_are_refused(tmp_path):
    make_checkpoint(tmp_path, "gqa")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("template", "takes_tools"),
    [
        ("{{ messages[0].content }}", False),
        ("{% if tools %}{{ tools | tojson }}{% endif %}", True),
        ([{"name": "default", "template": "a"}, {"name": "tool_use", "template": "{{ tools }}"}], True),
        ([{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}], False),
        (None, False),
    ],
)
def test_a_template_that_names_tools_takes_them(tmp_path, template, takes_tools):
    make_checkpoint(tmp_path, "gqa")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    assert load_tokenizer(tmp_path).takes_tools == takes_tools


def test_a_long_text_is_encoded_without_a_word(tmp_path):
    make_checkpoint(tmp_path, "gqa")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 8}))
    program = "from loongjax.models.tokenizer import load_tokenizer; "
    program += f"print(len(load_tokenizer({str(tmp_path)!r}).encode('the ' * 20)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) > 8
    assert done.stderr == ""


def test_a_missing_folder_is_refused_at_once(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_tokenizer(tmp_path / "meta-llama" / "Llama-2-7b-hf")


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    make_checkpoint(tmp_path, "gqa", with_tokenizer=False)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path):
    (make_checkpoint(tmp_path, "gqa") / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_config_that_transformers_refuses_first_is_told_in_our_words(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0}
    make_checkpoint(tmp_path, "gqa", overrides={"rope_parameters": rope})
    with pytest.raises(CheckpointError, match="rope type 'longrope' is not supported; those that are: default"):
        load_tokenizer(tmp_path)
