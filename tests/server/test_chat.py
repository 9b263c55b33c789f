"""POST /v1/chat/completions, over a real socket."""

from __future__ import annotations

import pytest
from server_client import RunningServer
from server_fakes import SCRIPT, ByteTokenizer, FakeEngine

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def prompt_text(server: RunningServer) -> str:
    """What the model was last asked."""
    return ByteTokenizer().decode(server.engine.calls[-1].prompt_token_ids, skip_special_tokens=False)


def test_a_chat_completion_has_the_schema_that_clients_parse(server: RunningServer):
    body = server.post(PATH, {"model": "tiny-llama", "messages": HI, "max_completion_tokens": 5}).json
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": SCRIPT[:5], "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["usage"]["completion_tokens"] == 5
    assert body["usage"]["prompt_tokens"] == len(server.engine.calls[0].prompt_token_ids)


def test_the_template_makes_the_prompt(server: RunningServer):
    server.post(PATH, {"messages": [{"role": "system", "content": "be brief"}, *HI], "max_tokens": 1})
    assert prompt_text(server) == "<s>[system]be brief\n[user]hi\n[assistant]"


def test_text_parts_are_joined_by_lines(server: RunningServer):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    server.post(PATH, {"messages": [{"role": "user", "content": parts, "name": "ann"}], "max_tokens": 1})
    assert prompt_text(server) == "<s>[user]one\ntwo\n[assistant]"


def test_a_developer_speaks_as_system(server: RunningServer):
    server.post(PATH, {"messages": [{"role": "developer", "content": "x"}, *HI], "max_tokens": 1})
    assert prompt_text(server).startswith("<s>[system]x")


def test_the_output_may_fill_the_context_unless_limited(serve):
    server = serve(FakeEngine(eos_after=2))
    server.post(PATH, {"messages": HI})
    assert server.engine.calls[-1].sampling.max_tokens is None
    server.post(PATH, {"messages": HI, "max_tokens": 7})
    assert server.engine.calls[-1].sampling.max_tokens == 7
    server.post(PATH, {"messages": HI, "max_tokens": 7, "max_completion_tokens": 9})
    assert server.engine.calls[-1].sampling.max_tokens == 9


def test_the_last_message_can_be_continued(server: RunningServer):
    messages = [*HI, {"role": "assistant", "content": "Well,"}]
    server.post(PATH, {"messages": messages, "continue_final_message": True, "max_tokens": 1})
    assert prompt_text(server) == "<s>[user]hi\n[assistant]Well,"


def test_the_generation_prompt_can_be_left_out(server: RunningServer):
    server.post(PATH, {"messages": HI, "add_generation_prompt": False, "max_tokens": 1})
    assert prompt_text(server) == "<s>[user]hi\n"


def test_template_variables_reach_the_template(server: RunningServer):
    server.post(PATH, {"messages": HI, "chat_template_kwargs": {"style": "terse"}, "max_tokens": 1})
    assert "[terse]" in prompt_text(server)


def test_the_operator_may_replace_the_template(serve, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    server = serve(FakeEngine(), ByteTokenizer(has_chat_template=False), chat_template=path)
    server.post(PATH, {"messages": HI, "max_tokens": 1})
    assert prompt_text(server) == "<hi>"


def test_a_model_without_template_says_so(serve):
    server = serve(FakeEngine(), ByteTokenizer(has_chat_template=False))
    answer = server.post(PATH, {"messages": HI})
    assert answer.status == 400
    assert "no chat template" in answer.error["message"]


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize(("choice", "visible"), [(None, True), ("auto", True), ("none", False)])
def test_tools_reach_the_template_unless_switched_off(server: RunningServer, choice, visible):
    answer = server.post(PATH, {"messages": HI, "tools": TOOLS, "tool_choice": choice, "max_tokens": 1})
    assert answer.status == 200
    assert ("[tools]1" in prompt_text(server)) == visible


def test_tools_that_the_template_has_no_place_for_are_told_once(serve, tmp_path, caplog):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0].content }}")
    server = serve(FakeEngine(), chat_template=template)
    for choice, num_told in (("none", 0), ("auto", 1), (None, 1)):
        body = {"messages": HI, "tools": TOOLS, "tool_choice": choice, "max_tokens": 1}
        assert server.post(PATH, body).status == 200
        told = [record.getMessage() for record in caplog.records if "no place for tools" in record.getMessage()]
        assert len(told) == num_told, choice


def test_nothing_is_told_of_tools_that_the_model_sees(server: RunningServer, caplog):
    assert server.post(PATH, {"messages": HI, "tools": TOOLS, "max_tokens": 1}).status == 200
    assert "tools" not in caplog.text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}, "x"])
def test_forced_tools_are_refused(server: RunningServer, choice):
    answer = server.post(PATH, {"messages": HI, "tools": TOOLS, "tool_choice": choice})
    assert (answer.status, answer.error["param"]) == (400, "tool_choice")


def test_tool_messages_pass_with_their_arguments_as_objects(server: RunningServer):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    server.post(PATH, {"messages": messages, "max_tokens": 1})
    assert prompt_text(server) == "<s>[user]hi\n[assistant]\n[tool]42\n[assistant]"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        [{"role": "wizard", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
        [{"role": "user", "content": [{"type": "input_audio"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": [{}]}],
        [{"role": "tool", "content": ""}],
        ["x"],
        "x",
    ],
)
def test_messages_that_cannot_be_honoured_are_refused(server: RunningServer, messages):
    answer = server.post(PATH, {"messages": messages})
    assert (answer.status, answer.error["param"]) == (400, "messages")


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "add_generation_prompt"])
def test_template_variables_may_not_replace_arguments(server: RunningServer, name):
    answer = server.post(PATH, {"messages": HI, "chat_template_kwargs": {name: "x"}})
    assert (answer.status, answer.error["param"]) == (400, "chat_template_kwargs")


def test_logprobs_list_token_bytes_and_alternatives(server: RunningServer):
    body = {"messages": HI, "max_tokens": 1, "logprobs": True, "top_logprobs": 2}
    logprobs = server.post(PATH, body).json["choices"][0]["logprobs"]
    assert logprobs["content"] == [
        {
            "token": "T",
            "logprob": -0.84,
            "bytes": [84],
            "top_logprobs": [
                {"token": "a", "logprob": -1.0, "bytes": [97]},
                {"token": "b", "logprob": -2.0, "bytes": [98]},
            ],
        }
    ]


def test_bytes_of_split_characters_are_exact(serve):
    server = serve(FakeEngine("中"))
    body = {"messages": HI, "max_tokens": 3, "logprobs": True}
    choice = server.post(PATH, body).json["choices"][0]
    assert choice["message"]["content"] == "中"
    assert b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"]).decode() == "中"


@pytest.mark.parametrize(
    "field", [{"echo": True}, {"add_special_tokens": True}, {"modalities": ["text", "audio"]}, {"functions": [{}]}]
)
def test_fields_of_other_apis_are_refused(server: RunningServer, field):
    answer = server.post(PATH, {"messages": HI, **field})
    assert (answer.status, answer.error["param"]) == (400, next(iter(field)))


def test_fields_that_ask_for_nothing_pass(server: RunningServer):
    body = {"messages": HI, "echo": False, "add_special_tokens": False, "modalities": ["text"], "max_tokens": 1}
    assert server.post(PATH, body).status == 200


def test_top_logprobs_need_logprobs(server: RunningServer):
    answer = server.post(PATH, {"messages": HI, "top_logprobs": 2})
    assert (answer.status, answer.error["param"]) == (400, "top_logprobs")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs must be from 0 to 20, got 21"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "max_completion_tokens must be at least 0, got -1"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens must be at least 0, got -1"),
        ({"temperature": -1}, "temperature", "temperature must be at least 0.0, got -1.0"),
    ],
)
def test_what_is_out_of_range_is_named_as_it_was_sent(server: RunningServer, fields, param, message):
    answer = server.post(PATH, {"messages": HI, **fields})
    assert (answer.status, answer.error["param"], answer.error["message"]) == (400, param, message)


def test_prompt_logprobs_and_token_ids_stand_beside_the_choices(server: RunningServer):
    body = {"messages": HI, "max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True}
    answer = server.post(PATH, body).json
    assert answer["prompt_token_ids"] == server.engine.calls[0].prompt_token_ids
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])
    assert answer["prompt_logprobs"][0] is None
    assert answer["choices"][0]["token_ids"] == [ord("T")]
