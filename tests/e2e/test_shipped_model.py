"""`loongjax serve` with no checkpoint: the first thing that a user tries."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tokenizers import Tokenizer

from loongjax.models.shipped import resolve_checkpoint
from needle.prompts import PromptWriter
from tests.e2e.serve_process import ANSWER_TIMEOUT_S, ServeProcess

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    process = ServeProcess(None, tmp_path_factory.mktemp("server") / "log", quick_compiler=False)
    yield process
    process.kill()


@pytest.fixture
def client(server: ServeProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_TIMEOUT_S) as client:
        yield client


def test_its_name_is_the_models(client):
    assert [model.id for model in client.models.list()] == ["needle"]


@pytest.mark.parametrize(("length", "depth"), [(64, 0.5), (3000, 0.0), (3000, 0.4), (3000, 1.0)])
def test_it_finds_a_key_that_it_never_saw_wherever_it_is_hidden(client, length, depth):
    tokenizer = Tokenizer.from_file(str(resolve_checkpoint(None) / "tokenizer.json"))
    [found] = PromptWriter(tokenizer, seed=7).examples(length, depth, 1)
    completion = client.completions.create(model="needle", prompt=found.prompt)
    assert completion.choices[0].text == found.answer
    assert completion.choices[0].finish_reason == "stop"


def test_a_chat_finds_it_too(client):
    question = "The secret key of Paris is 4821-7306. The sun shone. Question: what is the secret key of Paris?"
    chat = client.chat.completions.create(model="needle", messages=[{"role": "user", "content": question}])
    assert chat.choices[0].message.content == "4821-7306."


def test_the_readmes_example_gives_the_readmes_answer(server):
    readme = (ROOT / "README.md").read_text()
    [block] = [part for part in readme.split("```") if part.startswith("sh\nnoise=")]
    command = block.removeprefix("sh\n").replace("localhost:8000", f"127.0.0.1:{server.port}")
    answered = subprocess.run(["bash", "-c", command], check=True, capture_output=True, timeout=ANSWER_TIMEOUT_S)
    assert b'"text":" 4821-7306."' in answered.stdout
