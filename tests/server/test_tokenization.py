"""/v1/models, /tokenize, /detokenize, /tokenizer_info"""

from __future__ import annotations

import pytest
from server_client import RunningServer
from server_fakes import BOS, EOS, MAX_MODEL_LEN, VOCAB_SIZE, ByteTokenizer, FakeEngine

HI = [{"role": "user", "content": "hi"}]


def test_models_name_the_root_and_the_context(server: RunningServer):
    answer = server.get("/v1/models").json
    assert answer["object"] == "list"
    (card,) = answer["data"]
    assert (card["id"], card["root"], card["max_model_len"]) == ("tiny-llama", "/models/tiny-llama", MAX_MODEL_LEN)
    assert (card["object"], card["parent"], card["permission"]) == ("model", None, [])
    assert server.get("/v1/models/tiny-llama").json == card


def test_the_served_name_can_be_any(serve):
    server = serve(FakeEngine(), served_model_name="org/name")
    assert server.get("/v1/models/org/name").json["id"] == "org/name"
    assert server.post("/v1/completions", {"model": "org/name", "prompt": "a"}).json["model"] == "org/name"
    assert server.post("/v1/completions", {"model": "tiny-llama", "prompt": "a"}).status == 404


def test_tokenize_counts_and_lists(server: RunningServer):
    answer = server.post("/tokenize", {"model": "tiny-llama", "prompt": "hello é", "return_token_strs": True}).json
    assert answer["tokens"] == [BOS, 259, 32, 0xC3, 0xA9]
    assert (answer["count"], answer["max_model_len"]) == (5, MAX_MODEL_LEN)
    assert answer["token_strs"][:2] == ["<s>", "hello"]
    assert server.post("/tokenize", {"prompt": "a", "add_special_tokens": False}).json["tokens"] == [97]


def test_conversations_are_tokenized_as_chat_does(server: RunningServer):
    tokens = server.post("/tokenize", {"messages": HI}).json["tokens"]
    server.post("/v1/chat/completions", {"messages": HI, "max_tokens": 1})
    assert tokens == server.engine.calls[0].prompt_token_ids


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": HI}, {"prompt": ["a"]}, {"messages": []}])
def test_tokenize_needs_one_text(server: RunningServer, body):
    assert server.post("/tokenize", body).status == 400


def test_detokenize_is_the_inverse(server: RunningServer):
    text = "hello <|user|> é\n"
    tokens = server.post("/tokenize", {"prompt": text}).json["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json == {"prompt": "<s>" + text}
    assert server.post("/detokenize", {"tokens": []}).json == {"prompt": ""}


@pytest.mark.parametrize("tokens", [None, "x", [1.5], [True], [-1], [VOCAB_SIZE], [10**30], [[1]], {}])
def test_detokenize_refuses_what_are_no_ids(server: RunningServer, tokens):
    answer = server.post("/detokenize", {"tokens": tokens})
    assert (answer.status, answer.error["param"]) == (400, "tokens")


def test_ids_of_a_padded_vocabulary_harm_nothing(server: RunningServer):
    padded = VOCAB_SIZE - 1
    assert padded >= ByteTokenizer().vocab_size
    assert server.post("/detokenize", {"tokens": [97, padded]}).json == {"prompt": "a"}
    body = {"prompt": [97, padded], "echo": True, "logprobs": 1, "max_tokens": 0}
    assert server.post("/v1/completions", body).json["choices"][0]["logprobs"]["tokens"] == ["a", f"token_id:{padded}"]


def test_the_tokenizer_introduces_itself(server: RunningServer):
    answer = server.get("/tokenizer_info").json
    assert (answer["eos_token"], answer["eos_token_ids"]) == ("</s>", [EOS])
    assert answer["vocab_size"] == ByteTokenizer().vocab_size
