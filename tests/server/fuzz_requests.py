"""Requests that no client in its right mind sends, and all that one might."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from loongjax_server.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

BODIES = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 2**31, 2**63, -(2**63) - 1, 10**100, 1e308, 5e-324, float("nan"), float("inf"), -0.0])
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", "\x00", "text", "user", "none", "auto", "</s>", "\U0010ffff"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(["type", "text", "role", "content"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def nearly_right_requests(draw) -> tuple[str, bytes]:
    """A path, and a body that is right but for a few fields."""
    path = draw(st.sampled_from(sorted(BODIES)))
    body: dict[str, object] = {"max_tokens": 2}
    if path == "/detokenize":
        body["tokens"] = [1]
    elif path == "/v1/chat/completions":
        body["messages"] = [{"role": "user", "content": "a"}]
    else:
        body["prompt"] = "a"
    fields = st.sampled_from(sorted(BODIES[path].model_fields)) | st.text(max_size=8)
    body.update(draw(st.dictionaries(fields, VALUES, max_size=3)))
    data = json.dumps(body).encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 3)) :]
    return path, data


def well_formed_requests(vocab_size: int) -> st.SearchStrategy[tuple[str, dict[str, object]]]:
    """A path, and a body that a server must answer, with values at the ends of what is allowed; 48 tokens at most."""
    return st.one_of(_completions(vocab_size), _chats(vocab_size))


@st.composite
def _completions(draw, vocab_size: int) -> tuple[str, dict[str, object]]:
    token_ids = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=40)
    texts = st.text(min_size=1, max_size=8)
    prompts = texts | token_ids | st.lists(texts, min_size=1, max_size=2) | st.lists(token_ids, min_size=1, max_size=2)
    body = {"prompt": draw(prompts), **draw(_sampling(vocab_size))}
    body |= draw(st.fixed_dictionaries({}, optional={"logprobs": st.integers(0, 20), "echo": st.booleans()}))
    return "/v1/completions", _consistent(body)


@st.composite
def _chats(draw, vocab_size: int) -> tuple[str, dict[str, object]]:
    message = st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": st.text(max_size=4)})
    body = {"messages": draw(st.lists(message, min_size=1, max_size=2)), **draw(_sampling(vocab_size))}
    if draw(st.booleans()):
        body |= {"logprobs": True, "top_logprobs": draw(st.integers(0, 20))}
    return "/v1/chat/completions", _consistent(body)


def _sampling(vocab_size: int) -> st.SearchStrategy[dict[str, object]]:
    token_ids = st.integers(0, vocab_size - 1)
    biases = st.sampled_from([-100.0, -1.0, 0.0, 5.0, 100.0])
    return st.fixed_dictionaries(
        {"max_tokens": st.integers(0, 8), "stream": st.booleans()},
        optional={
            "n": st.integers(1, 2),
            "temperature": st.sampled_from([0, 5e-324, 1e-30, 0.5, 1, 2.0, 1e30, 1.7e308]),
            "top_p": st.sampled_from([5e-324, 1e-9, 0.5, 1]),
            "top_k": st.sampled_from([-1, 0, 1, 5, vocab_size, 2**63 - 1]),
            "min_p": st.sampled_from([0, 5e-324, 0.1, 1]),
            "seed": st.sampled_from([-(2**63), -1, 0, 2**32, 2**63 - 1]),
            "presence_penalty": st.sampled_from([-2.0, 0.0, 2.0]),
            "frequency_penalty": st.sampled_from([-2.0, 0.0, 2.0]),
            "repetition_penalty": st.sampled_from([5e-324, 1e-30, 0.5, 1, 1.3, 1e30, 1.7e308]),
            "logit_bias": st.dictionaries(token_ids.map(str), biases, max_size=4),
            "stop": st.text(min_size=1, max_size=2) | st.lists(st.text(min_size=1, max_size=2), max_size=4),
            "stop_token_ids": st.lists(token_ids, max_size=4),
            "min_tokens": st.integers(0, 8),
            "ignore_eos": st.booleans(),
            "include_stop_str_in_output": st.booleans(),
            "skip_special_tokens": st.booleans(),
            "prompt_logprobs": st.integers(0, 20),
            "return_token_ids": st.booleans(),
            "priority": st.sampled_from([-(2**63), -1, 0, 1, 2**63 - 1]),
        },
    )


def _consistent(body: dict[str, object]) -> dict[str, object]:
    """Without what contradicts other fields."""
    if body["stream"]:
        body.pop("prompt_logprobs", None)
        if body.get("echo"):
            body.pop("logprobs", None)
    if "min_tokens" in body:
        body["min_tokens"] = min(body["min_tokens"], body["max_tokens"])  # pyright: ignore[reportArgumentType]
    return body
